"""Read the shape of a model from the `config.json` of a published architecture, and write it.

Most keys are plain copies of one of our fields. What is said otherwise goes through a translation: a pair of functions
in `TRANSLATIONS`, one from their keys to our fields, one back. A family's file names those it needs, with settings.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from litgpt.errors import UserError
from litgpt.model.config import LIMITS, ROPE_KINDS, Config

Values = Mapping[str, Any]
LOCAL, GLOBAL = "sliding_attention", "full_attention"
# Settings of rotary scaling that a config.json calls otherwise than we do.
ROPE_SETTINGS = {"original_max_seq_len": "original_max_position_embeddings"}
# What a config.json says elsewhere already.
LEFT_UNSAID = {"dynamic": ("original_max_seq_len",), "longrope": ("factor",)}


class Translation(NamedTuple):
    """How some of our fields are said where no key holds just one of them.

    `read(values, ours, **settings)` gives our fields: `values` are their keys, `ours` our fields that are known already
    (plain copies, and the translations before this one). `write(config, **settings)` gives their keys.
    """

    read: Callable[..., dict[str, Any]]
    write: Callable[..., dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ConfigKeys:
    """How an architecture's `config.json` tells a shape.

    Attributes:
        fixed: our fields that all its members share.
        config: our field and the key that holds the same.
        translated: the translations that say the rest, with their settings; in the order of reading.
        expect: keys that must have one of some values; the first is written.
        missing: what transformers assumes for an absent key.
        nested: the key under which a folder of several models keeps the language model; such a folder is only read.
    """

    architectures: list[str]
    model_type: str
    fixed: Values
    config: Mapping[str, str]
    translated: Mapping[str, Mapping[str, Any]]
    expect: Mapping[str, list[Any]] = field(default_factory=dict)
    missing: Values = field(default_factory=dict)
    nested: str | None = None

    def read(self, values: Values, *, name: str = "") -> Config:
        """The shape that a `config.json` of this architecture tells.

        Raises:
            UserError: naming a key whose value this model does not run.
        """
        values = {**self.missing, **self._stated(values)}
        for key, accepted in self.expect.items():
            if values.get(key) not in accepted:
                raise unsupported(key, values.get(key), repr(accepted[0]))
        ours = {ours: values[key] for ours, key in self.config.items() if values.get(key) is not None}
        for kind, settings in self.translated.items():
            ours |= translation(kind).read(values, ours, **settings)
        labels = {"name": name, "hf_config": {"model_type": self.model_type}}
        return Config(**{**ours, "vocab_size": ours.get("padded_vocab_size"), **self.fixed, **labels})

    def _stated(self, values: Values) -> Values:
        """The keys of the language model, and those around it that hold for it too."""
        if self.nested is None:
            return values
        inner = values.get(self.nested)
        if not isinstance(inner, dict):
            raise unsupported(self.nested, inner, "a mapping of the language model's keys")
        tied = {key: values[key] for key in ("tie_word_embeddings",) if key in values}
        return {**tied, **inner}

    def config_json(self, config: Config) -> dict[str, Any]:
        """The `config.json` of a model of this shape, rope in the form before transformers 5 and in that since."""
        written: dict[str, Any] = {"architectures": list(self.architectures), "model_type": self.model_type}
        written["pad_token_id"] = None  # the default of an architecture may lie outside the vocabulary
        written |= {key: accepted[0] for key, accepted in self.expect.items()}
        written |= {key: getattr(config, ours) for ours, key in self.config.items()}
        for kind, settings in self.translated.items():
            written |= translation(kind).write(config, **settings)
        return written


def translation(kind: str) -> Translation:
    """The translation of a name; those of experts and latent attention have a file of their own."""
    from litgpt.model.config_experts import EXPERT_TRANSLATIONS

    return TRANSLATIONS.get(kind) or EXPERT_TRANSLATIONS[kind]


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


# Rotary embedding


def rope_mapping(values: Values) -> Values:
    """The settings of the rotary embedding as transformers takes them: `rope_scaling` before `rope_parameters`."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"config.json: rope_parameters: {rope!r} is no mapping like {{rope_type: default}}")
    return rope


def read_rope(
    values: Values,
    ours: Values,
    *,
    theta: str = "rope_theta",
    partial: str | None = None,
    original: str | None = None,
    temperature: str | None = None,
    stretch: str | None = None,
) -> dict[str, Any]:
    """One rotary embedding for all layers.

    Args:
        theta, partial, original: the keys, beside the mapping, of base, share of a head and length before scaling.
        temperature: the key, in the mapping, of the factor on the logarithm of a query's position.
        stretch: the key, in the mapping, of a growth of the base that holds for every length.
    """
    rope = rope_mapping(values)
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"config.json: rope_parameters: {rope!r} is no mapping like {{rope_type: default}}")
    beside = {ROPE_SETTINGS["original_max_seq_len"]: values[original]} if original and values.get(original) else {}
    base = rope.get("rope_theta", values.get(theta))
    if stretch and rope.get(stretch):
        size = real("head_dim", ours.get("head_size"))
        base = real(theta, base) * real(stretch, rope[stretch]) ** (size / (size - 2))
        rope = {}
    settings = read_scaling({**rope, **beside}, ours)
    found = {"rope_base": base, "rope_adjustments": settings}
    if partial:
        found["rotary_percentage"] = rope.get("partial_rotary_factor", values.get(partial))
    if temperature and rope.get(temperature) is not None:
        length = (settings or {}).get("original_max_seq_len")
        found["query_temperature"] = {"first_position": 0, "floor_scale": length, "scale": rope[temperature]}
    return {key: value for key, value in found.items() if value is not None}


def write_rope(
    config: Config,
    *,
    theta: str = "rope_theta",
    partial: str | None = None,
    original: str | None = None,
    temperature: str | None = None,
    stretch: str | None = None,
) -> dict[str, Any]:
    """The keys of `read_rope`, in the old form and in the new; a stretched base as it is."""
    scaling = write_scaling(config)
    share = {"partial_rotary_factor": config.rotary_percentage} if partial else {}
    if temperature and config.query_temperature is not None:
        scaling[temperature] = config.query_temperature["scale"]
    beside = {original: scaling.get(ROPE_SETTINGS["original_max_seq_len"], config.block_size)} if original else {}
    base = float(config.rope_base)
    return {
        theta: base,
        **({partial: config.rotary_percentage} if partial else {}),
        **beside,
        "rope_scaling": scaling if len(scaling) > 1 else None,
        "rope_parameters": {**scaling, **share, "rope_theta": base},
    }


def read_scaling(rope: Values, ours: Values) -> dict[str, Any] | None:
    """`rope_adjustments` out of the settings of one rotary embedding; None if it is not scaled."""
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    if rope.get("short_factor") is not None:
        kind = "longrope"  # Phi-3 was published with the types su and yarn for it
    if kind == "default":
        return None
    if kind not in ROPE_KINDS:
        raise unsupported("rope_type", kind, f"default or {sorted(ROPE_KINDS)}")
    said = {**rope, "beta_fast": rope.get("beta_fast") or 32, "beta_slow": rope.get("beta_slow") or 1}
    length = rope.get(ROPE_SETTINGS["original_max_seq_len"])
    if length is None or kind == "dynamic":  # which scales from the full length on
        length = ours.get("block_size")
    said[ROPE_SETTINGS["original_max_seq_len"]] = length
    if kind == "longrope" and said.get("factor") is None:
        said["factor"] = real("max_position_embeddings", ours.get("block_size")) / real("original length", length)
    needed, more = ROPE_KINDS[kind]
    found = {key: said.get(ROPE_SETTINGS.get(key, key)) for key in sorted(needed | more)}
    return {key: value for key, value in found.items() if value is not None or key in needed}


def write_scaling(config: Config) -> dict[str, Any]:
    """The settings of `read_scaling`."""
    adjustments = config.rope_adjustments or {}
    kind = config.rope_kind or "default"
    if config.rope_condense_ratio != 1:
        kind, adjustments = "linear", {"factor": config.rope_condense_ratio}
    if kind == "dynamic" or (kind == "longrope" and follows_length(config)):
        adjustments = {key: value for key, value in adjustments.items() if key not in LEFT_UNSAID[kind]}
    return {"rope_type": kind, **{ROPE_SETTINGS.get(key, key): value for key, value in adjustments.items()}}


def follows_length(config: Config) -> bool:
    """Whether the factor of the scaling is just how much longer than at first a context may be."""
    rope = config.rope_adjustments or {}
    return rope.get("factor") == config.block_size / rope["original_max_seq_len"]


def read_rope_by_layer(values: Values, ours: Values, *, theta: str, local: str) -> dict[str, Any]:
    """A rotary embedding for layers that see all and, unscaled, one for those in `sliding_window_indices`.

    Args:
        theta, local: the keys of their bases in a file from before transformers 5.
    """
    rope = rope_mapping(values)
    whole_view, window = rope.get(GLOBAL, rope), rope.get(LOCAL, {})
    if not isinstance(whole_view, dict) or not isinstance(window, dict):
        raise UserError(f"config.json: rope_parameters: {rope!r} is no mapping like {{{GLOBAL}: {{rope_theta: 1e4}}}}")
    base = whole_view.get("rope_theta", values.get(theta))
    local_base = window.get("rope_theta", values.get(local))
    adjustments = read_scaling(whole_view, ours)
    found: dict[str, Any] = {"rope_base": base}
    if adjustments is not None:
        found["rope_adjustments"] = adjustments
    if read_scaling(window, ours) is not None:
        raise unsupported(f"rope_parameters.{LOCAL}", window, "rope_type: default")
    if local_base != base or adjustments is not None:
        found |= {"rope_local_base_freq": local_base, "rope_indices": window_marks(ours)}
    return found


def write_rope_by_layer(config: Config, *, theta: str, local: str) -> dict[str, Any]:
    """The keys of `read_rope_by_layer`, in the old form and in the new."""
    base = float(config.rope_base)
    local_base = base if config.rope_local_base_freq is None else float(config.rope_local_base_freq)
    scaling = write_scaling(config)
    return {
        **({local: local_base} if local != theta else {}),
        theta: base,
        "rope_scaling": scaling if len(scaling) > 1 else None,
        "rope_parameters": {
            GLOBAL: {**scaling, "rope_theta": base},
            LOCAL: {"rope_type": "default", "rope_theta": local_base},
        },
    }


# Layers that differ


def window_marks(ours: Values) -> list[int]:
    """1 for each layer that sees a window only, out of our own fields."""
    windowed = ours.get("sliding_window_size") is not None
    given = ours.get("sliding_window_indices")
    return list(given) if windowed and given is not None else [int(windowed)] * len(layers_in(ours))


def read_layer_types(
    values: Values,
    ours: Values,
    *,
    period: str | None = None,
    first: str | None = None,
    switch: str | None = None,
    leading: bool = False,
) -> dict[str, Any]:
    """Which layers see a window only: `layer_types`, or in files without it a rule; all of them if no rule is named.

    Args:
        period: the key of a number: one layer in so many sees all.
        leading: it is the first of them, not the last.
        first: the key of the first layer with a window.
        switch: the key that must be true for any window.
    """
    window = values.get("sliding_window") if switch is None or values.get(switch) else None
    if window is None:
        return {}
    if values.get("layer_types") is not None:
        found = marks("layer_types", values["layer_types"], ours, {LOCAL: 1, GLOBAL: 0})
    elif period is not None:
        every = whole(period, values.get(period))
        found = [int((layer + (not leading)) % every != 0) for layer in layers_in(ours)]
    elif first is not None:
        start = values.get(first)
        found = [int(isinstance(start, int) and layer >= start) for layer in layers_in(ours)]
    else:
        found = [1] * len(layers_in(ours))
    if not any(found):
        return {}
    return {"sliding_window_size": window, **({} if all(found) else {"sliding_window_indices": found})}


def write_layer_types(
    config: Config,
    *,
    period: str | None = None,
    first: str | None = None,
    switch: str | None = None,
    leading: bool = False,
) -> dict[str, Any]:
    """`layer_types`, and the rule that files without it follow as far as it can say the same."""
    local = [config.is_local(layer) for layer in range(config.n_layer)]
    written: dict[str, Any] = {"sliding_window": config.sliding_window_size}
    written["layer_types"] = [LOCAL if mark else GLOBAL for mark in local]
    if switch is not None:
        written[switch] = any(local)
    if first is not None:
        written[first] = local.index(True) if any(local) else config.n_layer
    if period is not None and not leading and not all(local):
        written[period] = local.index(False) + 1
    return written


def read_windowed_rope(values: Values, ours: Values, *, without_window: bool) -> dict[str, Any]:
    """Only layers that see a window rotate by position; `without_window`, whether all do where the model has none."""
    windowed = window_marks(ours)
    if all(windowed) or (without_window and values.get("sliding_window") is None):
        return {}
    return {"rope_layers": windowed}


def write_windowed_rope(config: Config, *, without_window: bool) -> dict[str, Any]:
    """Nothing: `read_windowed_rope` goes by the keys of the windows."""
    return {}


def read_rope_layers(values: Values, ours: Values, *, every: str) -> dict[str, Any]:
    """Which layers rotate by position: `no_rope_layers` (0 = not), or all but one in `every`."""
    given = values.get("no_rope_layers")
    if given:
        found = marks("no_rope_layers", given, ours, {0: 0, 1: 1})
    else:
        step = whole(every, values.get(every))
        found = [int((layer + 1) % step != 0) for layer in layers_in(ours)]
    return {} if all(found) else {"rope_layers": found}


def write_rope_layers(config: Config, *, every: str) -> dict[str, Any]:
    """The keys of `read_rope_layers`."""
    return {"no_rope_layers": [int(config.rope_of(layer) is not None) for layer in range(config.n_layer)]}


# Biases and scales


def has_bias(config: Config, which: str) -> bool:
    """Whether the layers of a bias field have one: `attn_bias`, `attn_out_bias` or `mlp_bias`."""
    said = getattr(config, which)
    return bool(config.bias or said) if which == "attn_bias" else bool(config.bias if said is None else said)


def read_biases(values: Values, ours: Values, **keys: str) -> dict[str, Any]:
    """Our bias fields out of the keys that decide them; one key may decide several."""
    return {ours: values.get(key) for ours, key in keys.items()}


def write_biases(config: Config, **keys: str) -> dict[str, Any]:
    """The keys of `read_biases`."""
    return {key: has_bias(config, ours) for ours, key in keys.items()}


def read_inverse(values: Values, ours: Values, **keys: str) -> dict[str, Any]:
    """A factor that they divide by and we multiply with."""
    return {ours: 1 / real(key, values.get(key)) for ours, key in keys.items()}


def write_inverse(config: Config, **keys: str) -> dict[str, Any]:
    """The keys of `read_inverse`."""
    return {key: 1 / getattr(config, ours) for ours, key in keys.items()}


def read_attention_scalar(values: Values, ours: Values, *, key: str, multiplier: bool = False) -> dict[str, Any]:
    """The number whose inverse square root multiplies attention's scores; with `multiplier`, they say that root."""
    said = real(key, values.get(key))
    return {"attention_scores_scalar": float(f"{said**-2:.12g}") if multiplier else said}


def write_attention_scalar(config: Config, *, key: str, multiplier: bool = False) -> dict[str, Any]:
    """The key of `read_attention_scalar`."""
    scalar = config.attention_scores_scalar or config.head_size
    assert scalar is not None
    return {key: scalar**-0.5 if multiplier else scalar}


# Heads


def read_rotary_dim(values: Values, ours: Values, *, key: str) -> dict[str, Any]:
    """How many numbers of a head are rotated, of which we keep the share."""
    size = head_size(ours)
    rotated = whole(key, values.get(key))
    share = rotated / size
    return {"rotary_percentage": share if int(share * size) == rotated else math.nextafter(share, 2)}


def write_rotary_dim(config: Config, *, key: str) -> dict[str, Any]:
    """The key of `read_rotary_dim`."""
    return {key: config.rotary_size}


def head_size(ours: Values) -> int:
    """The size of a head where the file gives width and heads only."""
    return whole("width of a head", whole("width", ours.get("n_embd")) // whole("heads", ours.get("n_head")))


def read_multi_query(values: Values, ours: Values, *, key: str) -> dict[str, Any]:
    """Whether all heads share one key-value head, or have one each."""
    return {"n_query_groups": 1 if values.get(key) else ours.get("n_head")}


def write_multi_query(config: Config, *, key: str) -> dict[str, Any]:
    """The key of `read_multi_query`."""
    return {key: config.n_query_groups == 1}


def read_decoder_architecture(values: Values, ours: Values) -> dict[str, Any]:
    """Falcon's two decoders: the new one shares key-value heads and may norm twice, the old one does neither."""
    parallel = bool(values.get("parallel_attn"))
    if not values.get("new_decoder_architecture"):
        heads = 1 if values.get("multi_query") else ours.get("n_head")
        return {"n_query_groups": heads, "parallel_residual": parallel, "shared_attention_norm": parallel}
    if not parallel:
        raise unsupported("parallel_attn", False, "true beside new_decoder_architecture: true")
    norms, heads = values.get("num_ln_in_parallel_attn"), values.get("num_kv_heads") or ours.get("n_head")
    return {"n_query_groups": heads, "parallel_residual": True, "shared_attention_norm": norms == 1}


def write_decoder_architecture(config: Config) -> dict[str, Any]:
    """The keys of `read_decoder_architecture`."""
    plain_heads = config.n_query_groups in (1, config.n_head)
    old = plain_heads and config.shared_attention_norm == config.parallel_residual
    return {
        "new_decoder_architecture": not old,
        "multi_query": config.n_query_groups == 1,
        "num_kv_heads": config.n_query_groups,
        "parallel_attn": config.parallel_residual,
        "num_ln_in_parallel_attn": None if old else 2 - config.shared_attention_norm,
    }


TRANSLATIONS: dict[str, Translation] = {
    "rope": Translation(read_rope, write_rope),
    "rope_by_layer": Translation(read_rope_by_layer, write_rope_by_layer),
    "layer_types": Translation(read_layer_types, write_layer_types),
    "windowed_rope": Translation(read_windowed_rope, write_windowed_rope),
    "rope_layers": Translation(read_rope_layers, write_rope_layers),
    "biases": Translation(read_biases, write_biases),
    "inverse": Translation(read_inverse, write_inverse),
    "attention_scalar": Translation(read_attention_scalar, write_attention_scalar),
    "rotary_dim": Translation(read_rotary_dim, write_rotary_dim),
    "multi_query": Translation(read_multi_query, write_multi_query),
    "decoder_architecture": Translation(read_decoder_architecture, write_decoder_architecture),
}
