"""Norms and feed-forward layers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.model.config import Config
from litgpt.model.cpu_norm import is_trained_on_cpu, normalize_on_cpu


class RMSNorm(nn.Module):
    """Root mean square norm over the last dim (Zhang and Sennrich 2019, eq. 4); (..., size)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize in the wider of the dtypes of x and weight; (..., size) -> (..., size) in the dtype of `x`."""
        if is_trained_on_cpu(x):
            return normalize_on_cpu(x, self.weight, self.eps)
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        dtype = torch.promote_types(x.dtype, self.weight.dtype)  # autocast may narrow x only
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x.dtype)


class OffsetRMSNorm(nn.Module):
    """RMSNorm with the scale 1 + weight; (..., size)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize in float32 or wider; (..., size) -> (..., size) in the dtype of `x`."""
        dtype = torch.promote_types(x.dtype, torch.float32)  # 1 + weight would lose the weight in bfloat16
        return F.rms_norm(x.to(dtype), self.weight.shape, 1 + self.weight.to(dtype), self.eps).to(x.dtype)


class OffsetLayerNorm(nn.Module):
    """LayerNorm with the scale 1 + weight; (..., size)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize in float32 or wider; (..., size) -> (..., size) in the dtype of `x`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = 1 + self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), self.weight.shape, weight, bias, self.eps).to(x.dtype)


class ScaleLayerNorm(nn.Module):
    """LayerNorm over the last dim without bias; its weight may have more dims than that, e.g. heads."""

    def __init__(self, size: int | tuple[int, ...], eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize in float32 or wider; (..., size) -> (..., size) in the dtype of `x`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (F.layer_norm(x.to(dtype), x.shape[-1:], eps=self.eps) * self.weight.to(dtype)).to(x.dtype)


class ShiftedLayerNorm(ScaleLayerNorm):
    """`ScaleLayerNorm` with a bias of the shape of its weight."""

    def __init__(self, size: int | tuple[int, ...], eps: float) -> None:
        super().__init__(size, eps)
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize in float32 or wider; (..., size) -> (..., size) in the dtype of `x`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (super().forward(x.to(dtype)) + self.bias.to(dtype)).to(x.dtype)


NORM_CLASSES: dict[str, Callable[..., nn.Module]] = {
    "LayerNorm": nn.LayerNorm,
    "ScaleLayerNorm": ScaleLayerNorm,
    "BareLayerNorm": partial(nn.LayerNorm, elementwise_affine=False),
    "OffsetLayerNorm": OffsetLayerNorm,
    "RMSNorm": RMSNorm,
    "OffsetRMSNorm": OffsetRMSNorm,
}


def build_norm(config: Config, size: int | None = None, *, eps: float | None = None) -> nn.Module:
    """Build a norm of the config's class over `size` features (default: n_embd) with epsilon (default: norm_eps)."""
    return NORM_CLASSES[config.norm_class_name](size or config.n_embd, eps=eps or config.norm_eps)


HEAD_NORM_EPS = 1e-5  # of Chameleon, in no file


def build_head_norm(config: Config, heads: int, *, bias: bool) -> nn.Module:
    """Build a LayerNorm over each head with a weight, and a bias or none, for each number of each head."""
    assert config.head_size is not None
    size = (heads, config.head_size)
    return ShiftedLayerNorm(size, HEAD_NORM_EPS) if bias else ScaleLayerNorm(size, config.norm_eps)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0) squared (So et al. 2021)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "relu_squared": relu_squared, "silu": F.silu}


def build_activation(config: Config) -> Callable[[Tensor], Tensor]:
    """The activation of a feed-forward layer: the config's `activation`, else that of its `mlp_class_name`."""
    if config.activation in ACTIVATIONS:
        return ACTIVATIONS[config.activation]
    if config.mlp_class_name in ("GptNeoxMLP", "GemmaMLP"):
        return partial(F.gelu, approximate=config.gelu_approximate)
    return F.silu


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate sigmoid(1.702 gate) (up + 1), both clamped at 7 (gpt-oss)."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def build_gating(config: Config) -> Callable[[Tensor, Tensor], Tensor]:
    """The gating of a feed-forward layer: act(gate) * up (Shazeer 2020), or a clamped form of it."""
    if config.activation == "clamped_swiglu":
        return clamped_swiglu
    act = build_activation(config)
    return apply_swiglu if act is F.silu else lambda gate, up: act(gate) * up


def apply_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, by `SwiGLU` if gradients may be needed."""
    return SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which saves gate and up for the backward pass, but not silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)  # in place, because new memory costs page faults on a CPU

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def has_mlp_bias(config: Config) -> bool:
    """Whether feed-forward layers have biases."""
    return config.bias if config.mlp_bias is None else config.mlp_bias


class PlainMLP(nn.Module):
    """Feed-forward without gate: down(act(up(x))), (B, T, n_embd) -> (B, T, n_embd)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.up = nn.Linear(config.n_embd, config.intermediate_size, bias=has_mlp_bias(config))
        self.down = nn.Linear(config.intermediate_size, config.n_embd, bias=has_mlp_bias(config))
        self.activation = build_activation(config)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both projections; (B, T, n_embd) -> (B, T, n_embd)."""
        return self.down(self.activation(self.up(x)))


class GatedMLP(nn.Module):
    """Feed-forward with gate: down(act(gate(x)) * up(x)) (Shazeer 2020), (B, T, n_embd) -> (B, T, n_embd)."""

    projections = ("gate", "up")
    """The linear layers of `project`."""

    def __init__(self, config: Config, size: int | None = None) -> None:
        super().__init__()
        width = size or config.intermediate_size
        assert width is not None
        self.gate = nn.Linear(config.n_embd, width, bias=has_mlp_bias(config))
        self.up = nn.Linear(config.n_embd, width, bias=has_mlp_bias(config))
        self.down = nn.Linear(width, config.n_embd, bias=has_mlp_bias(config))
        self.gating = build_gating(config)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three projections; (B, T, n_embd) -> (B, T, n_embd)."""
        return self.down(self.gating(*self.project(x)))

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """The gate before its activation, and what it multiplies; (B, T, n_embd) -> two of (B, T, width)."""
        return self.gate(x), self.up(x)
