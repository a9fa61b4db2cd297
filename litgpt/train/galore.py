"""GaLore: AdamW with moments in a low-rank subspace of the gradients (Zhao et al. 2024, arXiv 2403.03507)."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.parallel.apply import full_tensor
from litgpt.parallel.galore_layout import distribute_basis, distribute_like, reduce_partial
from litgpt.recipe.optimizer import GaLore

BASES = ("left", "right")


class LowRankAdamW(torch.optim.Optimizer):
    """AdamW on R = P^T G, R = G Q or R = P^T G Q (algorithm 2), whose update is projected back by P and Q.

    P (..., M, R) and Q (..., N, R) are the first R singular vectors of the gradient G (..., M, N), computed again every
    `update_proj_gap` steps; the moments, in the shape of R, are kept. Weight decay applies to the whole matrix. In a
    stack of matrices, each matrix has its own bases. Sharded gradients are gathered to compute the bases.

    Args:
        params: matrices, both sides of which are longer than `settings.rank`.
    """

    def __init__(self, params: Iterable[nn.Parameter], settings: GaLore) -> None:
        super().__init__(params, asdict(settings))

    @torch.no_grad()
    def step(self, _closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, self.state[parameter], group)

    def _step(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if state.get("step", 0) % group["update_proj_gap"] == 0:
            state.update(compute_bases(gradient, group["rank"], group["proj_type"]))
        for key in [key for key in BASES if key in state]:
            # a loaded checkpoint has full tensors
            state[key] = distribute_basis(gradient, state[key], left=key == "left")
        low_rank = project(gradient, state)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = distribute_like(state[key], low_rank) if key in state else torch.zeros_like(low_rank)
        state["step"] = step = state.get("step", 0) + 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(low_rank, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(low_rank, low_rank, value=1 - beta2)
        denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        update = project_back(state["exp_avg"] / denominator, state)
        parameter.add_(update, alpha=-group["lr"] * group["scale"] / (1 - beta1**step))


def compute_bases(gradient: Tensor, rank: int, proj_type: str) -> dict[str, Tensor]:
    """The first `rank` singular vectors on the sides to shorten, as full tensors.

    Args:
        proj_type: std shortens the shorter side ("right" if M >= N, else "left"), reverse_std the longer, full both.
    """
    rows, columns = gradient.shape[-2:]
    shorter, longer = ("right", "left") if rows >= columns else ("left", "right")
    sides = {"std": (shorter,), "reverse_std": (longer,), "full": BASES}.get(proj_type, (proj_type,))
    full = full_tensor(gradient)
    left, _, right = torch.linalg.svd(full.to(torch.promote_types(full.dtype, torch.float32)), full_matrices=False)
    vectors = {"left": left[..., :rank], "right": right[..., :rank, :].mT}
    return {side: vectors[side].to(full.dtype).contiguous() for side in sides}


def project(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    """Project a gradient into the subspace of the bases."""
    if "left" in state:
        gradient = reduce_partial(state["left"].mT @ gradient)
    return reduce_partial(gradient @ state["right"]) if "right" in state else gradient


def project_back(update: Tensor, state: dict[str, Any]) -> Tensor:
    """Project an update in the subspace back to the shape of the matrix."""
    if "right" in state:
        update = update @ state["right"].mT
    return state["left"] @ update if "left" in state else update
