"""Mixture of experts: a router sends each token to a few of many feed-forward layers.

Axes: N tokens, D model width, E experts, K experts of a token, R = N K rows (a token once for each of its experts,
sorted by expert), I inner width of an expert.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.model.config import Config
from litgpt.model.layers import GatedMLP, gating, has_mlp_bias


class MoE(nn.Module):
    """The weighted sum of each token's experts, plus the experts that all tokens share; (B, T, D) -> (B, T, D)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = GatedMLP(config, config.shared_size) if config.shared_size else None
        gated = self.shared is not None and config.shared_expert_gate
        self.shared_gate = nn.Linear(config.n_embd, 1, bias=False) if gated else None
        self.weigh_input = config.router_weights == "input"

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        weights_NK, experts_NK = self.router(x_ND)
        rows = Rows(experts_NK, self.router.weight.shape[0])
        weights_R = weights_NK.flatten().index_select(0, rows.order_R)[:, None].to(x_ND.dtype)
        x_RD = Spread.apply(x_ND, rows.token_R, rows.row_NK)
        if self.weigh_input:
            y_RD = self.experts(x_RD * weights_R, rows.ends_E)
        else:
            y_RD = self.experts(x_RD, rows.ends_E, weights_R)
        y_ND = Gathered.apply(y_RD, rows.token_R, rows.row_NK)
        y_BTD = y_ND.view_as(x_BTD)
        return y_BTD if self.shared is None else y_BTD + self._shared(x_BTD)

    def _shared(self, x_BTD: Tensor) -> Tensor:
        assert self.shared is not None
        y_BTD = self.shared(x_BTD)
        return y_BTD if self.shared_gate is None else y_BTD * torch.sigmoid(self.shared_gate(x_BTD))


class Rows:
    """The order of tokens by expert, and back.

    `token_R` is each row's token, `row_NK` where a token's rows are, `ends_E` where each expert's rows end (int32).
    """

    def __init__(self, experts_NK: Tensor, experts: int) -> None:
        expert_R, self.order_R = experts_NK.flatten().sort(stable=True)
        numbers_E = torch.arange(experts, device=experts_NK.device, dtype=expert_R.dtype)
        self.ends_E = torch.searchsorted(expert_R, numbers_E, right=True, out_int32=True)
        self.token_R = self.order_R // experts_NK.shape[1]
        row_R = torch.empty_like(self.order_R)
        row_R[self.order_R] = torch.arange(len(row_R), device=row_R.device)
        self.row_NK = row_R.view_as(experts_NK)


class Spread(torch.autograd.Function):
    """Each token once for each of its experts, (N, D) -> (R, D); its gradients add up in a fixed order."""

    @staticmethod
    def forward(context: Any, x_ND: Tensor, token_R: Tensor, row_NK: Tensor) -> Tensor:
        context.save_for_backward(token_R, row_NK)
        return x_ND.index_select(0, token_R)

    @staticmethod
    def backward(context: Any, slope_RD: Tensor) -> tuple[Tensor, None, None]:
        return Gathered.apply(slope_RD, *context.saved_tensors), None, None


class Gathered(torch.autograd.Function):
    """The sum of each token's rows, (R, D) -> (N, D); the reverse of `Spread`."""

    @staticmethod
    def forward(context: Any, y_RD: Tensor, token_R: Tensor, row_NK: Tensor) -> Tensor:
        context.save_for_backward(token_R, row_NK)
        return F.embedding_bag(row_NK, y_RD, mode="sum")  # gathers and adds in one pass over memory

    @staticmethod
    def backward(context: Any, slope_ND: Tensor) -> tuple[Tensor, None, None]:
        return Spread.apply(slope_ND, *context.saved_tensors), None, None


class Router(nn.Module):
    """The experts of each token and their weights, computed in float32 at least.

    `weight` (E, D) and `bias` (E,) score every expert; `correction` (E,) is added for choosing alone, keeps float32 and
    is not trained by gradients (DeepSeek-V3, section 2.1.2: "auxiliary-loss-free load balancing").
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.weight = uniform(config.n_expert, config.n_embd)
        self.bias = nn.Parameter(torch.zeros(config.n_expert)) if config.router_bias else None
        corrected = config.router_correction
        frozen = nn.Parameter(torch.zeros(config.n_expert, dtype=torch.float32), requires_grad=False)
        self.correction = frozen if corrected else None

    def _apply(self, change: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """What `to()` does: a change of type leaves the correction as it is, whose small steps bfloat16 would lose."""
        exact = None if self.correction is None else self.correction.detach()
        super()._apply(change, recurse)
        if exact is not None and self.correction is not None and self.correction.dtype != exact.dtype:
            self.correction.data = exact.to(self.correction.device)
        return self

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the chosen experts, both (N, K)."""
        config = self.config
        logits_NE = self._logits(x_ND)
        early = config.router_softmax == "before_top_k"
        if config.router_score == "sigmoid":
            scores_NE = logits_NE.sigmoid()
        else:
            scores_NE = logits_NE.softmax(-1) if early else logits_NE
        experts_NK = self._chosen(scores_NE.detach())
        weights_NK = scores_NE.gather(1, experts_NK)
        if config.router_score == "softmax" and not early:
            weights_NK = weights_NK.softmax(-1)
        elif config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return weights_NK * config.routed_scaling_factor, experts_NK

    def _logits(self, x_ND: Tensor) -> Tensor:
        exact = torch.promote_types(torch.promote_types(x_ND.dtype, self.weight.dtype), torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(exact)
            return F.linear(x_ND.to(exact), self.weight.to(exact), bias)

    def _chosen(self, scores_NE: Tensor) -> Tensor:
        """The K best experts, out of the best groups where the shape limits them."""
        if self.correction is not None:
            scores_NE = scores_NE + self.correction
        if (self.config.n_expert_groups or 1) > 1:
            scores_NE = scores_NE.masked_fill(~self._allowed(scores_NE), float("-inf"))
        return scores_NE.topk(self.config.n_expert_per_token, dim=-1).indices

    def _allowed(self, scores_NE: Tensor) -> Tensor:
        """True for experts of the groups whose best one or two scores sum up highest (DeepSeek-V2, section 2.2.2)."""
        groups, kept, best = (
            self.config.n_expert_groups,
            self.config.n_topk_groups,
            self.config.n_topk_scores_per_group,
        )
        assert groups is not None and kept is not None and best is not None
        scores_NGe = scores_NE.unflatten(1, (groups, -1))
        chosen_Ng = scores_NGe.topk(best, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
        allowed_NG = torch.zeros(scores_NGe.shape[:2], dtype=torch.bool, device=scores_NE.device)
        return allowed_NG.scatter(1, chosen_Ng, True).repeat_interleave(scores_NGe.shape[2], dim=1)


class Experts(nn.Module):
    """All gated feed-forward layers of one MoE block, stacked; (R, D) -> (R, D)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        experts, width, inner = config.n_expert, config.n_embd, config.expert_size
        self.gate, self.up = uniform(experts, inner, width), uniform(experts, inner, width)
        self.down = uniform(experts, width, inner)
        biased = config.expert_bias or has_mlp_bias(config)
        self.gate_bias = nn.Parameter(torch.zeros(experts, inner)) if biased else None
        self.up_bias = nn.Parameter(torch.zeros(experts, inner)) if biased else None
        self.down_bias = nn.Parameter(torch.zeros(experts, width)) if biased else None
        self.gating = gating(config)

    def forward(self, x_RD: Tensor, ends_E: Tensor, weights_R: Tensor | None = None) -> Tensor:
        """Each row through its expert.

        Args:
            x_RD: rows sorted by expert.
            ends_E: where each expert's rows end, int32.
            weights_R: what each row's result is multiplied by, (R, 1); done before `down`, where rows are narrower.
        """
        inner_RI = self.gating(*self._gate_and_up(x_RD, ends_E))
        if weights_R is None:
            return grouped_linear(inner_RI, self.down, self.down_bias, ends_E)
        y_RD = grouped_linear(inner_RI * weights_R.to(inner_RI.dtype), self.down, None, ends_E)
        return y_RD if self.down_bias is None else y_RD + own(self.down_bias, y_RD, ends_E) * weights_R.to(y_RD.dtype)

    def _gate_and_up(self, x_RD: Tensor, ends_E: Tensor) -> Sequence[Tensor]:
        """What `gating` takes, both (R, I).

        On a CPU, narrow experts of many rows take one product for both: copies of the weights are smaller than x then.
        """
        weights, biases = (self.gate, self.up), (self.gate_bias, self.up_bias)
        if x_RD.device.type != "cpu" or sum(weight[..., 0].numel() for weight in weights) >= len(x_RD):
            return [grouped_linear(x_RD, *layer, ends_E) for layer in zip(weights, biases, strict=True)]
        there: list[Tensor] = [bias_EI for bias_EI in biases if bias_EI is not None]
        bias_EO = torch.cat(there, 1) if there else None
        return grouped_linear(x_RD, torch.cat(weights, 1), bias_EO, ends_E).chunk(2, -1)


def uniform(*shape: int) -> nn.Parameter:
    """A parameter with the first values of an `nn.Linear`: uniform within 1 / sqrt(inputs)."""
    bound = shape[-1] ** -0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def grouped_linear(x_RD: Tensor, weight_EOD: Tensor, bias_EO: Tensor | None, ends_E: Tensor) -> Tensor:
    """x W^T + b with each expert's own W and b for its rows, (R, O); in autocast's type where that is on."""
    kind = x_RD.device.type
    if torch.is_autocast_enabled(kind):
        x_RD, weight_EOD = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (x_RD, weight_EOD))
    multiply = F.grouped_mm if x_RD.dtype == torch.bfloat16 and aligned(x_RD, weight_EOD) else any_mm
    y_RO = multiply(x_RD.contiguous(), weight_EOD.contiguous().mT, offs=ends_E)
    return y_RO if bias_EO is None else y_RO + own(bias_EO, y_RO, ends_E)


def own(bias_EO: Tensor, y_RO: Tensor, ends_E: Tensor) -> Tensor:
    """The bias of each row's expert, (R, O)."""
    return bias_EO.to(y_RO.dtype).index_select(0, owners(ends_E, len(y_RO)))


def aligned(x_RD: Tensor, weight_EOD: Tensor) -> bool:
    """Whether rows are of multiples of 16 bytes, as the kernels of `F.grouped_mm` ask for."""
    return all(size * x_RD.element_size() % 16 == 0 for size in weight_EOD.shape[1:])


@torch.compiler.disable  # torch 2.14 compiles grouped products of bfloat16 only
def any_mm(x_RD: Tensor, weight_EDO: Tensor, *, offs: Tensor) -> Tensor:
    """`F.grouped_mm` of any floating-point type and size."""
    taken = x_RD.dtype != torch.float64 and aligned(x_RD, weight_EDO)
    return (F.grouped_mm if taken else padded_mm)(x_RD, weight_EDO, offs=offs)


def padded_mm(x_RD: Tensor, weight_EDO: Tensor, *, offs: Tensor) -> Tensor:
    """What `F.grouped_mm` computes, for types and sizes that it refuses: every group padded to the longest."""
    owner_R = owners(offs, len(x_RD))
    starts_E = F.pad(offs, (1, 0))[:-1]
    place_R = torch.arange(len(x_RD), device=x_RD.device) - starts_E[owner_R]
    padded = x_RD.new_zeros(len(offs), int((offs - starts_E).max()), x_RD.shape[1])
    return (padded.index_put((owner_R, place_R), x_RD) @ weight_EDO)[owner_R, place_R]


def owners(ends_E: Tensor, rows: int) -> Tensor:
    """The expert of each row, (R,)."""
    return torch.searchsorted(ends_E, torch.arange(rows, device=ends_E.device, dtype=ends_E.dtype), right=True)
