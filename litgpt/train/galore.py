"""GaLore: AdamW whose moments live in a subspace of each matrix's gradients (Zhao et al. 2024, arXiv 2403.03507)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.parallel.apply import full_tensor
from litgpt.parallel.galore_layout import distribute_basis, distribute_like, reduce_partial

BASES = ("left", "right")


class LowRankAdamW(torch.optim.Optimizer):
    """AdamW on R = P^T G, R = G Q or R = P^T G Q (algorithm 2), whose step is brought back to the matrix by P and Q.

    P (..., M, R) and Q (..., N, R) are the first R singular vectors of the gradient G (..., M, N), found anew every
    `update_proj_gap` steps; the moments, in the shape of R, go on. Weight decay acts on the whole matrix. Matrices may
    lie in stacks, of which each has bases of its own, and be sharded; then G is gathered whenever bases are found.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        rank: int,
        update_proj_gap: int,
        scale: float,
        proj_type: str,
    ) -> None:
        """Take matrices, each with both sides longer than `rank`.

        Args:
            scale: what the step is multiplied by, beside lr.
            proj_type: std shortens the shorter side (Q if M >= N, else P), reverse_std the longer, left is P, right
                is Q, full both.
        """
        settings = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **settings})

    @torch.no_grad()
    def step(self, _closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every matrix that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, self.state[parameter], group)

    def _step(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if state.get("step", 0) % group["update_proj_gap"] == 0:
            state.update(bases(gradient, group["rank"], group["proj_type"]))
        for key in [key for key in BASES if key in state]:
            # a checkpoint loads it whole
            state[key] = distribute_basis(gradient, state[key], left=key == "left")
        small = projected(gradient, state)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = distribute_like(state[key], small) if key in state else torch.zeros_like(small)
        state["step"] = step = state.get("step", 0) + 1
        first, second = group["betas"]
        state["exp_avg"].lerp_(small, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(small, small, value=1 - second)
        deviation = (state["exp_avg_sq"] / (1 - second**step)).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        move = brought_back(state["exp_avg"] / deviation, state)
        parameter.add_(move, alpha=-group["lr"] * group["scale"] / (1 - first**step))


def bases(gradient: Tensor, rank: int, proj_type: str) -> dict[str, Tensor]:
    """The first singular vectors on the sides that a type of projection shortens, whole, in the gradient's type."""
    rows, columns = gradient.shape[-2:]
    shorter, longer = ("right", "left") if rows >= columns else ("left", "right")
    sides = {"std": (shorter,), "reverse_std": (longer,), "full": BASES}.get(proj_type, (proj_type,))
    whole = full_tensor(gradient)
    exact = whole.to(torch.promote_types(whole.dtype, torch.float32))
    left, _, right = torch.linalg.svd(exact, full_matrices=False)
    vectors = {"left": left[..., :rank], "right": right[..., :rank, :].mT}
    return {side: vectors[side].to(whole.dtype).contiguous() for side in sides}


def projected(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    """A gradient in the subspace that the bases span."""
    small = gradient
    if "left" in state:
        small = reduce_partial(state["left"].mT @ small)
    if "right" in state:
        small = reduce_partial(small @ state["right"])
    return small


def brought_back(small: Tensor, state: dict[str, Any]) -> Tensor:
    """A step in the subspace as one of the whole matrix."""
    if "right" in state:
        small = small @ state["right"].mT
    return state["left"] @ small if "left" in state else small
