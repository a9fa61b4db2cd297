"""Published autoencoders of images with a learned codebook, of Emu3, Janus and Chameleon (Esser et al. 2021, VQGAN).

Axes: B batch, C channels, T frames, N codes of an image, row by row.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.errors import UserError
from litgpt.model.vq_shape import VQ_NORM_GROUPS, VQShape

VQ_NORM_EPS = 1e-6
REORDERED = "codes_in_order_of_tokens"
"""The key of a config that says that `VQCodec.reorder_codes` has been called, which is done once."""
PLACES_AT_ONCE = 1024
"""Places whose distances to all entries of the codebook are in memory together."""


class LatentNorm(nn.Module):
    """A group norm, whose output is scaled and shifted by the latents at its place, if it has these (MoVQ).

    Args:
        latents: channels of the latents; None without.
    """

    def __init__(self, width: int, latents: int | None) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(VQ_NORM_GROUPS, width, eps=VQ_NORM_EPS)
        self.scale = None if latents is None else nn.Conv2d(latents, width, 1)
        self.shift = None if latents is None else nn.Conv2d(latents, width, 1)

    def forward(self, x_BCHW: Tensor, latents_BCHW: Tensor | None) -> Tensor:
        """(B, C, H, W)."""
        hidden = self.norm(x_BCHW)
        if self.scale is None or self.shift is None:
            return hidden
        assert latents_BCHW is not None
        latents = F.interpolate(latents_BCHW, size=hidden.shape[-2:], mode="nearest")
        return hidden * self.scale(latents) + self.shift(latents)


class VQResidualBlock(nn.Module):
    """Two convolutions of normalized values, whose output is added to the input."""

    def __init__(self, width: int, output: int, latents: int | None) -> None:
        super().__init__()
        self.first_norm, self.second_norm = LatentNorm(width, latents), LatentNorm(output, latents)
        self.first, self.second = nn.Conv2d(width, output, 3, padding=1), nn.Conv2d(output, output, 3, padding=1)
        self.shortcut = None if width == output else nn.Conv2d(width, output, 1)

    def forward(self, x_BCHW: Tensor, latents_BCHW: Tensor | None) -> Tensor:
        """(B, C, H, W) to (B, output, H, W)."""
        hidden = self.first(F.silu(self.first_norm(x_BCHW, latents_BCHW)))
        hidden = self.second(F.silu(self.second_norm(hidden, latents_BCHW)))
        return (x_BCHW if self.shortcut is None else self.shortcut(x_BCHW)) + hidden


class PlaceAttention(nn.Module):
    """Attention between all places of an image, whose output is added to the input."""

    def __init__(self, width: int, heads: int, latents: int | None) -> None:
        super().__init__()
        self.heads, self.norm = heads, LatentNorm(width, latents)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_BCHW: Tensor, latents_BCHW: Tensor | None) -> Tensor:
        """(B, C, H, W)."""
        hidden = self.norm(x_BCHW, latents_BCHW).flatten(2).transpose(1, 2)
        q, k, v = (layer(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x_BCHW + self.out(mixed).transpose(1, 2).unflatten(2, x_BCHW.shape[-2:])


class Resize(nn.Module):
    """Half or twice the height and width, and a convolution."""

    def __init__(self, width: int, *, doubles: bool) -> None:
        super().__init__()
        self.doubles = doubles
        self.conv = nn.Conv2d(width, width, 3, padding=1) if doubles else nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2 H, 2 W) or (B, C, H / 2, W / 2)."""
        if self.doubles:
            return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Level(nn.Module):
    """The blocks of one size, each with attention or none, and a change of the size after them or none."""

    def __init__(self, widths: list[int], shape: VQShape, *, attends: bool, latents: int | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(VQResidualBlock(*sizes, latents) for sizes in pairwise(widths))
        heads = shape.heads
        self.attention = nn.ModuleList(PlaceAttention(width, heads, latents) for width in widths[1:] if attends)
        self.resize: Resize | None = None

    def forward(self, x_BCHW: Tensor, latents_BCHW: Tensor | None = None) -> Tensor:
        """(B, C, H, W)."""
        for number, block in enumerate(self.blocks):
            x_BCHW = block(x_BCHW, latents_BCHW)
            if len(self.attention):
                x_BCHW = self.attention[number](x_BCHW, latents_BCHW)
        return x_BCHW if self.resize is None else self.resize(x_BCHW)


class Middle(nn.Module):
    """Two blocks with attention between them."""

    def __init__(self, width: int, heads: int, latents: int | None) -> None:
        super().__init__()
        self.first, self.second = (VQResidualBlock(width, width, latents) for _ in range(2))
        self.attention = PlaceAttention(width, heads, latents)

    def forward(self, x_BCHW: Tensor, latents_BCHW: Tensor | None = None) -> Tensor:
        """(B, C, H, W)."""
        hidden = self.attention(self.first(x_BCHW, latents_BCHW), latents_BCHW)
        return self.second(hidden, latents_BCHW)


class FrameConv(nn.Module):
    """A convolution that sees no later frames, and as many rows and columns as before, or half of the frames."""

    def __init__(self, width: int, output: int, kernel: tuple[int, int, int], *, halves: bool = False) -> None:
        super().__init__()
        self.padding = (*(side for size in kernel[:0:-1] for side in (size // 2, (size - 1) // 2)), 2, 0)
        self.conv = nn.Conv3d(width, output, kernel, stride=(2 if halves else 1, 1, 1))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """(B, C, T, H, W)."""
        return self.conv(F.pad(x_BCTHW, self.padding))


class FrameBlock(nn.Module):
    """Two convolutions over frames of values normalized by their statistics in training, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = (nn.BatchNorm3d(width) for _ in range(2))
        self.first, self.second = (FrameConv(width, width, (3, 3, 3)) for _ in range(2))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """(B, C, T, H, W)."""
        hidden = self.first(F.silu(self.first_norm(x_BCTHW)))
        return x_BCTHW + self.second(F.silu(self.second_norm(hidden)))


class FrameResampling(nn.Module):
    """Half or twice the number of frames for each factor of two, by convolutions, with blocks after or before them."""

    def __init__(self, shape: VQShape, *, doubles: bool) -> None:
        super().__init__()
        width, self.doubles = shape.latents, doubles
        kernel = (3, 3, 3) if doubles else (4, 3, 3)
        factors = shape.frames.bit_length() - 1
        self.convs = nn.ModuleList(FrameConv(width, width, kernel, halves=not doubles) for _ in range(factors))
        self.blocks = nn.ModuleList(FrameBlock(width) for _ in range(shape.blocks))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """(B, C, T, H, W), with other T."""
        for block in self.blocks if self.doubles else ():
            x_BCTHW = block(x_BCTHW)
        for conv in self.convs:
            x_BCTHW = x_BCTHW.repeat_interleave(2, 2) if self.doubles else x_BCTHW
            x_BCTHW = F.silu(conv(x_BCTHW))
        for block in () if self.doubles else self.blocks:
            x_BCTHW = block(x_BCTHW)
        return x_BCTHW


class VQEncoder(nn.Module):
    """Pixels to latents; levels are numbered from the largest size."""

    def __init__(self, shape: VQShape) -> None:
        super().__init__()
        widths, last = shape.widths, len(shape.widths) - 1
        self.first = nn.Conv2d(3, shape.width, 3, padding=1)
        self.levels = nn.ModuleList()
        for number, (before, width) in enumerate(pairwise([shape.width, *widths])):
            sizes = [before, *[width] * shape.blocks]
            level = Level(sizes, shape, attends=number in shape.attention_levels, latents=None)
            level.resize = Resize(width, doubles=False) if number < last else None
            self.levels.append(level)
        self.middle = Middle(widths[-1], shape.heads, None)
        self.norm = LatentNorm(widths[-1], None)
        self.last = nn.Conv2d(widths[-1], shape.latents, 3, padding=1)
        self.frames = FrameResampling(shape, doubles=False) if shape.has_frames else None

    def forward(self, pixels_BCTHW: Tensor) -> Tensor:
        """(B, 3, T, H, W) to (B, C, T', H', W')."""
        frames, hidden = pixels_BCTHW.shape[2], pixels_BCTHW.transpose(1, 2).flatten(0, 1)
        hidden = self.first(hidden)
        for level in self.levels:
            hidden = level(hidden)
        hidden = self.last(F.silu(self.norm(self.middle(hidden), None)))
        latents = hidden.unflatten(0, (-1, frames)).transpose(1, 2)
        return latents if self.frames is None else self.frames(latents)


class VQDecoder(nn.Module):
    """Latents to pixels; levels are numbered from the smallest size."""

    def __init__(self, shape: VQShape) -> None:
        super().__init__()
        widths, last = shape.widths[::-1], len(shape.widths) - 1
        latents = shape.embed if shape.has_frames else None
        self.frames = FrameResampling(shape, doubles=True) if shape.has_frames else None
        self.first = nn.Conv2d(shape.latents, widths[0], 3, padding=1)
        self.middle = Middle(widths[0], shape.heads, latents)
        self.levels = nn.ModuleList()
        for number, (before, width) in enumerate(pairwise([widths[0], *widths])):
            sizes = [before, *[width] * (shape.blocks + 1)]
            level = Level(sizes, shape, attends=last - number in shape.attention_levels, latents=latents)
            level.resize = Resize(width, doubles=True) if number < last else None
            self.levels.append(level)
        self.norm = LatentNorm(widths[-1], latents)
        self.last = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, hidden_BCTHW: Tensor, codes_BCTHW: Tensor) -> Tensor:
        """Latents (B, C, T, H, W) and embeddings of codes of that size, to pixels (B, 3, T', H', W')."""
        if self.frames is not None:
            both = self.frames(torch.cat([hidden_BCTHW, codes_BCTHW]))
            hidden_BCTHW, codes_BCTHW = both.chunk(2)
        frames = hidden_BCTHW.shape[2]
        hidden, codes = (each.transpose(1, 2).flatten(0, 1) for each in (hidden_BCTHW, codes_BCTHW))
        hidden = self.middle(self.first(hidden), codes)
        for level in self.levels:
            hidden = level(hidden, codes)
        hidden = self.last(F.silu(self.norm(hidden, codes)))
        return hidden.unflatten(0, (-1, frames)).transpose(1, 2)


class VQCodec(nn.Module):
    """Encodes images as the numbers of the nearest entries of a codebook, and decodes these.

    Args:
        has_decoder: whether its decoder is published; without, codes stay codes.
    """

    def __init__(self, shape: VQShape, *, has_decoder: bool = True) -> None:
        super().__init__()
        self.shape = shape
        self.encoder, self.decoder = VQEncoder(shape), VQDecoder(shape) if has_decoder else None
        self.codebook = nn.Embedding(shape.codes, shape.embed)
        kernel = (3, 1, 1) if shape.has_frames else (1, 1, 1)
        pad = FrameConv if shape.has_frames else nn.Conv3d
        self.to_codes = pad(shape.latents, shape.embed, kernel)
        self.from_codes = pad(shape.embed, shape.latents, kernel)

    @property
    def can_draw(self) -> bool:
        """Whether codes can be decoded."""
        return self.decoder is not None

    @property
    def is_reordered(self) -> bool:
        """Whether the codes have other numbers than as published."""
        return bool(self.shape.values.get(REORDERED))

    @torch.no_grad()
    def reorder_codes(self, order: Sequence[int]) -> None:
        """Number the codes anew.

        Args:
            order: for each new code, from 0, the number that it had.
        """
        self.codebook.weight.copy_(self.codebook.weight[torch.tensor(order)])
        self.shape = replace(self.shape, values={**self.shape.values, REORDERED: True})

    def embed_pixels(self, pixels_BCHW: Tensor) -> Tensor:
        """The latents (B, embed, H', W') of normalized images, before they are rounded to entries of the codebook."""
        frames = pixels_BCHW[:, :, None].expand(-1, -1, self.shape.frames, -1, -1)
        return self.to_codes(self.encoder(frames))[:, :, 0]

    def find_codes(self, latents_BCHW: Tensor) -> Tensor:
        """The numbers (B, N) of the nearest entries of the codebook."""
        places = latents_BCHW.flatten(2).transpose(1, 2)
        entries = self.codebook.weight
        lengths = entries.square().sum(1)  # distances are without what all entries have in common
        parts = places.split(PLACES_AT_ONCE, dim=1)
        return torch.cat([(lengths - 2 * part @ entries.T).argmin(-1) for part in parts], dim=1)

    def decode_pixels(self, codes_BN: Tensor) -> Tensor:
        """The normalized images (B, 3, H, W) of codes.

        Raises:
            UserError: if the codec has no decoder.
        """
        if self.decoder is None:
            raise UserError(
                f"image codes of {self.shape.model_type}: published without the decoder that draws images; use such a "
                "model for texts, or codes with a decoder"
            )
        embedded = self.codebook(codes_BN)
        if self.shape.unit_codes:
            embedded = F.normalize(embedded, dim=-1)
        grid = (self.shape.side, self.shape.side)
        codes_BCTHW = embedded.transpose(1, 2).unflatten(2, grid)[:, :, None]
        return self.decoder(self.from_codes(codes_BCTHW), codes_BCTHW)[:, :, 0]

    @torch.inference_mode()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """The codes (B, N) of images, uint8 (B, 3, size, size)."""
        mean_C11, std_C11 = self._get_colors()
        return self.find_codes(self.embed_pixels((images_BCHW.float() / 255 - mean_C11) / std_C11))

    @torch.inference_mode()
    def decode(self, codes_BN: Tensor) -> Tensor:
        """The images of codes, uint8 (B, 3, size, size); errors as `decode_pixels`."""
        mean_C11, std_C11 = self._get_colors()
        pixels = self.decode_pixels(codes_BN) * std_C11 + mean_C11
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)

    def _get_colors(self) -> Tensor:
        colors = torch.tensor([self.shape.mean, self.shape.std], device=self.codebook.weight.device)
        return colors[:, :, None, None]

    def to_files(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors by their published names, and the values of the config."""
        return dict(self.shape.publish(name, tensor) for name, tensor in self.state_dict().items()), self.shape.values
