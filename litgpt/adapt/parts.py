"""Parts of a model with a tower: limit what a tuner trains to those that are not frozen."""

from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any

from litgpt.adapt.targets import (
    find_by_suffix,
    find_targets,
    get_module_aliases,
    get_parameter_aliases,
    resolve_tied_head,
)
from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.recipe.effect import describe_no_effect
from litgpt.recipe.part_rates import PartRates
from litgpt.recipe.tuner import Tuner

CONVOLUTIONS = ("vision.patches", "audio.conv_1", "audio.conv_2")
"""Modules that are convolutions, at least as published, and no targets."""
TOWER_MODULES = ("vision", "audio")
PROJECTORS = ("projector", "deep_projectors")
TARGET_FIELDS = ("target_modules", "feedforward_modules")


def find_part(name: str) -> str:
    """The part that has a parameter or module: aligner for projectors, vision or audio for towers, llm for the rest."""
    tower, _, rest = name.partition(".")
    if tower not in TOWER_MODULES:
        return "llm"
    return "aligner" if rest.partition(".")[0] in PROJECTORS else tower


def limit_to_parts(tuner: Tuner, config: Config, frozen: Collection[str]) -> Tuner:
    """The settings of a tuner that train the same as these, except for parts that are frozen.

    Args:
        frozen: `llm`, `vision`, `audio` and `aligner`, or some of them; a part that the model does not have is ignored.

    Raises:
        UserError: if all parts are frozen, or the tuner cannot be limited to some.
    """
    names, model = {entry.name for entry in fields(tuner)}, GPT.on_meta(config)
    parts = dict.fromkeys(find_part(name) for name, _ in model.named_parameters())
    if parts.keys() <= set(frozen):
        raise UserError(f"freeze: {', '.join(parts)} are all true, which leaves nothing to train; set one to false")
    if "freeze_parameters" in names:
        return freeze_parts(tuner, model, frozen)
    if "target_modules" in names:
        return list_targets_in_parts(tuner, model, frozen)
    raise UserError(f"tuner: {type(tuner).__name__} is not supported for a model with a tower; use LoRA")


def freeze_parts(tuner: Any, model: GPT, frozen: Collection[str]) -> Tuner:
    """Full finetuning of the other parts; `trainable_parameters` still has precedence."""
    modules = {name: name.split(".")[0] for name in get_parameter_aliases(model)}
    modules |= {name: ".".join(name.split(".")[:2]) for name in modules if name.split(".")[0] in TOWER_MODULES}
    prefixes = dict.fromkeys(module for name, module in modules.items() if find_part(name) in frozen)
    unused = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return replace(tuner, freeze_parameters=[*tuner.freeze_parameters, *prefixes, *unused])


def list_targets_in_parts(tuner: Any, model: GPT, frozen: Collection[str]) -> Tuner:
    """The settings of an adapter with the full names of its targets, which are those in the other parts."""
    unused = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    aliases = {
        name: known
        for name, known in get_module_aliases(model).items()
        if find_part(name) not in frozen and name not in CONVOLUTIONS and f"{name}.weight" not in unused
    }
    for key, value, cure in (("bias", "all", "lora_only"), ("init", "lora_ga", "pissa")):
        if getattr(tuner, key, None) == value:
            raise UserError(f"tuner.{key}: {value} is not supported for a model with a tower; set {cure}")
    pattern, saved = getattr(tuner, "target_regex", None), getattr(tuner, "modules_to_save", [])
    changes: dict[str, Any] = {
        key: find_targets(model, aliases, getattr(tuner, key), pattern) for key in TARGET_FIELDS if hasattr(tuner, key)
    }
    if saved:
        key = "tuner.modules_to_save"
        changes["modules_to_save"] = sorted(find_by_suffix(key, resolve_tied_head(model, saved), aliases))
    return replace(tuner, **changes, **({} if pattern is None else {"target_regex": None}))


def check_rates(rates: PartRates, model: GPT) -> None:
    """Check that each part with a learning rate of its own has a trained parameter.

    Args:
        model: the whole model, with what the tuner adds to it.

    Raises:
        UserError: naming a part that has none.
    """
    trained = {find_part(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part, rate in rates.given.items():
        if part not in trained:
            other = f"a tuner that trains nothing of {part}"
            raise UserError(describe_no_effect(f"rates.{part}", rate, other, f"set rates.{part}: null"))
