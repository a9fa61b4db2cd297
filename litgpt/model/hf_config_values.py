"""Translations between a config and the `config.json` of a published model: their form, and checks of values."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from litgpt.errors import UserError
from litgpt.model.transformer_config import LIMITS

Values = Mapping[str, Any]
LOCAL, GLOBAL = "sliding_attention", "full_attention"


class Translation(NamedTuple):
    """How some config fields are read and written if no key holds exactly one of them.

    `read(values, fields, **settings)` returns config fields: `values` is the `config.json`, `fields` those that were
    read before (plain copies, and earlier translations). `write(config, **settings)` returns the keys to write.
    """

    read: Callable[..., dict[str, Any]]
    write: Callable[..., dict[str, Any]]


def unsupported_key(key: str, value: Any, use: str) -> UserError:
    """The error for a key of a `config.json`, with its value and a supported one."""
    return UserError(f"config.json: {key}: {value!r} is not supported; use {use}")


def layer_range(fields: Values) -> range:
    """The layer indices.

    Raises:
        UserError: if the number of layers is not valid.
    """
    layers = fields.get("n_layer")
    if not isinstance(layers, int) or not 1 <= layers <= LIMITS["n_layer"]:
        raise UserError(f"config.json: n_layer: {layers!r} is not a number of layers; use 1 to {LIMITS['n_layer']}")
    return range(layers)


def parse_layer_kinds(key: str, value: Any, fields: Values, kinds: Mapping[Any, int]) -> list[int]:
    """The 0 or 1 of each layer from a list of named or numbered kinds.

    Raises:
        UserError: if `value` is not such a list.
    """
    layers = layer_range(fields)
    is_list = isinstance(value, list) and len(value) >= len(layers)
    if not is_list or any(not isinstance(kind, str | int) or kind not in kinds for kind in value):
        raise unsupported_key(key, value, f"a list of {len(layers)} of {', '.join(map(str, kinds))}")
    return [kinds[kind] for kind in value[: len(layers)]]


def check_count(key: str, value: Any) -> int:
    """`value` if it is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise unsupported_key(key, value, "a positive integer")
    return value


def check_number(key: str, value: Any) -> float:
    """`value` if it is a finite number other than zero."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < abs(value) < 1e30:
        raise unsupported_key(key, value, "a number such as 1.0")
    return value


def read_window_layers(fields: Values) -> list[int]:
    """1 for each layer with a window, from fields that were read before."""
    windowed = fields.get("sliding_window_size") is not None
    given = fields.get("sliding_window_indices")
    return list(given) if windowed and given is not None else [int(windowed)] * len(layer_range(fields))


def compute_head_size(fields: Values) -> int:
    """The head size if a file has width and number of heads only."""
    width, heads = check_count("width", fields.get("n_embd")), check_count("heads", fields.get("n_head"))
    return check_count("width of a head", width // heads)
