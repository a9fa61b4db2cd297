"""Muon (Jordan et al. 2024): momentum whose updates are orthogonalized, for matrices and stacks, also sharded."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn

from litgpt.parallel.exchange import get_local_tensor
from litgpt.parallel.full_matrices import batch_matrices, map_full_matrices
from litgpt.recipe.optimizer import Muon

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration (https://kellerjordan.github.io/posts/muon)."""
GROUP_SETTINGS = ("lr", "momentum", "nesterov", "weight_decay", "ns_steps", "adjust_lr_fn")


class StackedMuon(torch.optim.Optimizer):
    """Muon on matrices (M, N) and stacks of them (E, M, N), each of which is orthogonalized.

    A sharded matrix is orthogonalized in full, by one of the ranks that have a shard of it.

    Args:
        params: matrices and stacks.
    """

    def __init__(self, params: Iterable[nn.Parameter], settings: Muon) -> None:
        super().__init__(params, {name: value for name, value in asdict(settings).items() if name in GROUP_SETTINGS})

    @torch.no_grad()
    def step(self, _closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            orthogonalize_stack = partial(orthogonalize, steps=group["ns_steps"])
            for indices in batch_matrices(parameters):
                batch = [parameters[index] for index in indices]
                momenta = [
                    self._update_momentum(parameter, group["momentum"], group["nesterov"]) for parameter in batch
                ]
                updates = map_full_matrices(orthogonalize_stack, batch, momenta)
                lr = adjust_learning_rate(group["lr"], group["adjust_lr_fn"], batch[0].shape)
                for parameter, update in zip(batch, updates, strict=True):
                    weight = get_local_tensor(parameter)
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-lr)

    def _update_momentum(self, parameter: nn.Parameter, momentum: float, nesterov: bool) -> Tensor:
        """Update the momentum of a matrix; returns this rank's shard of what is to be orthogonalized, in bfloat16."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        buffer, gradient = get_local_tensor(state["momentum_buffer"]), get_local_tensor(parameter.grad)
        buffer.lerp_(gradient, 1 - momentum)
        return (gradient.lerp(buffer, momentum) if nesterov else buffer).bfloat16()


def orthogonalize(matrices_BMN: Tensor, steps: int) -> Tensor:
    """Replace the singular values of matrices by values near 1, by Newton-Schulz iterations in bfloat16.

    Args:
        steps: number of iterations.
    """
    is_tall = matrices_BMN.shape[-2] > matrices_BMN.shape[-1]
    x = matrices_BMN.mT if is_tall else matrices_BMN
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    first, third, fifth = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth)
        x = torch.baddbmm(x, polynomial, x, beta=first)
    return x.mT if is_tall else x


def adjust_learning_rate(lr: float, adjustment: str | None, shape: torch.Size) -> float:
    """The learning rate of a matrix: Jordan et al. 2024, or for the RMS of AdamW (arXiv 2502.16982, section 2.2)."""
    rows, columns = shape[-2:]
    if adjustment == "match_rms_adamw":
        return lr * 0.2 * max(rows, columns) ** 0.5
    return lr * max(1.0, rows / columns) ** 0.5
