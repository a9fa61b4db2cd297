"""Find the layers and parameters that the settings of a tuner name, by our names or by published ones."""

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.moe import Experts
from litgpt.model.registry import find_family

PARTS = ("vision", "audio", "embedding", "position_embedding", "blocks", "norm", "head", "score")
OUTPUT_LAYERS = ("head", "score")
"""The layers whose weights the model reads without calling them."""


def get_base_names(model: GPT) -> set[str]:
    """The names of the parameters that a model of this shape has without a tuner."""
    return {name for name, _ in GPT.on_meta(model.config).named_parameters()}


def get_parameter_aliases(model: GPT) -> dict[str, set[str]]:
    """All names, ours and published ones, of every parameter of the base, in the order of `PARTS`."""
    base = get_base_names(model)
    names = [name for name, _ in model.named_parameters() if name in base]
    names.sort(key=lambda name: PARTS.index(name.split(".")[0]))
    aliases = {name: {name} for name in names}
    family = find_family(model.config)
    for mapping in family.tensors.map_names(names, model.config) if family else []:
        for name in mapping.names:
            aliases[name].add(mapping.hf_name)
    return aliases


def strip_parameter(name: str) -> str:
    """The name of the module that has a weight or a bias; other parameters keep their own names."""
    return name.removesuffix(".weight").removesuffix(".bias")


def get_module_aliases(model: GPT) -> dict[str, set[str]]:
    """All names of every module with parameters that adapters may change; of stacked experts, of each stack."""
    aliases: dict[str, set[str]] = defaultdict(set)
    for name, known in get_parameter_aliases(model).items():
        if not is_prediction(model, name):
            aliases[strip_parameter(name)].update(map(strip_parameter, known))
    return dict(aliases)


def is_prediction(model: GPT, name: str) -> bool:
    """Whether a name is that of a part of a prediction layer, which adapters leave as it is.

    What loads an adapter does not have these layers.
    """
    layers = range(model.config.n_layer, model.config.n_blocks)
    return name.startswith(tuple(f"blocks.{layer}." for layer in layers))


def ends_with(name: str, suffix: str) -> bool:
    """Whether a dotted name ends with these whole components."""
    return name == suffix or name.endswith(f".{suffix}")


def starts_with(name: str, prefix: str) -> bool:
    """Whether a dotted name starts with these whole components."""
    return name == prefix or name.startswith(prefix.rstrip(".") + ".")


def is_inside(name: str, module: str) -> bool:
    """Whether a dotted name is that of a part of a module with this name."""
    return f".{module}." in f".{name}".removesuffix(name.rpartition(".")[2])


def no_match_error(key: str, value: str, known: Iterable[str]) -> UserError:
    """The error for a name that matches nothing in the model, with the names closest to it."""
    closest = difflib.get_close_matches(value, sorted(set(known)), 3, cutoff=0.0)
    return UserError(f"{key}: {value!r} matches nothing in this model; the closest names are {', '.join(closest)}")


def find_by_suffix(key: str, suffixes: Iterable[str], aliases: dict[str, set[str]]) -> set[str]:
    """The parameters or modules, by our names, with a name that ends with one of the suffixes.

    Our names take precedence over published ones, because a published `gate` is a router.

    Raises:
        UserError: if a suffix matches nothing.
    """
    selected = set()
    for suffix in suffixes:
        matches = {name for name in aliases if ends_with(name, suffix)} or {
            name for name, known in aliases.items() if any(ends_with(alias, suffix) for alias in known)
        }
        if not matches:
            last = {alias.rpartition(".")[2] for known in aliases.values() for alias in known}
            raise no_match_error(key, suffix, last)
        selected |= matches
    return selected


def find_by_regex(key: str, pattern: str, aliases: dict[str, set[str]], *, whole_name: bool) -> set[str]:
    """The parameters or modules, by our names, with a name that the pattern matches, as a whole or anywhere.

    Raises:
        UserError: if it matches nothing.
    """
    match = re.compile(pattern).fullmatch if whole_name else re.compile(pattern).search
    selected = {name for name, known in aliases.items() if any(map(match, known))}
    if not selected:
        raise no_match_error(key, pattern, (alias for known in aliases.values() for alias in known))
    return selected


def find_owner(model: GPT, name: str) -> nn.Module:
    """The module of this name, or the one that has the parameter of this name."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return model.get_submodule(name.rpartition(".")[0])


def is_linear(model: GPT, name: str) -> bool:
    """Whether a name is that of a linear layer of a block, stacked experts included; not of an output or a router."""
    owner = find_owner(model, name)
    is_stack = isinstance(owner, Experts) and not name.endswith("_bias")
    return name not in OUTPUT_LAYERS and (is_stack or isinstance(owner, nn.Linear))


def resolve_tied_head(model: GPT, names: Iterable[str]) -> list[str]:
    """The same names, except that a head tied to the embedding is the embedding."""
    is_tied = model.head is None and model.score is None
    tied = {"head": "embedding", "lm_head": "embedding"} if is_tied else {}
    return [tied.get(name, name) for name in names]


def find_targets(model: GPT, aliases: dict[str, set[str]], suffixes: Iterable[str], pattern: str | None) -> list[str]:
    """The names of the layers that a tuner changes, in the order of the model.

    Args:
        aliases: as `get_module_aliases` returns them.
        suffixes: of names; or names of modules (mlp) for every linear layer within them; all-linear for every linear
            layer of the blocks; all-router for every router.
        pattern: a regular expression for whole names, used instead of `suffixes`.

    Raises:
        UserError: if one matches nothing.
    """
    if pattern is not None:
        selected = find_by_regex("tuner.target_regex", pattern, aliases, whole_name=True)
        return [name for name in aliases if name in selected]
    selected = set()
    for suffix in resolve_tied_head(model, suffixes):
        if suffix == "all-linear":
            selected |= {name for name in aliases if is_linear(model, name)}
        elif suffix == "all-router":
            routers = {name for name in aliases if ends_with(name, "router")}
            if not routers:
                raise UserError("tuner.target_modules: all-router, but this model has no experts; use all-linear")
            selected |= routers
        else:
            inside = {name for name in aliases if is_inside(name, suffix) and is_linear(model, name)}
            selected |= inside or find_by_suffix("tuner.target_modules", [suffix], aliases)
    return [name for name in aliases if name in selected]


def find_linears(model: GPT, aliases: dict[str, set[str]], suffixes: Iterable[str]) -> list[tuple[str, nn.Linear]]:
    """The linear layers of blocks that a tuner changes, with their names, in the model's order.

    Raises:
        UserError: as `find_targets`, and if a name matches anything but a linear layer of a block.
    """
    linears = []
    for name in find_targets(model, aliases, suffixes, None):
        layer = find_owner(model, name)
        if name in OUTPUT_LAYERS or not isinstance(layer, nn.Linear):
            raise UserError(f"tuner.target_modules: {name} is not a linear layer of a block; only LoRA supports it")
        linears.append((name, layer))
    return linears
