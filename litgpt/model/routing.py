"""Routing in training: losses that balance the load of experts, limits of their capacity, and statistics.

Axes: B batch, P tokens of this rank, N = B P, E experts, K experts per token, G groups of tokens whose loads are
balanced.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

AUX_LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")
"""Kinds of balance losses: of the tokens of a micro-batch, of each row, and of the global batch up to a micro-batch."""
STATISTICS = ("dropped", "entropy", "aux_loss", "z_loss")
"""What is recorded of each layer besides the load of its experts, as sums over tokens."""
SINKHORN_TOLERANCE, SINKHORN_ITERATIONS = 1e-4, 100


class RoutingSettings(Protocol):
    """How routers are trained, as in the group `moe` of a recipe."""

    @property
    def router_load_balancing_type(self) -> str:
        """One of `aux_loss`, `seq_aux_loss`, `global_aux_loss`, `sinkhorn`, `none`."""

    @property
    def aux_loss_coeff(self) -> float:
        """Factor of the balance loss."""

    @property
    def z_loss_coeff(self) -> float:
        """Factor of the z-loss."""

    @property
    def expert_capacity_factor(self) -> float | None:
        """Capacity of an expert, in tokens per its share of all; None for no limit."""

    @property
    def token_drop_policy(self) -> str:
        """Which tokens an expert keeps: those of the highest weights (`probs`) or the first ones (`position`)."""

    @property
    def pad_expert_input_to_capacity(self) -> bool:
        """Whether the rows of every expert are padded to its capacity."""

    @property
    def router_dtype(self) -> str:
        """Least precision of routers, `fp32` or `fp64`."""


def detach(values: Tensor) -> Tensor:
    """The sum of a single rank."""
    return values.detach()


class Routing:
    """How the routers of one forward pass in training work, and what they record.

    A pass of the same micro-batch that recomputes activations finds the records of the first one, and adds nothing.

    Attributes:
        rows: of the micro-batch, B.
        scale: factor of a loss that is summed over tokens: the loss scale over the tokens of the global batch.
        is_token_BP: False for padding; None without padding.
        earlier: that of the micro-batch before in the same optimizer step; None for the first.
        sum_over_batch: the sum of counts over the ranks that share the tokens of the micro-batch.
        sum_over_ranks: the sum of counts over all ranks that have tokens of the global batch.
        loads: counts (G, E) of each layer, to which its balance loss is proportional.
        records: (E + 4) of each layer: the load of each expert on this rank, and `STATISTICS`.
    """

    def __init__(
        self,
        settings: RoutingSettings,
        rows: int,
        scale: float,
        is_token_BP: Tensor | None = None,
        earlier: "Routing | None" = None,
        sum_over_batch: Callable[[Tensor], Tensor] = detach,
        sum_over_ranks: Callable[[Tensor], Tensor] = detach,
        records: dict[int, Tensor] | None = None,
    ) -> None:
        # no dataclass, of which FSDP2 would give each block a copy with its inputs cast, and lose what that records
        self.settings, self.rows, self.scale = settings, rows, scale
        self.is_token_BP, self.earlier = is_token_BP, earlier
        self.sum_over_batch, self.sum_over_ranks = sum_over_batch, sum_over_ranks
        self.loads: dict[int, Tensor] = {}
        self.records = {} if records is None else records

    @property
    def dtype(self) -> torch.dtype:
        """The least precision of routers."""
        return torch.float64 if self.settings.router_dtype == "fp64" else torch.float32

    def assign_evenly(self, logits_NE: Tensor) -> Tensor:
        """The probabilities (N, E) scaled by expert so that all experts get as much, by Sinkhorn's iteration.

        Tokens select by these (Clark et al. 2022, section 4.1), while their weights come from the scores.
        """
        shares_NE = self._mask_padding(logits_NE.detach().softmax(-1))
        tokens = self.sum_over_batch(shares_NE.sum())
        factors_E = torch.ones_like(shares_NE[0])
        for _ in range(SINKHORN_ITERATIONS):
            totals_N = (shares_NE * factors_E).sum(1, keepdim=True)
            received_E = self.sum_over_batch((shares_NE / (totals_N + 1e-8)).sum(0))
            before_E, factors_E = factors_E, tokens / (shares_NE.shape[1] * received_E + 1e-8)
            if (factors_E - before_E).abs().mean() <= SINKHORN_TOLERANCE:
                break
        return shares_NE * factors_E

    def train(
        self,
        layer: int,
        weights_NK: Tensor,
        experts_NK: Tensor,
        *,
        logits_NE: Tensor,
        shares_NE: Tensor,
        highest_NK: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Add the gradients of the losses to those of the weights, limit the capacity of experts, and record.

        Args:
            weights_NK: of the selected experts.
            experts_NK: the selected experts.
            logits_NE: the outputs of the router.
            shares_NE: its scores, scaled to a sum of 1 for each token.
            highest_NK: the experts with the highest scores, regardless of correction and groups.

        Returns:
            the weights, and the experts with the number E in place of those that drop the token.
        """
        aux_loss = self._compute_aux_loss(layer, shares_NE, highest_NK)
        z_loss = self._mask_padding(logits_NE.logsumexp(-1).square()).sum()
        for coefficient, loss in ((self.settings.aux_loss_coeff, aux_loss), (self.settings.z_loss_coeff, z_loss)):
            if coefficient:
                weights_NK = AddLoss.apply(weights_NK, coefficient * loss * self.scale)
        experts = shares_NE.shape[1]
        kept_NK = self._drop_tokens(experts_NK, weights_NK.detach(), experts)
        if layer not in self.records:
            with torch.no_grad():
                load_E = self._mark(experts_NK, shares_NE).sum(0)
                dropped = load_E.sum() - self._mask_padding((kept_NK < experts).to(load_E.dtype)).sum()
                entropy = self._mask_padding(torch.special.entr(shares_NE).sum(-1)).sum()
                self.records[layer] = torch.cat([load_E, torch.stack([dropped, entropy, aux_loss, z_loss])])
        return weights_NK, kept_NK

    def _compute_aux_loss(self, layer: int, shares_NE: Tensor, highest_NK: Tensor) -> Tensor:
        """The balance loss, times the tokens of its group, summed over groups; zero for none.

        That of a group of T tokens, of which the experts get n_e, is E / (K T^2) sum_e n_e sum_t s_te (Fedus et al.
        2022, section 2.2). It does not depend on the cut of the group, whose n_e are summed over ranks.
        """
        kind = self.settings.router_load_balancing_type
        if not self.settings.aux_loss_coeff or kind not in AUX_LOSSES:
            return shares_NE.new_zeros(())
        groups = self.rows if kind == "seq_aux_loss" else 1
        shares_GE = self._mask_padding(shares_NE).unflatten(0, (groups, -1)).sum(1)
        if layer not in self.loads:
            load_GE = self._mark(highest_NK, shares_NE).unflatten(0, (groups, -1)).sum(1)
            if kind != "global_aux_loss":
                load_GE = self.sum_over_batch(load_GE)
            else:
                load_GE = self.sum_over_ranks(load_GE) + (0 if self.earlier is None else self.earlier.loads[layer])
            self.loads[layer] = load_GE
        load_GE = self.loads[layer]
        return (load_GE * shares_GE / load_GE.sum(1, keepdim=True).clamp(min=1)).sum() * shares_GE.shape[1]

    def _drop_tokens(self, experts_NK: Tensor, weights_NK: Tensor, experts: int) -> Tensor:
        """The experts of each token, with the number E in place of those that drop the token; padding is dropped."""
        capacity = self.compute_capacity(experts_NK, experts)
        if capacity is None:
            return experts_NK
        if self.is_token_BP is not None:
            experts_NK = experts_NK.masked_fill(~self.is_token_BP.reshape(-1, 1), experts)
        order_R = torch.arange(experts_NK.numel(), device=experts_NK.device)
        if self.settings.token_drop_policy == "probs":
            order_R = weights_NK.flatten().sort(descending=True, stable=True).indices
        expert_R, by_expert = experts_NK.flatten()[order_R].sort(stable=True)
        place_R = torch.arange(len(expert_R), device=expert_R.device) - torch.searchsorted(expert_R, expert_R)
        kept_R = expert_R.masked_fill(place_R >= capacity, experts)
        return torch.empty_like(kept_R).scatter(0, order_R[by_expert], kept_R).view_as(experts_NK)

    def compute_capacity(self, experts_NK: Tensor, experts: int) -> int | None:
        """The most tokens of this rank that an expert keeps: its share of all, times the factor; None for no limit."""
        factor = self.settings.expert_capacity_factor
        return None if factor is None else math.ceil(experts_NK.numel() / experts * factor)

    def _mark(self, experts_NK: Tensor, shares_NE: Tensor) -> Tensor:
        """(N, E), 1 for the experts of each token, 0 for others and at padding."""
        return self._mask_padding(torch.zeros_like(shares_NE).scatter(1, experts_NK, 1.0))

    def _mask_padding(self, values: Tensor) -> Tensor:
        """Values (N, ...) with 0 at padding."""
        if self.is_token_BP is None:
            return values
        return values * self.is_token_BP.reshape(-1, *(1 for _ in values.shape[1:]))


class AddLoss(torch.autograd.Function):
    """Identity whose backward adds the gradient of a loss, so that the losses of all layers need no path of their own.

    It takes part wherever the backward of `x` does, also in a pipeline stage that has no loss.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_options = {"dtype": loss.dtype, "device": loss.device}
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), **ctx.loss_options)
