"""The error for a key that a command does not have, with the key that its user probably means."""

from collections.abc import Callable, Collection, Sequence
from difflib import SequenceMatcher
from functools import cache
from importlib.resources import files

import yaml

from litgpt.errors import UserError
from litgpt.recipe.option_table import index_options, list_hints

OPEN_KEYS = ("model_config",)  # mappings of fields that another part of the package defines
CUTOFF = 0.85  # of the similarity of two words, from 0 to 1, plus a bonus for the same group
KnownKeys = Callable[[], list[str]]


def load_own_field_names() -> dict[str, list[str]]:
    """Load the hints by the names that other projects have for settings, without those of the table of options."""
    text = (files("litgpt.recipe") / "field_names.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


@cache
def load_field_names() -> dict[str, Sequence[str]]:
    """Load the hints by the names that other projects have for settings."""
    return {**load_own_field_names(), **dict(list_hints())}


def drop_condition(hint: str) -> str:
    """Return a hint without the key that its command must have, after "if"."""
    return hint.partition(" if ")[0]


def list_hint_keys(hint: str) -> dict[str, str]:
    """Return the values of a hint by their keys; an empty string for a key without a value."""
    parts = [part.partition(": ") for part in drop_condition(hint).split(" and ")]
    return {key: value for key, _, value in parts}


def is_available(hint: str, known: Collection[str]) -> bool:
    """Return whether a command has all keys of a hint; keys of a class that the hint names are."""
    settings, condition = list_hint_keys(hint), hint.partition(" if ")[2]

    def has(key: str) -> bool:
        group = key.partition(".")[0]
        return key in known or (group in known and (group in OPEN_KEYS or bool(settings.get(group))))

    return all(map(has, settings)) and (not condition or condition in known)


def get_last_part(key: str) -> str:
    """Return the part of a key after its last dot."""
    return key.rpartition(".")[2]


def rate_similarity(word: str, other: str) -> float:
    """Return the similarity of two words, from 0 to 1."""
    return SequenceMatcher(None, word, other).ratio()


def rate_key(word: str, key: str) -> float:
    """Return the similarity of a word and the last part of a key, of which one word is enough if it is nearly equal."""
    last = get_last_part(key).lower()
    ratios = [rate_similarity(word, part) for part in last.split("_") if len(part) > 3 and part != last]
    return max(rate_similarity(word, last), 0.9 * max(ratios, default=0.0) + 0.01 * rate_similarity(word, last))


def get_bonus(group: str, key: str) -> float:
    """Return what is added to the similarity of a key that is in the group of the unknown one."""
    if key.rpartition(".")[0] != group:
        return 0.0
    return 0.25 if group else 0.13


def find_hint(key: str, known: list[str]) -> str | None:
    """Return the key that is probably meant: by a name of another project, the same last part, or a similar spelling.

    Args:
        key: the unknown key.
        known: the keys of the command, in order.
    """
    last, group = get_last_part(key).lower().replace("-", "_"), key.rpartition(".")[0]  # Megatron's names have hyphens
    known_set = frozenset(known)
    hints = [drop_condition(hint) for hint in load_field_names().get(last, []) if is_available(hint, known_set)]
    same = [other for other in known if get_last_part(other) == last or other.replace(".", "_") == key]
    if candidates := [*hints, *same]:
        return min(candidates, key=lambda hint: not (group and hint.startswith(f"{group}.")))
    if last in load_field_names() or last in index_options():  # its key is of another command, or of another class
        return None
    rated = [(rate_key(last, other) + get_bonus(group, other), other) for other in known]
    for name, others in load_field_names().items():
        hint = next((drop_condition(hint) for hint in others if is_available(hint, known_set)), None)
        if hint:
            rated.append((rate_similarity(last, name) + get_bonus(group, hint if group else name), hint))
    rate, nearest = max(rated, key=lambda pair: pair[0])
    return nearest if rate >= CUTOFF else None


def unknown_key_error(unknown: list[str], known: list[str]) -> UserError:
    """Return the error for unknown keys, with the keys that are probably meant, or else those beside the first one."""
    if dotted := next((key for key in unknown if key in known), None):
        group, _, name = dotted.rpartition(".")
        return UserError(f"{dotted}: keys with dots are of the command line; in YAML write {name} below {group}")
    hints = {key: hint for key in unknown if (hint := find_hint(key, known))}
    subject = f"{unknown[0]} is not a key" if len(unknown) == 1 else f"{', '.join(unknown)} are not keys"
    if hints:
        texts = list(hints.values()) if len(unknown) == 1 else [f"{hint} ({key})" for key, hint in hints.items()]
        return UserError(f"{subject}; did you mean {', '.join(texts)}?")
    option = index_options().get(get_last_part(unknown[0]).replace("-", "_"))
    if option and not option.key and not option.hints:
        return UserError(f"{subject}, and nothing is set in its place: {option.describe()}")
    group = unknown[0].rpartition(".")[0]
    siblings = [other for other in known if group and other.rpartition(".")[0] == group]
    if siblings:
        return UserError(f"{subject}; the keys of {group} are {', '.join(map(get_last_part, siblings))}")
    return UserError(f"{subject}; --help all lists the keys of the command")
