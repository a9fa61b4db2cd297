"""Find the parts of a model that a tuner's settings name, by our names or by published ones."""

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.moe import Experts
from litgpt.model.registry import family_of

PARTS = ("embedding", "position_embedding", "blocks", "norm", "head")


def base_names(model: GPT) -> set[str]:
    """The names of the parameters that a model of this shape has without a tuner."""
    return {name for name, _ in GPT.on_meta(model.config).named_parameters()}


def known_as(model: GPT) -> dict[str, set[str]]:
    """Every parameter of the model's shape, in the order of `PARTS`, and all names that it goes by."""
    base = base_names(model)
    names = [name for name, _ in model.named_parameters() if name in base]
    names.sort(key=lambda name: PARTS.index(name.split(".")[0]))
    known = {name: {name} for name in names}
    family = family_of(model.config)
    for step in family.tensors.map_names(names, model.config) if family else []:
        for name in step.names:
            known[name].add(step.hf_name)
    return known


def without_ending(name: str) -> str:
    """The name of the module that holds a weight or a bias; other parameters have names of their own."""
    return name.removesuffix(".weight").removesuffix(".bias")


def modules_known_as(model: GPT) -> dict[str, set[str]]:
    """Every module with parameters (of stacked experts: each stack), and all names that it goes by."""
    known: dict[str, set[str]] = defaultdict(set)
    for name, all_names in known_as(model).items():
        known[without_ending(name)].update(map(without_ending, all_names))
    return dict(known)


def ends_with(name: str, ending: str) -> bool:
    """Whether a dotted name ends with these whole parts."""
    return name == ending or name.endswith(f".{ending}")


def starts_with(name: str, start: str) -> bool:
    """Whether a dotted name starts with these whole parts."""
    return name == start or name.startswith(start.rstrip(".") + ".")


def is_inside(name: str, module: str) -> bool:
    """Whether a dotted name is that of something within a module of this name."""
    return f".{module}." in f".{name}".removesuffix(name.rpartition(".")[2])


def nothing_found(key: str, value: str, known: Iterable[str]) -> UserError:
    """The error for a name that stands for nothing in the model, with those nearest to it."""
    names = sorted(set(known))
    near = difflib.get_close_matches(value, names, 3, cutoff=0.0)
    return UserError(f"{key}: {value!r} is nothing in this model; the nearest are {', '.join(near)}")


def found_by_ending(key: str, endings: Iterable[str], known: dict[str, set[str]]) -> set[str]:
    """Our names of what goes by a name with one of these endings; ours come first, as a published `gate` is a router.

    Raises:
        UserError: for an ending that nothing has.
    """
    found = set()
    for ending in endings:
        matches = {ours for ours in known if ends_with(ours, ending)} or {
            ours for ours, names in known.items() if any(ends_with(name, ending) for name in names)
        }
        if not matches:
            last = {name.rpartition(".")[2] for names in known.values() for name in names}
            raise nothing_found(key, ending, last)
        found |= matches
    return found


def found_by_regex(key: str, pattern: str, known: dict[str, set[str]], *, whole: bool) -> set[str]:
    """Our names of what goes by a name that matches, as a whole or anywhere.

    Raises:
        UserError: if nothing does.
    """
    match = re.compile(pattern).fullmatch if whole else re.compile(pattern).search
    found = {ours for ours, names in known.items() if any(map(match, names))}
    if not found:
        raise nothing_found(key, pattern, (name for names in known.values() for name in names))
    return found


def owner_of(model: GPT, name: str) -> nn.Module:
    """The module of this name, or the one that holds the parameter of this name."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return model.get_submodule(name.rpartition(".")[0])


def is_linear(model: GPT, name: str) -> bool:
    """Whether a name is that of a linear layer of a block, stacked experts included; not of the head or a router."""
    owner = owner_of(model, name)
    stack = isinstance(owner, Experts) and not name.endswith("_bias")
    return name != "head" and (stack or isinstance(owner, nn.Linear))


def for_tied(model: GPT, names: Iterable[str]) -> list[str]:
    """The same names, save that a head tied to the embedding is the embedding."""
    ends = {"head": "embedding", "lm_head": "embedding"} if model.head is None else {}
    return [ends.get(name, name) for name in names]


def targets_of(model: GPT, known: dict[str, set[str]], endings: Iterable[str], pattern: str | None) -> list[str]:
    """The layers that a tuner is to change, by our names, in the model's order.

    Args:
        known: as `modules_known_as` gives it.
        endings: ends of names, or names of modules for every linear layer within (mlp); all-linear for every linear
            layer inside the model, all-router for every router.
        pattern: a regular expression of whole names, which takes the place of `endings`.

    Raises:
        UserError: for what matches nothing.
    """
    if pattern is not None:
        found = found_by_regex("tuner.target_regex", pattern, known, whole=True)
        return [name for name in known if name in found]
    found = set()
    for ending in for_tied(model, endings):
        if ending == "all-linear":
            found |= {name for name in known if is_linear(model, name)}
        elif ending == "all-router":
            routers = {name for name in known if ends_with(name, "router")}
            if not routers:
                raise UserError("tuner.target_modules: all-router, but this model has no experts; all-linear would do")
            found |= routers
        else:
            inside = {name for name in known if is_inside(name, ending) and is_linear(model, name)}
            found |= inside or found_by_ending("tuner.target_modules", [ending], known)
    return [name for name in known if name in found]


def linears_of(model: GPT, known: dict[str, set[str]], endings: Iterable[str]) -> list[tuple[str, nn.Linear]]:
    """The linear layers of blocks that a tuner is to change, by name, in the model's order.

    Raises:
        UserError: as `targets_of`, and for what is no such layer.
    """
    found = []
    for name in targets_of(model, known, endings, None):
        layer = owner_of(model, name)
        if name == "head" or not isinstance(layer, nn.Linear):
            raise UserError(f"tuner.target_modules: {name} is no linear layer of a block; only LoRA changes it")
        found.append((name, layer))
    return found
