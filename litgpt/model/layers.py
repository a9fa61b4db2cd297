"""The parts of a block without attention: norms and feed-forward layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.model.config import Config


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dim, then scale (Zhang and Sennrich 2019, eq. 4); (..., size)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, self.weight.dtype)  # under autocast x may be narrower than the weight
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


class OffsetRMSNorm(nn.Module):
    """RMSNorm whose stored weight is the distance from one; (..., size)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)  # 1 + weight would lose the weight in bfloat16
        return F.rms_norm(x.to(wide), self.weight.shape, 1 + self.weight.to(wide), self.eps).to(x.dtype)


NORMS = {"LayerNorm": nn.LayerNorm, "RMSNorm": RMSNorm, "OffsetRMSNorm": OffsetRMSNorm}


def norm(config: Config, size: int | None = None) -> nn.Module:
    """A norm of the config's kind over `size` numbers (n_embd unless told)."""
    return NORMS[config.norm_class_name](size or config.n_embd, eps=config.norm_eps)


class PlainMLP(nn.Module):
    """Feed-forward without gate: down(gelu(up(x))), (B, T, n_embd) -> (B, T, n_embd)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.up = nn.Linear(config.n_embd, config.intermediate_size, bias=config.bias)
        self.down = nn.Linear(config.intermediate_size, config.n_embd, bias=config.bias)
        self.gelu = config.gelu_approximate

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate=self.gelu))


class GatedMLP(nn.Module):
    """Feed-forward with gate: down(act(gate(x)) * up(x)) (Shazeer 2020), (B, T, n_embd) -> (B, T, n_embd)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.gate = nn.Linear(config.n_embd, config.intermediate_size, bias=config.bias)
        self.up = nn.Linear(config.n_embd, config.intermediate_size, bias=config.bias)
        self.down = nn.Linear(config.intermediate_size, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GeluGatedMLP(GatedMLP):
    """The gated feed-forward with GELU in place of SiLU."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.gelu = config.gelu_approximate

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.gate(x), approximate=self.gelu) * self.up(x))


MLPS: dict[str, type[nn.Module]] = {"GptNeoxMLP": PlainMLP, "LLaMAMLP": GatedMLP, "GemmaMLP": GeluGatedMLP}
