"""Full finetuning: the model's own weights are trained, all of them or some."""

from litgpt.adapt.targets import find_by_regex, get_parameter_aliases, no_match_error, starts_with
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.recipe.tuner import Full


def freeze_parameters(model: GPT, settings: Full) -> None:
    """Freeze the parameters that the settings exclude from training; the others stay trainable.

    The fraction `freeze_parameters_ratio` is frozen first, from the embedding upwards, then the parameters that
    `freeze_*` names; `trainable_*` overrides both.

    Raises:
        UserError: if a name matches nothing, or every parameter would be frozen.
    """
    aliases, parameters = get_parameter_aliases(model), dict(model.named_parameters())
    sizes = {name: parameters[name].numel() for name in aliases}
    frozen = select_first(sizes, settings.freeze_parameters_ratio)
    frozen |= match_names("freeze_parameters", settings.freeze_parameters, settings.freeze_parameters_regex, aliases)
    frozen -= match_names(
        "trainable_parameters", settings.trainable_parameters, settings.trainable_parameters_regex, aliases
    )
    if frozen == aliases.keys():
        raise UserError("tuner: every parameter is frozen; list some in tuner.trainable_parameters")
    for name in frozen:
        parameters[name].requires_grad_(False)


def select_first(sizes: dict[str, int], ratio: float) -> set[str]:
    """The first parameters whose sizes sum to at most this fraction of the total."""
    budget, selected = int(sum(sizes.values()) * ratio), set()
    for name, size in sizes.items():
        budget -= size
        if budget < 0:
            break
        selected.add(name)
    return selected


def match_names(key: str, prefixes: list[str], pattern: str | None, aliases: dict[str, set[str]]) -> set[str]:
    """The parameters, by our names, with a name that has one of the prefixes or matches the pattern."""
    selected = set() if pattern is None else find_by_regex(f"tuner.{key}_regex", pattern, aliases, whole_name=False)
    for prefix in prefixes:
        matches = {name for name, known in aliases.items() if any(starts_with(alias, prefix) for alias in known)}
        if not matches:
            known_prefixes = {
                alias.rsplit(".", cut)[0] for known in aliases.values() for alias in known for cut in range(5)
            }
            raise no_match_error(f"tuner.{key}", prefix, known_prefixes)
        selected |= matches
    return selected
