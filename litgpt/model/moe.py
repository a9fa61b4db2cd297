"""Mixture of experts: a router assigns each token to a few of many feed-forward layers.

Axes: N tokens, D model width, E experts, K experts per token, R = N K rows (each token once for each of its
experts, sorted by expert), I intermediate size of an expert.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.model.config import Config
from litgpt.model.layers import GatedMLP, build_gating, has_mlp_bias
from litgpt.model.routing import Routing
from litgpt.model.uncompiled import uncompiled


class MoE(nn.Module):
    """The weighted sum of each token's experts, plus the shared experts; (B, T, D) -> (B, T, D)."""

    def __init__(self, config: Config, layer: int = 0) -> None:
        super().__init__()
        self.router = Router(config, layer)
        self.experts = Experts(config)
        self.shared = GatedMLP(config, config.shared_size) if config.shared_size else None
        gated = self.shared is not None and config.shared_expert_gate
        self.shared_gate = nn.Linear(config.n_embd, 1, bias=False) if gated else None
        self.weights_input = config.router_weights == "input"

    def forward(self, x_BTD: Tensor, routing: Routing | None = None) -> Tensor:
        """Route each token to its experts and sum what they return; (B, T, D) -> (B, T, D).

        Args:
            routing: of the forward pass in training; None for inference.
        """
        x_ND = x_BTD.flatten(0, 1)
        weights_NK, experts_NK = self.router(x_ND, routing)
        permutation = self._permute(experts_NK, routing)
        weights_R = select_rows(weights_NK.flatten()[:, None], permutation.order_R, permutation.has_gaps).to(x_ND.dtype)
        x_RD = permute(x_ND, permutation)
        if self.weights_input:
            compute_experts = self.start_experts(x_RD * weights_R, permutation.ends_E)
        else:
            compute_experts = self.start_experts(x_RD, permutation.ends_E, weights_R)
        shared_BTD = None if self.shared is None else self._apply_shared(x_BTD)
        y_BTD = unpermute(compute_experts(), permutation).view_as(x_BTD)
        return y_BTD if shared_BTD is None else y_BTD + shared_BTD

    def start_experts(self, x_RD: Tensor, ends_E: Tensor, weights_R: Tensor | None = None) -> Callable[[], Tensor]:
        """A function that computes `self.experts(x_RD, ends_E, weights_R)`; expert parallelism sends rows before."""
        return partial(self.experts, x_RD, ends_E, weights_R)

    def _permute(self, experts_NK: Tensor, routing: Routing | None) -> "Permutation":
        experts = self.router.config.n_expert
        capacity = None if routing is None else routing.compute_capacity(experts_NK, experts)
        if routing is None or capacity is None:
            return Permutation(experts_NK, experts)
        padded = routing.settings.pad_expert_input_to_capacity
        return PartialPermutation(experts_NK, experts, capacity if padded else None)

    def _apply_shared(self, x_BTD: Tensor) -> Tensor:
        assert self.shared is not None
        y_BTD = self.shared(x_BTD)
        return y_BTD if self.shared_gate is None else y_BTD * torch.sigmoid(self.shared_gate(x_BTD))


class Permutation:
    """Tokens sorted by expert.

    Attributes:
        order_R: the position in the flattened `experts_NK` of each row.
        token_R: the token of each row.
        row_NK: the rows of each token.
        ends_E: the end of each expert's rows, int32.
        has_gaps: whether rows without a token (number N) and tokens without a row (number R) are possible.
    """

    has_gaps = False

    def __init__(self, experts_NK: Tensor, experts: int) -> None:
        expert_R, self.order_R = experts_NK.flatten().sort(stable=True)
        numbers_E = torch.arange(experts, device=experts_NK.device, dtype=expert_R.dtype)
        self.ends_E = torch.searchsorted(expert_R, numbers_E, right=True, out_int32=True)
        self.token_R = self.order_R // experts_NK.shape[1]
        row_R = torch.empty_like(self.order_R)
        row_R[self.order_R] = torch.arange(len(row_R), device=row_R.device)
        self.row_NK = row_R.view_as(experts_NK)


class PartialPermutation(Permutation):
    """Tokens sorted by expert, without those that their experts drop.

    Args:
        experts_NK: experts of each token, the number `experts` for one that drops it.
        capacity: the number of rows of each expert, of which those after its tokens are zero; None for one per token.
    """

    has_gaps = True

    def __init__(self, experts_NK: Tensor, experts: int, capacity: int | None) -> None:
        super().__init__(experts_NK, experts)
        starts = F.pad(self.ends_E, (1, 0))
        if capacity is None:
            rows = self.read_rows()
            self.order_R = self.order_R[:rows]
        else:
            rows, pairs = experts * capacity, experts_NK.numel()
            self.row_NK = experts_NK * capacity + self.row_NK - starts[experts_NK]
            row_R = self.row_NK.flatten().clamp(max=rows)
            order_R = row_R.new_full((rows + 1,), pairs)
            self.order_R = order_R.scatter(0, row_R, torch.arange(pairs, device=row_R.device))[:-1]
            self.ends_E = torch.arange(1, experts + 1, device=row_R.device, dtype=torch.int32) * capacity
        self.row_NK = self.row_NK.clamp(max=rows)
        self.token_R = self.order_R // experts_NK.shape[1]

    def read_rows(self) -> int:
        """The number of rows that are not dropped, on the host."""
        return int(self.ends_E[-1])


def permute(x_ND: Tensor, permutation: Permutation) -> Tensor:
    """Copy each token once for each of its experts, (N, D) -> (R, D); gradients are summed in a fixed order."""
    return Permute.apply(x_ND, permutation.token_R, permutation.row_NK, permutation.has_gaps)


def unpermute(y_RD: Tensor, permutation: Permutation) -> Tensor:
    """Sum the rows of each token, (R, D) -> (N, D)."""
    return Unpermute.apply(y_RD, permutation.token_R, permutation.row_NK, permutation.has_gaps)


def select_rows(x: Tensor, index: Tensor, has_gaps: bool) -> Tensor:
    """Rows of x; with gaps, the number `len(x)` selects zeros."""
    return (F.pad(x, (0, 0, 0, 1)) if has_gaps else x).index_select(0, index)


class Permute(torch.autograd.Function):
    """`permute`, whose backward is `Unpermute`."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_R: Tensor, row_NK: Tensor, has_gaps: bool) -> Tensor:
        ctx.save_for_backward(token_R, row_NK)
        ctx.has_gaps = has_gaps
        return select_rows(x_ND, token_R, has_gaps)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        return Unpermute.apply(grad_RD, *ctx.saved_tensors, ctx.has_gaps), None, None, None


class Unpermute(torch.autograd.Function):
    """`unpermute`, whose backward is `Permute`."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, token_R: Tensor, row_NK: Tensor, has_gaps: bool) -> Tensor:
        ctx.save_for_backward(token_R, row_NK)
        ctx.has_gaps = has_gaps
        y_RD = F.pad(y_RD, (0, 0, 0, 1)) if has_gaps else y_RD
        return F.embedding_bag(row_NK, y_RD, mode="sum")  # gathers and sums in one pass over memory

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None]:
        return Permute.apply(grad_ND, *ctx.saved_tensors, ctx.has_gaps), None, None, None


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits_NE: F.softplus(logits_NE).sqrt(),
}
"""Scores of the experts, by `router_score`."""


class Router(nn.Module):
    """The experts of each token and their weights, computed in float32 or float64.

    `weight` (E, D) and `bias` (E,) score every expert; `correction` (E,) is added for the selection only, stays in
    float32 and is not trained by gradients (DeepSeek-V3, section 2.1.2: "auxiliary-loss-free load balancing").
    """

    def __init__(self, config: Config, layer: int = 0) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.weight = uniform_parameter(config.n_expert, config.n_embd)
        self.bias = nn.Parameter(torch.zeros(config.n_expert)) if config.router_bias else None
        correction = nn.Parameter(torch.zeros(config.n_expert, dtype=torch.float32), requires_grad=False)
        self.correction = correction if config.router_correction else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Called by `to()`: keep the dtype of the correction, whose small updates bfloat16 would lose."""
        correction = None if self.correction is None else self.correction.detach()
        super()._apply(fn, recurse)
        if correction is not None and self.correction is not None and self.correction.dtype != correction.dtype:
            self.correction.data = correction.to(self.correction.device)
        return self

    def forward(self, x_ND: Tensor, routing: Routing | None = None) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the selected experts, both (N, K); the number E for one that drops the token.

        Args:
            routing: of the forward pass in training; None for inference.
        """
        config = self.config
        logits_NE = self._compute_logits(x_ND, torch.float32 if routing is None else routing.dtype)
        softmax_last = config.router_score == "softmax" and config.router_softmax == "after_top_k"
        scores_NE = logits_NE if softmax_last else SCORES[config.router_score](logits_NE)
        if routing is not None and routing.settings.router_load_balancing_type == "sinkhorn":
            experts_NK = routing.assign_evenly(logits_NE).topk(config.n_expert_per_token, dim=-1).indices
        else:
            experts_NK = self._select_experts(scores_NE.detach())
        weights_NK = scores_NE.gather(1, experts_NK)
        if softmax_last:
            weights_NK = weights_NK.softmax(-1)
        elif config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        weights_NK = weights_NK * config.routed_scaling_factor
        if routing is None:
            return weights_NK, experts_NK
        shares_NE = logits_NE.softmax(-1) if config.router_score == "softmax" else scores_NE
        return routing.train(
            self.layer,
            weights_NK,
            experts_NK,
            logits_NE=logits_NE,
            shares_NE=shares_NE / (shares_NE.sum(-1, keepdim=True) + 1e-20),
            highest_NK=scores_NE.detach().topk(config.n_expert_per_token, dim=-1).indices,
        )

    def _compute_logits(self, x_ND: Tensor, dtype: torch.dtype) -> Tensor:
        exact = torch.promote_types(torch.promote_types(x_ND.dtype, self.weight.dtype), dtype)
        with torch.autocast(x_ND.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(exact)
            return F.linear(x_ND.to(exact), self.weight.to(exact), bias)

    def _select_experts(self, scores_NE: Tensor) -> Tensor:
        """The K experts with the highest scores, within the best groups if the model limits groups."""
        if self.correction is not None:
            scores_NE = scores_NE + self.correction.to(scores_NE.device)  # which may be in host memory
        if (self.config.n_expert_groups or 1) > 1:
            scores_NE = scores_NE.masked_fill(~self._mask_groups(scores_NE), float("-inf"))
        return scores_NE.topk(self.config.n_expert_per_token, dim=-1).indices

    def _mask_groups(self, scores_NE: Tensor) -> Tensor:
        """True for experts of the groups with the highest sum of their best scores (DeepSeek-V2, section 2.2.2)."""
        config = self.config
        groups, topk, best = config.n_expert_groups, config.n_topk_groups, config.n_topk_scores_per_group
        assert groups is not None and topk is not None and best is not None
        scores_NGe = scores_NE.unflatten(1, (groups, -1))
        selected_Ng = scores_NGe.topk(best, dim=-1).values.sum(-1).topk(topk, dim=-1).indices
        mask_NG = torch.zeros(scores_NGe.shape[:2], dtype=torch.bool, device=scores_NE.device)
        return mask_NG.scatter(1, selected_Ng, True).repeat_interleave(scores_NGe.shape[2], dim=1)


class Experts(nn.Module):
    """The gated feed-forward layers of one MoE block, stacked; (R, D) -> (R, D)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        experts, width, inner = config.n_expert, config.n_embd, config.expert_size
        self.gate, self.up = uniform_parameter(experts, inner, width), uniform_parameter(experts, inner, width)
        self.down = uniform_parameter(experts, width, inner)
        has_bias = config.expert_bias or has_mlp_bias(config)
        self.gate_bias = nn.Parameter(torch.zeros(experts, inner)) if has_bias else None
        self.up_bias = nn.Parameter(torch.zeros(experts, inner)) if has_bias else None
        self.down_bias = nn.Parameter(torch.zeros(experts, width)) if has_bias else None
        self.gating = build_gating(config)

    def forward(self, x_RD: Tensor, ends_E: Tensor, weights_R: Tensor | None = None) -> Tensor:
        """Apply to each row its expert.

        Args:
            x_RD: rows sorted by expert.
            ends_E: end of each expert's rows, int32.
            weights_R: factors of the outputs, (R, 1); applied before `down`, where rows are narrower.
        """
        inner_RI = self.gating(*self.project(x_RD, ends_E))
        if weights_R is None:
            return self.apply_matrix("down", inner_RI, ends_E)
        y_RD = self.apply_matrix("down", inner_RI * weights_R.to(inner_RI.dtype), ends_E, add_bias=False)
        if self.down_bias is None:
            return y_RD
        return y_RD + select_bias(self.down_bias, y_RD, ends_E) * weights_R.to(y_RD.dtype)

    def apply_matrix(self, name: str, x_RD: Tensor, ends_E: Tensor, *, add_bias: bool = True) -> Tensor:
        """x W^T + b with the matrix `name` (gate, up or down) of each row's expert, (R, O)."""
        bias_EO = getattr(self, f"{name}_bias") if add_bias else None
        return grouped_linear(x_RD, getattr(self, name), bias_EO, ends_E)

    def project(self, x_RD: Tensor, ends_E: Tensor) -> Sequence[Tensor]:
        """Gate and up projections, both (R, I)."""
        weights, biases = (self.gate, self.up), (self.gate_bias, self.up_bias)
        if not share_product(x_RD, weights):
            return [self.apply_matrix(name, x_RD, ends_E) for name in ("gate", "up")]
        present: list[Tensor] = [bias_EI for bias_EI in biases if bias_EI is not None]
        bias_EO = torch.cat(present, 1) if present else None
        fused_RO = grouped_linear(x_RD, torch.cat(weights, 1), bias_EO, ends_E)
        return [half_RI.contiguous() for half_RI in fused_RO.chunk(2, -1)]  # kernels are slow with narrow rows


def share_product(x_RD: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether matrices (E, O, D) are copied to one, for one product.

    It is faster on a CPU, for narrow experts of many rows: the copy is then smaller than x.
    """
    return x_RD.device.type == "cpu" and sum(weight[..., 0].numel() for weight in weights) < len(x_RD)


def uniform_parameter(*shape: int) -> nn.Parameter:
    """A parameter initialized like `nn.Linear`: uniform within 1 / sqrt(inputs)."""
    bound = shape[-1] ** -0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def grouped_linear(x_RD: Tensor, weight_EOD: Tensor, bias_EO: Tensor | None, ends_E: Tensor) -> Tensor:
    """x W^T + b with W and b of each row's expert, (R, O); in autocast's dtype if enabled."""
    kind = x_RD.device.type
    if torch.is_autocast_enabled(kind):
        x_RD, weight_EOD = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (x_RD, weight_EOD))
    multiply = F.grouped_mm if x_RD.dtype == torch.bfloat16 and is_aligned(x_RD, weight_EOD) else grouped_mm_any_dtype
    y_RO = multiply(x_RD.contiguous(), weight_EOD.contiguous().mT, offs=ends_E)
    return y_RO if bias_EO is None else y_RO + select_bias(bias_EO, y_RO, ends_E)


def select_bias(bias_EO: Tensor, y_RO: Tensor, ends_E: Tensor) -> Tensor:
    """The bias of each row's expert, (R, O)."""
    return bias_EO.to(y_RO.dtype).index_select(0, expert_of_rows(ends_E, len(y_RO)))


def is_aligned(x_RD: Tensor, weight_EOD: Tensor) -> bool:
    """Whether rows are multiples of 16 bytes, as the kernels of `F.grouped_mm` require."""
    return all(size * x_RD.element_size() % 16 == 0 for size in weight_EOD.shape[1:])


@uncompiled  # torch 2.14 compiles grouped products of bfloat16 only
def grouped_mm_any_dtype(x_RD: Tensor, weight_EDO: Tensor, *, offs: Tensor) -> Tensor:
    """`F.grouped_mm` for any floating-point dtype and size."""
    is_supported = x_RD.dtype != torch.float64 and is_aligned(x_RD, weight_EDO)
    return (F.grouped_mm if is_supported else padded_mm)(x_RD, weight_EDO, offs=offs)


def padded_mm(x_RD: Tensor, weight_EDO: Tensor, *, offs: Tensor) -> Tensor:
    """`F.grouped_mm` for dtypes and sizes that it does not support, by padding every group to the longest."""
    expert_R = expert_of_rows(offs, len(x_RD))
    starts_E = F.pad(offs, (1, 0))[:-1]
    index_R = torch.arange(len(x_RD), device=x_RD.device) - starts_E[expert_R]
    padded = x_RD.new_zeros(len(offs), int((offs - starts_E).max()), x_RD.shape[1])
    return (padded.index_put((expert_R, index_R), x_RD) @ weight_EDO)[expert_R, index_R]


def expert_of_rows(ends_E: Tensor, rows: int) -> Tensor:
    """The expert of each row, (R,)."""
    return torch.searchsorted(ends_E, torch.arange(rows, device=ends_E.device, dtype=ends_E.dtype), right=True)
