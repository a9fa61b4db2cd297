"""Full training: the weights themselves, all or some."""

from collections.abc import Iterable

from litgpt.adapt.targets import found_by_regex, known_as, nothing_found, starts_with
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.recipe.tuner import Full


def attach(model: GPT, settings: Full) -> None:
    """Leave those parameters frozen that the settings say, and let the others be trained.

    First the share from the embedding upwards is frozen, then what `freeze_*` names; `trainable_*` wins over all.

    Raises:
        UserError: for a name that stands for nothing, or if nothing would be trained.
    """
    known, parameters = known_as(model), dict(model.named_parameters())
    frozen = bottom(known, {name: parameters[name].numel() for name in known}, settings.freeze_parameters_ratio)
    frozen |= named("freeze_parameters", settings.freeze_parameters, settings.freeze_parameters_regex, known)
    frozen -= named("trainable_parameters", settings.trainable_parameters, settings.trainable_parameters_regex, known)
    if frozen == known.keys():
        raise UserError("tuner: every parameter is frozen; name some in tuner.trainable_parameters")
    for name, parameter in parameters.items():
        if name in frozen:
            parameter.requires_grad_(False)


def bottom(names: Iterable[str], sizes: dict[str, int], share: float) -> set[str]:
    """The first names whose sizes add up to at most a share of all."""
    left, found = int(sum(sizes.values()) * share), set()
    for name in names:
        left -= sizes[name]
        if left < 0:
            break
        found.add(name)
    return found


def named(key: str, starts: list[str], pattern: str | None, known: dict[str, set[str]]) -> set[str]:
    """Our names of the parameters that start so, or match."""
    found = set() if pattern is None else found_by_regex(f"tuner.{key}_regex", pattern, known, whole=False)
    for start in starts:
        matches = {ours for ours, names in known.items() if any(starts_with(name, start) for name in names)}
        if not matches:
            beginnings = {name.rsplit(".", cut)[0] for names in known.values() for name in names for cut in range(5)}
            raise nothing_found(f"tuner.{key}", start, beginnings)
        found |= matches
    return found
