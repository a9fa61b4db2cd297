"""Images as grids of codes: an autoencoder with latents in a finite set (van den Oord et al. 2017, VQ-VAE).

The codes are those of finite scalar quantization (Mentzer et al. 2023, FSQ): each of a few channels is bounded and
rounded to one of its levels, and the code is the number of their combination. There is no codebook to learn, so none of
its entries can die.

Axes: B batch, N codes of an image, row by row.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from litgpt.errors import UserError
from litgpt.files import read_json_object, write_json
from litgpt.model.vq_codec import VQCodec
from litgpt.model.vq_files import find_vq_values, load_vq_codec
from litgpt.model.vq_shape import VQShape

NORM_GROUPS = 8
MAX_CODES = 2**18
CODEC_CONFIG, CODEC_WEIGHTS = "config.json", "model.safetensors"
CODEC_TYPE = "litgpt_fsq"
"""`model_type` in the config of a codec's folder."""


@dataclass(frozen=True)
class CodecShape:
    """The shape of a codec.

    Attributes:
        size: height and width of the images, in pixels.
        patch: height and width of the square that one code stands for, in pixels; a power of two that divides `size`.
        levels: number of levels of each channel of a latent, 2 or more; their product is the number of codes.
        width: channels of the convolutions.
    """

    size: int
    patch: int
    levels: tuple[int, ...]
    width: int

    def __post_init__(self) -> None:
        if self.patch < 2 or self.patch & (self.patch - 1) or self.size % self.patch:
            raise UserError(
                f"patch: {self.patch} is not a power of two that divides size: {self.size}; use 4 with size: 32"
            )
        if not self.levels or min(self.levels) < 2:
            raise UserError(f"levels: {list(self.levels)} is not valid; use two or more for each, such as [8, 5, 5]")

        if self.codes > MAX_CODES:
            raise UserError(
                f"levels: {list(self.levels)} are {self.codes:,} codes, each a row of the embedding; use at most "
                f"{MAX_CODES:,}, such as [8, 5, 5, 5]"
            )

    @property
    def side(self) -> int:
        """Codes in a row, and rows of codes, of an image."""
        return self.size // self.patch

    @property
    def places(self) -> int:
        """Codes of an image, N."""
        return self.side**2

    @property
    def fit(self) -> str:
        """How images get their size: resized to the square."""
        return "square"

    @property
    def codes(self) -> int:
        """The number of different codes."""
        return math.prod(self.levels)

    @classmethod
    def from_values(cls, values: Mapping[str, Any], source: Path) -> "CodecShape":
        """The shape in the values of a config.

        Raises:
            UserError: if they are not those of a codec.
        """
        names = [field.name for field in fields(cls)]
        numbers = [values.get(name) for name in names if name != "levels"]
        levels = values.get("levels")
        numbers += levels if isinstance(levels, list) else [None]
        if values.get("model_type") != CODEC_TYPE or not all(type(number) is int and number > 0 for number in numbers):
            raise UserError(
                f"{source}: not the config of image codes; use a folder of `litgpt tokenizer train --kind vq`, or of "
                "Emu3, Janus or Chameleon as transformers writes it"
            )
        return cls(**{name: values[name] for name in names} | {"levels": tuple(values["levels"])})


class ResidualConv(nn.Module):
    """Two convolutions of normalized values, whose output is added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = (nn.GroupNorm(math.gcd(NORM_GROUPS, width), width) for _ in range(2))
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        hidden = self.first(F.silu(self.first_norm(x_BCHW)))
        return x_BCHW + self.second(F.silu(self.second_norm(hidden)))


class ImageCodec(nn.Module):
    """Encodes images as codes, and decodes codes as images. Pixels are in -1 to 1."""

    def __init__(self, shape: CodecShape) -> None:
        super().__init__()
        self.shape, width, halvings = shape, shape.width, shape.patch.bit_length() - 1
        sizes = [3, *[width] * halvings]
        down = [nn.Sequential(nn.Conv2d(size, width, 4, 2, 1), ResidualConv(width)) for size in sizes[:-1]]
        up = [
            nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1), ResidualConv(width))
            for _ in range(halvings - 1)
        ]
        channels = len(shape.levels)
        self.encoder = nn.Sequential(*down, ResidualConv(width), nn.Conv2d(width, channels, 1))
        # the last doubling rearranges channels, since convolutions at full size would take most of the time
        last = nn.Sequential(nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2))
        first = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), ResidualConv(width), ResidualConv(width))
        self.decoder = nn.Sequential(first, *up, last)
        levels = torch.tensor(shape.levels)[:, None, None]
        self.levels_C11: Tensor
        self.strides_C11: Tensor
        self.register_buffer("levels_C11", levels, persistent=False)
        self.register_buffer("strides_C11", levels.cumprod(0) // levels, persistent=False)

    def quantize(self, latents_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Round latents to their levels; the gradient passes the rounding unchanged (Bengio et al. 2013).

        Returns:
            the rounded latents (B, C, H, W) in -1 to 1, and the codes (B, H, W).
        """
        highest_C11 = (self.levels_C11 - 1).float()
        bounded = latents_BCHW.sigmoid() * highest_C11
        digits = bounded.detach().round()
        codes_BHW = (digits.long() * self.strides_C11).sum(1)
        return self.scale_digits(bounded + (digits - bounded).detach()), codes_BHW

    def scale_digits(self, digits_BCHW: Tensor) -> Tensor:
        """The numbers of levels, from 0, in -1 to 1."""
        return 2 * digits_BCHW / (self.levels_C11 - 1) - 1

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction (B, 3, H, W) of pixels, and their codes (B, N)."""
        latents, codes_BHW = self.quantize(self.encoder(pixels_BCHW))
        return self.decoder(latents), codes_BHW.flatten(1)

    @property
    def can_draw(self) -> bool:
        """Codes can be decoded."""
        return True

    def to_files(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors by their names, and the values of the config."""
        return self.state_dict(), {"model_type": CODEC_TYPE, **asdict(self.shape)}

    @torch.inference_mode()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """The codes (B, N) of images, uint8 (B, 3, size, size)."""
        return self.quantize(self.encoder(scale_pixels(images_BCHW)))[1].flatten(1)

    @torch.inference_mode()
    def decode(self, codes_BN: Tensor) -> Tensor:
        """The images of codes, uint8 (B, 3, size, size)."""
        codes_B1HW = codes_BN.unflatten(1, (self.shape.side, self.shape.side))[:, None]
        digits = codes_B1HW // self.strides_C11 % self.levels_C11
        pixels = self.decoder(self.scale_digits(digits.float()))
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def scale_pixels(images_BCHW: Tensor) -> Tensor:
    """Pixels in -1 to 1 of images in uint8."""
    return images_BCHW.float() / 127.5 - 1


Codec = ImageCodec | VQCodec
"""One that was trained here, or a published one."""
GridShape = CodecShape | VQShape
"""Their shapes."""


def save_codec(folder: Path, codec: Codec) -> None:
    """Write config.json and model.safetensors of a codec into a folder that exists."""
    tensors, values = codec.to_files()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / CODEC_WEIGHTS, {"format": "pt"})
    write_json(folder / CODEC_CONFIG, values)


def load_codec(folder: Path, *, size: int | None = None) -> Codec:
    """Load the codec in a folder, on the CPU, for inference.

    Args:
        size: height and width of images, for a published codec of images of any size; None for those in its config.

    Raises:
        UserError: if the folder has none, or its files do not match.
    """
    if not (folder / CODEC_CONFIG).is_file():
        raise UserError(f"{folder}: has no image codes; train some with `litgpt tokenizer train --kind vq`")
    values = read_json_object(folder / CODEC_CONFIG)
    if (published := find_vq_values(values)) is not None:
        return load_vq_codec(folder, published, size)
    codec = ImageCodec(CodecShape.from_values(values, folder / CODEC_CONFIG))
    if size is not None:
        raise UserError(f"size: {size} has no effect with codes that were trained for {codec.shape.size}; leave it out")
    try:
        codec.load_state_dict(load_file(folder / CODEC_WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:160]
        raise UserError(f"{folder / CODEC_WEIGHTS}: not the weights of {CODEC_CONFIG} ({reason})") from None
    return codec.eval().requires_grad_(False)
