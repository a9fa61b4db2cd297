"""The shapes of published image codecs, and the names of their tensors, as transformers writes them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.colors import check_color

MAX_NUMBER = 2**20
VQ_NORM_GROUPS = 32
USUAL_COLOR = (0.5, 0.5, 0.5)
USUAL_SIZE, MAX_SIZE = 512, 4096  # pixels


@dataclass(frozen=True)
class VQFamily:
    """A kind of published codecs.

    Attributes:
        keys: of the config, by the names of the fields of `VQShape`.
        defaults: of these keys and others that are read.
        names: regular expressions of the names of tensors here, and what replaces them in published names, in order.
        counts_up: whether the published levels of the decoder are numbered from the largest size.
        has_frames: whether the codec is one of videos, whose convolutions are over frames too.
        unit_codes: whether entries of the codebook have the length 1 when they are decoded.
        conv_matrices: whether matrices are published as convolutions of size 1.
        attention: the levels whose blocks have attention: the last, those that a key lists, or those whose images have
            sizes that it lists.
        size_key: the key of the size of images, and whether it counts codes or pixels; None for images of any size.
        fit: how images get this size: resized to the square, or by their short side, of which the middle is cut out.
        needs_decoder: whether it is always published with its decoder of images.
    """

    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    names: tuple[tuple[str, str], ...]
    counts_up: bool
    has_frames: bool
    unit_codes: bool
    conv_matrices: bool
    attention: Literal["last", "levels", "sizes"]
    size_key: tuple[str, Literal["codes", "pixels"]] | None = None
    fit: Literal["square", "short_side"] = "square"
    needs_decoder: bool = True


SHARED_KEYS = {
    "embed": "embed_dim",
    "latents": "latent_channels",
    "width": "base_channels",
    "blocks": "num_res_blocks",
}
SHARED_DEFAULTS: dict[str, Any] = {"num_res_blocks": 2}
IMAGE_DEFAULTS: dict[str, Any] = {
    **SHARED_DEFAULTS,
    **{"latent_channels": 256, "base_channels": 128, "channel_multiplier": [1, 1, 2, 2, 4]},
}
SUPPORTED_VALUES = {"in_channels": 3, "out_channels": 3, "double_latent": False, "attn_type": "vanilla"}
"""Keys that have one value, which they may leave out."""
SHARED_NAMES = (
    (r"^codebook\.", "quantize.embedding."),
    (r"^to_codes\.", "quant_conv."),
    (r"^from_codes\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.first\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.last\.", r"\1.conv_out."),
    (r"^(encoder|decoder)\.norm\.", r"\1.norm_out."),
    (r"\.middle\.first\.", ".middle.block_1."),
    (r"\.middle\.second\.", ".middle.block_2."),
    (r"\.blocks\.(\d+)\.", r".block.\1."),
    (r"\.first_norm\.", ".norm1."),
    (r"\.second_norm\.", ".norm2."),
    (r"\.first\.", ".conv1."),
    (r"\.second\.", ".conv2."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"^encoder(.*)\.resize\.", r"encoder\1.downsample."),
    (r"^decoder(.*)\.resize\.", r"decoder\1.upsample."),
)
IMAGE_NAMES = (
    *SHARED_NAMES,
    (r"(\.norm\w*)\.norm\.", r"\1."),
    (r"\.attention\.((?:\d+\.)?)norm\.norm\.", r".attention.\1norm."),
    (r"\.middle\.attention\.", ".mid.attn_1."),
    (r"\.middle\.", ".mid."),
    (r"\.attention\.", ".attn."),
    (r"\.out\.", ".proj_out."),
    (r"^encoder\.levels\.", "encoder.down."),
    (r"^decoder\.levels\.", "decoder.up."),
)
CHAMELEON_COLOR = 1 / (255 * 0.0078)  # as mean and as deviation: its processor computes 0.0078 x - 1
VQ_FAMILIES = {
    "emu3_vqgan": VQFamily(
        keys={
            **SHARED_KEYS,
            **{"codes": "codebook_size", "frames": "temporal_downsample_factor", "heads": "num_attention_heads"},
        },
        defaults={
            **SHARED_DEFAULTS,
            **{"codebook_size": 32768, "embed_dim": 4, "latent_channels": 4, "temporal_downsample_factor": 4},
            **{"base_channels": 256, "channel_multiplier": [1, 2, 2, 4], "attn_resolutions": [3]},
            **{"num_attention_heads": 1},
        },
        names=(
            (r"\.frames\.convs\.(\d+)\.", r".time_conv.\1.conv."),
            (r"\.frames\.blocks\.(\d+)\.first_norm\.", r".time_res_stack.\1.norm1."),
            (r"\.frames\.blocks\.(\d+)\.second_norm\.", r".time_res_stack.\1.norm2."),
            (r"\.frames\.blocks\.(\d+)\.", r".time_res_stack.\1."),
            *SHARED_NAMES,
            (r"^encoder(.*\.norm\w*)\.norm\.", r"encoder\1."),
            (r"^decoder(.*\.norm\w*)\.norm\.", r"decoder\1.norm_layer."),
            (r"\.scale\.", ".conv_y."),
            (r"\.shift\.", ".conv_b."),
            (r"\.middle\.attention\.norm\.", ".middle.attn_norm."),
            (r"\.attention\.(\d+)\.norm\.", r".attn_norms.\1."),
            (r"\.middle\.attention\.", ".middle.attn_1."),
            (r"\.attention\.", ".attn."),
            (r"\.(q|k|v|out)\.", r".\1_proj."),
            (r"\.middle\.", ".middle_block."),
            (r"^encoder\.levels\.", "encoder.down_block.down."),
            (r"^decoder\.levels\.", "decoder.up_block.up."),
        ),
        counts_up=True,
        has_frames=True,
        unit_codes=False,
        conv_matrices=False,
        attention="levels",
    ),
    "janus_vqgan": VQFamily(
        keys={**SHARED_KEYS, "codes": "num_embeddings"},
        defaults={
            **IMAGE_DEFAULTS,
            **{"num_embeddings": 16384, "embed_dim": 8, "num_patches": 32},
        },
        names=IMAGE_NAMES,
        counts_up=False,
        has_frames=False,
        unit_codes=True,
        conv_matrices=True,
        attention="last",
        size_key=("num_patches", "codes"),
    ),
    "chameleon_vqgan": VQFamily(
        keys={**SHARED_KEYS, "codes": "num_embeddings"},
        defaults={
            **IMAGE_DEFAULTS,
            **{"num_embeddings": 8192, "embed_dim": 256, "resolution": 512, "attn_resolutions": []},
            **{"image_mean": [CHAMELEON_COLOR] * 3, "image_std": [CHAMELEON_COLOR] * 3},
        },
        names=IMAGE_NAMES,
        counts_up=False,
        has_frames=False,
        unit_codes=False,
        conv_matrices=True,
        attention="sizes",
        size_key=("resolution", "pixels"),
        fit="short_side",
        needs_decoder=False,
    ),
}
"""The published codecs that are read, by `model_type` of their config."""


@dataclass(frozen=True)
class VQShape:
    """The shape of a published codec.

    Attributes:
        values: of its config, with `size`, `image_mean` and `image_std`.
        size: height and width of the images, in pixels.
        codes: number of entries of the codebook, and `embed` their size.
        width: channels of the first convolution, and `widths` those of each level, from the largest size.
        latents: channels before the codebook and after it.
        blocks: of each level; the decoder's levels have one more.
        heads: of attention in the middle, and in the levels `attention_levels`, numbered from the largest size.
        frames: that one code stands for; those of an image are equal.
        mean, std: of colors, in 0 to 1.
    """

    model_type: str
    values: dict[str, Any] = field(compare=False)
    size: int
    codes: int
    embed: int
    width: int
    widths: tuple[int, ...]
    latents: int
    blocks: int
    attention_levels: tuple[int, ...]
    heads: int = 1
    frames: int = 1
    mean: tuple[float, ...] = USUAL_COLOR
    std: tuple[float, ...] = USUAL_COLOR

    @property
    def family(self) -> VQFamily:
        """The kind of the codec."""
        return VQ_FAMILIES[self.model_type]

    @property
    def has_frames(self) -> bool:
        """Whether it is a codec of videos."""
        return self.family.has_frames

    @property
    def fit(self) -> str:
        """As in `VQFamily`."""
        return self.family.fit

    @property
    def unit_codes(self) -> bool:
        """As in `VQFamily`."""
        return self.family.unit_codes

    @property
    def patch(self) -> int:
        """Height and width of the square that one code stands for, in pixels."""
        return 2 ** (len(self.widths) - 1)

    @property
    def side(self) -> int:
        """Codes in a row, and rows of codes, of an image."""
        return self.size // self.patch

    @property
    def places(self) -> int:
        """Codes of an image."""
        return self.side**2

    def publish(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        """The published name of a tensor, and the tensor in its published shape."""
        if self.family.counts_up:
            last = len(self.widths) - 1
            name = re.sub(r"^decoder\.levels\.(\d+)", lambda match: f"decoder.levels.{last - int(match[1])}", name)
        if self.family.conv_matrices and not name.startswith("codebook") and tensor.dim() in (2, 5):
            tensor = tensor.reshape(*tensor.shape[:2], 1, 1)
        for pattern, replacement in self.family.names:
            name = re.sub(pattern, replacement, name)
        return name, tensor


def read_vq_shape(values: Mapping[str, Any], source: Path, size: int | None = None) -> VQShape:
    """The shape in the values of a config.

    Args:
        size: height and width of images, for a codec of images of any size; None for that of the config.

    Raises:
        UserError: naming the key of a value that is not supported.
    """
    kind = str(values["model_type"])
    family = VQ_FAMILIES[kind]
    given = {**family.defaults, **{key: value for key, value in values.items() if value is not None}}
    numbers = {name: read_number(given, key, source) for name, key in family.keys.items()}
    multipliers = read_numbers(given, "channel_multiplier", source)
    for key, expected in SUPPORTED_VALUES.items():
        if given.get(key, expected) != expected:
            raise UserError(f"{source}: {key}: {given[key]} is not supported; use {expected}")
    widths = tuple(numbers["width"] * multiplier for multiplier in multipliers)
    last = len(widths) - 1
    if any(width % VQ_NORM_GROUPS for width in (numbers["width"], *widths)) or widths[-1] % numbers.get("heads", 1):
        raise UserError(
            f"{source}: base_channels: {numbers['width']} is not a multiple of {VQ_NORM_GROUPS} and of heads; use 128"
        )
    if (frames := numbers.get("frames", 1)) & (frames - 1):
        raise UserError(f"{source}: temporal_downsample_factor: {frames} is not a power of two; use 4")
    side = read_size(given, kind, 2**last, size, source)
    attention = read_attention_levels(given, family, last, side, source)
    keys = {name: f"image_{name}" for name in ("mean", "std")}
    colors = {name: check_color(source, key, given.get(key) or USUAL_COLOR) for name, key in keys.items()}
    saved = {**values, "size": side, **{f"image_{name}": list(color) for name, color in colors.items()}}
    fields: dict[str, Any] = {**numbers, **colors, "widths": widths, "attention_levels": attention}
    return VQShape(model_type=kind, values=saved, size=side, **fields)


def read_attention_levels(
    values: Mapping[str, Any], family: VQFamily, last: int, size: int, source: Path
) -> tuple[int, ...]:
    """The levels whose blocks have attention, numbered from the largest size.

    Args:
        last: the number of the last level.
        size: height and width of images, in pixels.
    """
    if family.attention == "last":
        return (last,)
    listed = read_numbers(values, "attn_resolutions", source, lowest=0)
    if family.attention == "levels":
        return listed
    return tuple(level for level in range(last + 1) if size >> level in listed)


def read_size(values: Mapping[str, Any], kind: str, patch: int, size: int | None, source: Path) -> int:
    """The height and width of images, in pixels.

    Args:
        patch: pixels that one code stands for.
        size: as in `read_vq_shape`.
    """
    if (of_family := VQ_FAMILIES[kind].size_key) is not None:
        key, unit = of_family
        only = read_number(values, key, source) * (patch if unit == "codes" else 1)
        if only % patch:
            raise UserError(f"{source}: {key}: {only} is not a multiple of {patch}, the pixels of a code; use 512")
        if size not in (None, only):
            raise UserError(f"size: {size} is not supported by {kind}, whose images have {only}; leave it out")
        return only
    side = size or values.get("size") or USUAL_SIZE
    if type(side) is not int or not patch <= side <= MAX_SIZE or side % patch:
        raise UserError(f"size: {side} is not a multiple of {patch}, the pixels of a code; use 256")
    return side


def read_number(values: Mapping[str, Any], key: str, source: Path, lowest: int = 1) -> int:
    """A positive number of a config."""
    value = values.get(key)
    if type(value) is not int or not lowest <= value <= MAX_NUMBER:
        raise UserError(f"{source}: {key}: {value!r} is not a number of a codec; use the file as it is published")
    return value


def read_numbers(values: Mapping[str, Any], key: str, source: Path, lowest: int = 1) -> tuple[int, ...]:
    """A list of numbers of a config."""
    items = values.get(key)
    listed = list(items) if isinstance(items, list | tuple) else []
    if len(listed) > VQ_NORM_GROUPS or (lowest and not listed):
        raise UserError(f"{source}: {key}: {items!r} is not a list of a few numbers; use the file as it is published")
    return tuple(read_number({key: item}, key, source, lowest) for item in listed)
