"""What the translations of `config.json` share: their form, and checks of single values."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from litgpt.errors import UserError
from litgpt.model.transformer_config import LIMITS

Values = Mapping[str, Any]
LOCAL, GLOBAL = "sliding_attention", "full_attention"


class Translation(NamedTuple):
    """How some of our fields are said where no key holds just one of them.

    `read(values, ours, **settings)` gives our fields: `values` are their keys, `ours` our fields that are known already
    (plain copies, and the translations before this one). `write(config, **settings)` gives their keys.
    """

    read: Callable[..., dict[str, Any]]
    write: Callable[..., dict[str, Any]]


def unsupported(key: str, value: Any, use: str) -> UserError:
    """The error for a key of a `config.json`: its value, and one that would do."""
    return UserError(f"config.json: {key}: {value!r} is not supported; use {use}")


def layers_in(ours: Values) -> range:
    """The numbers of the layers, once their count is known to be one."""
    layers = ours.get("n_layer")
    if not isinstance(layers, int) or not 1 <= layers <= LIMITS["n_layer"]:
        raise UserError(f"config.json: n_layer: {layers!r} is no number of layers; give 1 to {LIMITS['n_layer']}")
    return range(layers)


def marks(key: str, value: Any, ours: Values, known: Mapping[Any, int]) -> list[int]:
    """One mark for each layer out of a list of named or numbered kinds.

    Raises:
        UserError: if `value` is no such list.
    """
    layers = layers_in(ours)
    fits = isinstance(value, list) and len(value) >= len(layers) and all(isinstance(one, str | int) for one in value)
    if not fits or not set(value) <= set(known):
        raise unsupported(key, value, f"a list of {len(layers)} out of {', '.join(map(str, known))}")
    return [known[one] for one in value[: len(layers)]]


def whole(key: str, value: Any) -> int:
    """`value` if it is a whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise unsupported(key, value, "a whole number above 0")
    return value


def real(key: str, value: Any) -> float:
    """`value` if it is a finite number other than 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < abs(value) < 1e30:
        raise unsupported(key, value, "a number such as 1.0")
    return value


def window_marks(ours: Values) -> list[int]:
    """1 for each layer that sees a window only, out of our own fields."""
    windowed = ours.get("sliding_window_size") is not None
    given = ours.get("sliding_window_indices")
    return list(given) if windowed and given is not None else [int(windowed)] * len(layers_in(ours))


def head_size(ours: Values) -> int:
    """The size of a head where the file gives width and heads only."""
    return whole("width of a head", whole("width", ours.get("n_embd")) // whole("heads", ours.get("n_head")))
