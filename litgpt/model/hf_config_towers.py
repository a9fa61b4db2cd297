"""Read the tower of a `config.json`, and write it: fields of its shape and the keys with the same value.

What no key holds as it is goes through a translation, as in `hf_config`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from litgpt.model import hf_config_values as hf
from litgpt.model.audio_config import AudioShape
from litgpt.model.hf_config_values import Values, unsupported_key
from litgpt.model.tower_config import TowerShape
from litgpt.model.transformer_config import TransformerConfig

NORM_TYPES = {"layer_norm": "layer", "rms_norm": "rms"}
ADAPTER_WIDTHS = ("vision_output_dim", "projector_input_dim", "projector_output_dim")


class TowerTranslation(NamedTuple):
    """How fields of a tower are read and written if no key holds exactly one of them.

    `read(tower, values, fields, width)` returns fields: `tower` are the keys of the tower, `values` all of the
    `config.json`, `fields` those read before, `width` that of the decoder. `write(shape, width)` returns the keys of
    the tower, and those beside it.
    """

    read: Callable[[Values, Values, Values, int], dict[str, Any]]
    write: Callable[[Any, int], tuple[dict[str, Any], dict[str, Any]]]


def read_side(vision: Values, _values: Values, fields: Values, _width: int) -> dict[str, Any]:
    """The side in patches, from that in pixels."""
    pixels, patch = hf.check_count("image_size", vision.get("image_size")), fields["patch"]
    return {"side": pixels // patch, "pixels": pixels if pixels % patch else None}


def write_side(shape: TowerShape, _width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The side in pixels."""
    return {"image_size": shape.image_size}, {}


def read_square(key: str, value: Any) -> int:
    """A side that is given once or for both directions."""
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return hf.check_count(f"vision_config.{key}", value)


def read_squares(vision: Values, _values: Values, _fields: Values, _width: int) -> dict[str, Any]:
    """The sides of a patch and of an image."""
    patch, pixels = (read_square(key, vision.get(key)) for key in ("patch_size", "image_size"))
    return {"patch": patch, "side": pixels // patch}


def write_squares(shape: TowerShape, _width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sides for both directions."""
    return {"patch_size": [shape.patch] * 2, "image_size": [shape.image_size] * 2}, {}


def read_norm_type(vision: Values, _values: Values, _fields: Values, _width: int) -> dict[str, Any]:
    """The norm of the layers, in a tower with learned positions and without norm after the layers."""
    for key, value in (("use_absolute_position_embeddings", True), ("use_mean_pooling", True)):
        if vision.get(key, value) is not value:
            raise unsupported_key(f"vision_config.{key}", vision[key], str(value).lower())
    if (kind := vision.get("norm_type")) not in NORM_TYPES:
        raise unsupported_key("vision_config.norm_type", kind, " or ".join(NORM_TYPES))
    return {"norm": NORM_TYPES[kind]}


def write_norm_type(shape: TowerShape, _width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The name of the norm."""
    names = {name: key for key, name in NORM_TYPES.items()}
    return {"norm_type": names[shape.norm]}, {}


def read_downsampling(_vision: Values, values: Values, fields: Values, _width: int) -> dict[str, Any]:
    """The side of a block, from the ratio of the sides after and before it is merged."""
    merge = int(1 / hf.check_number("downsample_ratio", values.get("downsample_ratio")))
    if merge < 1 or fields["side"] % merge:
        raise unsupported_key("downsample_ratio", values["downsample_ratio"], f"0.5, for a side of {fields['side']}")
    return {"merge": merge}


def write_downsampling(shape: TowerShape, _width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ratio, and the number of tokens of an image."""
    blocks = (shape.side or 0) // shape.merge
    return {}, {"downsample_ratio": 1 / shape.merge, "image_seq_length": blocks**2}


def read_shuffle(vision: Values, _values: Values, fields: Values, _width: int) -> dict[str, Any]:
    """The side of a block and the projector's width; a block is as wide as the feed-forward layers (Llama 4)."""
    ratio = hf.check_number("vision_config.pixel_shuffle_ratio", vision.get("pixel_shuffle_ratio"))
    merge = round(1 / ratio)
    if merge < 1 or merge * ratio != 1 or fields["side"] % merge:
        cure = f"0.5, for a side of {fields['side']}"
        raise unsupported_key("vision_config.pixel_shuffle_ratio", ratio, cure)
    if (size := fields.get("mlp_size")) != (block := fields["width"] * merge**2):
        raise unsupported_key("vision_config.intermediate_size", size, f"{block}, the width of a block")
    hidden = hf.check_count("vision_config.vision_output_dim", vision.get("vision_output_dim"))
    for key in ADAPTER_WIDTHS:
        if vision.get(key) != hidden:
            raise unsupported_key(f"vision_config.{key}", vision.get(key), f"{hidden}, as vision_output_dim")
    return {"merge": merge, "projector_hidden": hidden}


def write_shuffle(shape: TowerShape, _width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ratio of sides, and the widths."""
    return {"pixel_shuffle_ratio": 1 / shape.merge, **dict.fromkeys(ADAPTER_WIDTHS, shape.projector_hidden)}, {}


def read_decoder_eps(_vision: Values, values: Values, _fields: Values, _width: int) -> dict[str, Any]:
    """The epsilon of the projector's norm, which is that of the decoder."""
    text = values.get("text_config") or {}
    return {"projector_eps": hf.check_number("text_config.rms_norm_eps", text.get("rms_norm_eps"))}


def write_decoder_eps(_shape: TowerShape, _width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """No key beside the decoder's."""
    return {}, {}


def read_position_count(vision: Values, _values: Values, _fields: Values, _width: int) -> dict[str, Any]:
    """The side in patches, from the number of positions."""
    count = hf.check_count("num_position_embeddings", vision.get("num_position_embeddings"))
    if math.isqrt(count) ** 2 != count:
        raise unsupported_key("vision_config.num_position_embeddings", count, "the square of a number, e.g. 2304")
    return {"side": math.isqrt(count)}


def write_position_count(shape: TowerShape, _width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The number of positions."""
    return {"num_position_embeddings": (shape.side or 0) ** 2}, {}


def read_ratio(vision: Values, _values: Values, fields: Values, _width: int) -> dict[str, Any]:
    """The intermediate size as a multiple of the width."""
    return {"mlp_size": int(hf.check_number("mlp_ratio", vision.get("mlp_ratio")) * fields["width"])}


def write_ratio(shape: TowerShape, _width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ratio of both, an integer where it is one."""
    ratio = shape.mlp_size / shape.width
    return {"mlp_ratio": int(ratio) if ratio.is_integer() else ratio}, {}


def read_plain_mlp(vision: Values, _values: Values, _fields: Values, _width: int) -> dict[str, Any]:
    """No gate in the feed-forward layers."""
    if vision.get("use_swiglu_ffn", False) is not False:
        raise unsupported_key("vision_config.use_swiglu_ffn", vision["use_swiglu_ffn"], "a tower with false")
    return {}


def write_plain_mlp(_shape: TowerShape, _width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """No gate."""
    return {"use_swiglu_ffn": False}, {}


def read_feature_layer(_vision: Values, values: Values, fields: Values, width: int) -> dict[str, Any]:
    """The number of blocks up to the hidden state that is projected, through a layer of the decoder's width."""
    layer, layers = values.get("vision_feature_layer"), fields["layers"]
    if not isinstance(layer, int) or isinstance(layer, bool) or not -layers - 1 <= layer <= layers:
        raise unsupported_key("vision_feature_layer", layer, f"a number from {-layers - 1} to {layers}, e.g. -2")
    return {"blocks_run": layer if layer >= 0 else layers + 1 + layer, "projector_hidden": width}


def write_feature_layer(shape: TowerShape, _width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The hidden state counted from the last."""
    return {}, {"vision_feature_layer": shape.blocks_run - shape.layers - 1}


def read_aspect_ratio(_vision: Values, values: Values, _fields: Values, _width: int) -> dict[str, Any]:
    """The number of tiles whose features a canvas has at most."""
    name, _, tiles = str(given := values.get("vision_aspect_ratio")).rpartition("_")
    if name != "anyres_max" or not tiles.isdecimal():
        raise unsupported_key("vision_aspect_ratio", given, "anyres_max_9, or another number")
    return {"canvas_tiles": int(tiles)}


def write_aspect_ratio(shape: TowerShape, _width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The number in a name."""
    return {}, {"vision_aspect_ratio": f"anyres_max_{shape.canvas_tiles}"}


def read_pooling(_vision: Values, values: Values, fields: Values, _width: int) -> dict[str, Any]:
    """The side of a block, from the number of tokens of an image, which is that of blocks."""
    tokens, side = hf.check_count("mm_tokens_per_image", values.get("mm_tokens_per_image")), fields["side"]
    blocks = math.isqrt(tokens)
    if blocks**2 != tokens or side % blocks:
        raise unsupported_key("mm_tokens_per_image", tokens, f"{side**2}, or the square of another divisor of {side}")
    return {"merge": side // blocks}


def write_pooling(shape: TowerShape, _width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The number of blocks."""
    return {}, {"mm_tokens_per_image": ((shape.side or 0) // shape.merge) ** 2}


def read_whole(_vision: Values, _values: Values, fields: Values, _width: int) -> dict[str, Any]:
    """All blocks run."""
    return {"blocks_run": fields["layers"]}


def write_whole(_shape: TowerShape, _width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """No key."""
    return {}, {}


def read_projection(_vision: Values, values: Values, _fields: Values, width: int) -> dict[str, Any]:
    """A single matrix to the width of the decoder."""
    if values.get("projection_dim") != width:
        raise unsupported_key("projection_dim", values.get("projection_dim"), f"{width}, the width of the decoder")
    return {"projector_hidden": None}


def write_projection(_shape: TowerShape, width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The width of the decoder."""
    return {}, {"projection_dim": width, "hidden_size": width}


def read_aligner(vision: Values, _values: Values, _fields: Values, width: int) -> dict[str, Any]:
    """A projector of two layers of the decoder's width."""
    if vision.get("projection_dim") != width:
        cure = f"{width}, the width of the decoder"
        raise unsupported_key("vision_config.projection_dim", vision.get("projection_dim"), cure)
    return {"projector_hidden": width}


def write_aligner(_shape: TowerShape, width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The width of the decoder."""
    return {"projection_dim": width}, {}


def read_axial_rope(vision: Values, _values: Values, _fields: Values, _width: int) -> dict[str, Any]:
    """The base of the rotary embedding of rows and columns."""
    rope = vision.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise unsupported_key("vision_config.rope_parameters", rope, "{rope_type: axial, rope_theta: 10000.0}")
    base = rope.get("rope_theta", vision.get("rope_theta", 10000.0))
    return {"rope_base": float(hf.check_number("rope_theta", base))}


def write_axial_rope(shape: TowerShape, _width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings as transformers 5 has them."""
    return {"rope_parameters": {"rope_type": "axial", "rope_theta": shape.rope_base}}, {}


def build_merger(key: str) -> TowerTranslation:
    """The projector through a layer as wide as a merge block; `key` is its output, the width of the decoder."""

    def read(vision: Values, _values: Values, fields: Values, width: int) -> dict[str, Any]:
        if vision.get(key, width) != width:
            raise unsupported_key(f"vision_config.{key}", vision[key], f"{width}, the width of the decoder")
        merge = hf.check_count("vision_config.spatial_merge_size", fields["merge"])
        return {"projector_hidden": fields["width"] * merge**2}

    def write(_shape: TowerShape, width: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {key: width}, {}

    return TowerTranslation(read, write)


def read_output(vision: Values, _values: Values, _fields: Values, width: int) -> dict[str, Any]:
    """The output's size, which is also that of the feed-forward layers (GLM-4.1V)."""
    if vision.get("out_hidden_size", width) != width:
        cure = f"{width}, the width of the decoder"
        raise unsupported_key("vision_config.out_hidden_size", vision["out_hidden_size"], cure)
    return {"mlp_size": width}


def write_output(_shape: TowerShape, width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The width of the decoder."""
    return {"out_hidden_size": width}, {}


def read_width(tower: Values, _values: Values, _fields: Values, width: int) -> dict[str, Any]:
    """The size of a feature of sounds, which is the width of the decoder."""
    if tower.get("output_dim", width) != width:
        cure = f"{width}, the width of the decoder"
        raise unsupported_key("audio_config.output_dim", tower["output_dim"], cure)
    return {}


def write_width(_shape: AudioShape, width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The width of the decoder."""
    return {"output_dim": width}, {}


TOWER_TRANSLATIONS = {
    "side": TowerTranslation(read_side, write_side),
    "position_count": TowerTranslation(read_position_count, write_position_count),
    "squares": TowerTranslation(read_squares, write_squares),
    "norm_type": TowerTranslation(read_norm_type, write_norm_type),
    "downsampling": TowerTranslation(read_downsampling, write_downsampling),
    "shuffle": TowerTranslation(read_shuffle, write_shuffle),
    "decoder_eps": TowerTranslation(read_decoder_eps, write_decoder_eps),
    "mlp_ratio": TowerTranslation(read_ratio, write_ratio),
    "plain_mlp": TowerTranslation(read_plain_mlp, write_plain_mlp),
    "feature_layer": TowerTranslation(read_feature_layer, write_feature_layer),
    "aspect_ratio": TowerTranslation(read_aspect_ratio, write_aspect_ratio),
    "pooling": TowerTranslation(read_pooling, write_pooling),
    "output": TowerTranslation(read_output, write_output),
    "output_dim": TowerTranslation(read_width, write_width),
    "whole": TowerTranslation(read_whole, write_whole),
    "aligner": TowerTranslation(read_aligner, write_aligner),
    "projection": TowerTranslation(read_projection, write_projection),
    "rope": TowerTranslation(read_axial_rope, write_axial_rope),
    "merger_hidden_size": build_merger("hidden_size"),
    "merger_out_hidden_size": build_merger("out_hidden_size"),
}


SHAPES: dict[str, type[TowerShape | AudioShape]] = {"vision": TowerShape, "audio": AudioShape}
"""The shape of each kind of tower."""


@dataclass(frozen=True, kw_only=True)
class TowerKeys:
    """The keys of a tower and its projector in an architecture's `config.json`.

    Attributes:
        part: the field of the config that has its shape; its keys are those of `vision_config` or `audio_config`.
        tower_type: the model type of the tower, in these keys.
        decoder_type: the model type of the decoder, in `text_config`.
        fixed: fields of the shape that all models share.
        config: field of the shape and the key of the tower with the same value.
        outside: the same for keys of the `config.json` itself.
        translated: the translations for the rest, in the order of reading.
        missing: transformers' defaults of absent keys of the tower.
        missing_outside: those of the `config.json` itself, of which `tie_word_embeddings` is for the decoder.
        expect: keys of the `config.json` that must have a value.
        expect_inside: keys of the tower that must have a value.
        ties: whether embeddings are tied by the `config.json` itself, or also by the keys of its decoder (`either`).
    """

    part: Literal["vision", "audio"] = "vision"
    tower_type: str
    decoder_type: str
    fixed: Values
    config: Mapping[str, str]
    outside: Mapping[str, str] = field(default_factory=dict)
    translated: list[str] = field(default_factory=list)
    missing: Values = field(default_factory=dict)
    missing_outside: Values = field(default_factory=dict)
    expect: Values = field(default_factory=dict)
    expect_inside: Values = field(default_factory=dict)
    ties: Literal["outside", "either"] = "outside"

    @property
    def key(self) -> str:
        """The key of the `config.json` that has the tower's keys."""
        return f"{self.part}_config"

    def read(self, values: Values, width: int) -> dict[str, Any]:
        """The fields of the tower's shape.

        Args:
            values: the whole `config.json`, with `missing_outside`.
            width: of the decoder.

        Raises:
            UserError: naming a key whose value is not supported.
        """
        given = values.get(self.key) or {}
        if not isinstance(given, dict):
            raise unsupported_key(self.key, given, "a mapping of the tower's keys")
        tower = {**self.missing, **given}
        for key, value in self.expect.items():
            if values.get(key, value) != value:
                raise unsupported_key(key, values[key], repr(value))
        for key, value in self.expect_inside.items():
            if tower.get(key, value) != value:
                raise unsupported_key(f"{self.key}.{key}", tower[key], repr(value))
        copies = {name: tower[key] for name, key in self.config.items() if tower.get(key) is not None}
        copies |= {name: values[key] for name, key in self.outside.items() if values.get(key) is not None}
        fields = {**self.fixed, **copies}
        for name in self.config.keys() & {"layers", "width", "patch", "mels"}:
            hf.check_count(f"{self.key}.{self.config[name]}", fields.get(name))
        for kind in self.translated:
            fields |= TOWER_TRANSLATIONS[kind].read(tower, values, fields, width)
        return SHAPES[self.part].from_values(fields).to_dict()

    def write(self, config: TransformerConfig) -> dict[str, Any]:
        """The keys of a `config.json` that the tower and its projector have there."""
        shape = SHAPES[self.part].from_values(getattr(config, self.part))
        tower: dict[str, Any] = {"model_type": self.tower_type, **self.expect_inside}
        tower |= {key: getattr(shape, name) for name, key in self.config.items()}
        written = {**self.expect, **{key: getattr(shape, name) for name, key in self.outside.items()}}
        for kind in self.translated:
            inside, outside = TOWER_TRANSLATIONS[kind].write(shape, config.n_embd)
            tower, written = {**tower, **inside}, {**written, **outside}
        return {**written, self.key: tower}
