"""Add the gradients of more micro-batches to those of a step, as parts of a mean over all of them."""

from collections.abc import Sequence

from torch import Tensor

from litgpt.data.stream.batch import Batch
from litgpt.errors import UserError
from litgpt.model.tower_flops import EncodedMedia
from litgpt.train.objective import Objective
from litgpt.train.step import StepGradients, add_gradients
from litgpt.train.train_state import TrainState

CURE = "give all micro-batches of a step in one call"


def add_to_gradients(
    train_state: TrainState,
    earlier: StepGradients,
    earlier_objective: Objective,
    batches: Sequence[Batch],
    objective: Objective,
) -> tuple[StepGradients, StepGradients]:
    """Add the gradients of micro-batches to earlier ones, each weighted by its share of the counts of both.

    Returns:
        What the gradients on the parameters are of then, and what the added ones are of.

    Raises:
        UserError: if a part of the gradients has a divisor of its own.
    """
    if train_state.routers is not None:
        raise UserError(f"forward_backward: the routers of experts are trained by whole steps; {CURE}")
    if objective.terms > 1 or earlier_objective.terms > 1:
        raise UserError(f"forward_backward: the loss has several terms with divisors of their own; {CURE}")
    # copies, because DDP's gradients are parts of its buffers; and only new ones are reduced over ranks
    parameters = train_state.parameters()
    kept = [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]
    train_state.zero_grad()
    new = add_gradients(train_state, batches, objective)
    total = earlier.counts[0] + new.counts[0]
    shares = [max(part.counts[0], 1) / max(total, 1) for part in (earlier, new)]
    for parameter, gradient in zip(parameters, kept, strict=True):
        parameter.grad = add_scaled(gradient, shares[0], parameter.grad, shares[1])
    joined = StepGradients(
        earlier.loss * shares[0] + new.loss * shares[1],
        earlier.metric_sums + new.metric_sums if earlier_objective.metrics == objective.metrics else new.metric_sums,
        (total,),
        earlier.targets + new.targets,
        earlier.tokens + new.tokens,
        EncodedMedia(*map(sum, zip(earlier.media, new.media, strict=True))),
    )
    return joined, new


def add_scaled(first: Tensor | None, factor: float, second: Tensor | None, other: float) -> Tensor | None:
    """The sum of two gradients with factors, which it may change; None for zeros."""
    if first is None or second is None:
        return first.mul_(factor) if first is not None else second.mul_(other) if second is not None else None
    return second.mul_(other).add_(first, alpha=factor)
