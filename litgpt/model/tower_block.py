"""A layer of a tower, of images or of sounds: attention within segments, and a feed-forward layer.

Axes: N places of all segments, C width of the tower, H heads, S size of a head.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.model.layers import OffsetRMSNorm, RMSNorm
from litgpt.model.rotary import apply_rotary
from litgpt.model.tower_config import BlockShape

NORMS: dict[str, Callable[..., nn.Module]] = {"layer": nn.LayerNorm, "rms": RMSNorm, "offset_rms": OffsetRMSNorm}
QK_NORM_EPS = 1e-6  # of InternViT 6B, in no file


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x) (Hendrycks and Gimpel 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)


TOWER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


class TowerBlock(nn.Module):
    """A layer of a tower: attention within segments, and a feed-forward layer, each after its norm."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        build_norm = partial(NORMS[shape.norm], shape.width, eps=shape.eps)
        self.norm_1, self.norm_2 = build_norm(), build_norm()
        self.q, self.v = (nn.Linear(shape.width, shape.width, bias=shape.qkv_bias) for _ in range(2))
        self.k = nn.Linear(shape.width, shape.width, bias=shape.qkv_bias and shape.key_bias)
        self.out = nn.Linear(shape.width, shape.width, bias=shape.out_bias)
        self.norm_q, self.norm_k = (RMSNorm(shape.width, QK_NORM_EPS) if shape.qk_norm else None for _ in range(2))
        self.scale_1, self.scale_2 = (
            nn.Parameter(torch.ones(shape.width)) if shape.layer_scale else None for _ in range(2)
        )
        gated = shape.mlp_form == "gated"
        self.gate = nn.Linear(shape.width, shape.mlp_size, bias=shape.mlp_bias) if gated else None
        self.up = nn.Linear(shape.width, shape.mlp_size, bias=shape.mlp_bias)
        self.down = nn.Linear(shape.mlp_size, shape.width, bias=shape.mlp_bias)
        self.heads, self.act = shape.heads, TOWER_ACTIVATIONS[shape.act]
        self.interleave = shape.rope_interleave

    def forward(self, x_NC: Tensor, lengths: Sequence[int], angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """(N, C) -> (N, C); `lengths` are those of the segments, `angles` cosine and sine as `build_grid_angles`."""
        normed = self.norm_1(x_NC)
        q, k, v = self.q(normed), self.k(normed), self.v(normed)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(0, 1) for each in (q, k, v))
        if angles is not None:
            q, k = (apply_rotary(x, *angles, interleave=self.interleave) for x in (q, k))
        attention_HNS = attend_within_segments(q, k, v, lengths)
        x_NC = x_NC + scale(self.out(attention_HNS.transpose(0, 1).flatten(1)), self.scale_1)
        normed = self.norm_2(x_NC)
        hidden = self.act(self.up(normed)) if self.gate is None else self.act(self.gate(normed)) * self.up(normed)
        return x_NC + scale(self.down(hidden), self.scale_2)


def scale(x_NC: Tensor, factors_C: Tensor | None) -> Tensor:
    """The product with factors, if there are any."""
    return x_NC if factors_C is None else x_NC * factors_C


def attend_within_segments(q_HNS: Tensor, k_HNS: Tensor, v_HNS: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attention without causal mask within consecutive segments, (H, N, S); segments of one length are a batch."""
    if len(set(lengths)) == 1:
        batches = (x.unflatten(1, (len(lengths), -1)).transpose(0, 1) for x in (q_HNS, k_HNS, v_HNS))
        return F.scaled_dot_product_attention(*batches).transpose(0, 1).flatten(1, 2)
    segments = zip(*(x.split(list(lengths), dim=1) for x in (q_HNS, k_HNS, v_HNS)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*segment) for segment in segments], dim=1)
