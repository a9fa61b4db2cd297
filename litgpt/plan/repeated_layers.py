"""Plan a run with a few of its layers, and extrapolate to all of them, which are alike."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import lcm
from typing import Any, NamedTuple

from litgpt.model.config import Config
from litgpt.parallel.schedules import split_layers
from litgpt.plan.ranks import RunPlan, plan_run
from litgpt.plan.table import compute_largest
from litgpt.recipe.gpu import Gpu
from litgpt.recipe.training import Training
from litgpt.train.run_spec import RunSpec


class Estimate(NamedTuple):
    """What a run needs.

    Attributes:
        memory: GiB of the rank that needs the most, with the allowance.
        seconds: of a step.
    """

    memory: float
    seconds: float


def find_repetition(kinds: Sequence[Any]) -> tuple[int, int]:
    """The number of layers before those that repeat, and the number of layers that are repeated.

    Args:
        kinds: of layers, in order.

    Returns:
        The pair of the smallest sum; (0, n) if nothing is repeated.
    """
    layers = len(kinds)
    for total in range(1, layers):
        for period in range(total, 0, -1):
            first = total - period
            is_repeated = all(kinds[layer] == kinds[layer - period] for layer in range(first + period, layers))
            if is_repeated and (layers - first) % period == 0:
                return first, period
    return 0, layers


def describe_layers(config: Config) -> list[tuple[bool, bool]]:
    """What makes the layers of a model different: a window of attention, and experts."""
    return [(config.is_local(layer), config.has_experts(layer)) for layer in range(config.n_layer)]


def estimate_run(recipe: Training, spec: RunSpec, gpu: Gpu) -> Estimate:
    """What a run needs.

    Raises:
        UserError: as `plan_run`.
    """
    return Estimate(*extrapolate(recipe, spec, read_plan, gpu))


def extrapolate(
    recipe: Training, spec: RunSpec, read: Callable[[RunPlan], Sequence[float]], gpu: Gpu | None = None
) -> list[float]:
    """What is read in the plan of a run, from plans of models with few layers if that of the whole model follows.

    It grows by as much with each repetition of layers. The stages of a pipeline are taken to be as long as the longest
    one.

    Args:
        read: the values of a plan.
        gpu: on which the time is estimated.

    Raises:
        UserError: as `plan_run`.
    """
    first, period = find_repetition(describe_layers(spec.config))
    stages = len(split_layers(recipe.parallel, spec.config.n_layer)) if recipe.parallel.pipeline > 1 else 1
    settings = recipe.recompute
    is_uneven = isinstance(recipe.parallel.pipeline_layers, list) or (stages > 1 and first + period > 1)
    if settings.granularity == "full" and settings.method == "uniform" and settings.num_layers > 1:
        is_uneven |= first > 0  # segments of a short model would begin at other layers
        period = lcm(period, settings.num_layers)
    repetitions = -(-(spec.config.n_layer - first) // (period * stages))
    others = first + repetitions * period - settings.num_layers
    is_partial = settings.method == "block" and others > 0
    is_uneven |= is_partial and (first + period > 1 or others == 1)

    def read_layers(layers: int, recomputed: int = settings.num_layers) -> Sequence[float]:
        changed = replace(recipe, recompute=replace(settings, num_layers=recomputed))
        return read(plan_run(*keep_layers(changed, spec, stages, layers), gpu))

    if repetitions <= 2 or is_uneven:
        return list(read(plan_run(recipe, spec, gpu)))
    if is_partial:  # with one other layer, the largest memory is still elsewhere
        longer = [(read_layers(4, 2), settings.num_layers - 1), (read_layers(4, 1), others - 2)]
        return add_layers(read_layers(3, 1), longer)
    return add_layers(read_layers(first + period), [(read_layers(first + 2 * period), repetitions - 1)])


def add_layers(short: Sequence[float], longer: Sequence[tuple[Sequence[float], int]]) -> list[float]:
    """The values of a model that contains what longer ones have more than a short one, a number of times each."""
    values = list(short)
    for long, times in longer:
        values = [value + times * (more - few) for value, more, few in zip(values, long, short, strict=True)]
    return values


def keep_layers(recipe: Training, spec: RunSpec, stages: int, layers: int) -> tuple[Training, RunSpec]:
    """A recipe and its spec with a number of layers, of each stage if there are several."""
    spec = replace(spec, config=replace(spec.config, n_layer=layers * stages))
    if stages > 1:
        recipe = replace(recipe, parallel=replace(recipe.parallel, pipeline_layers=[layers] * stages))
    return recipe, spec


def read_plan(plan: RunPlan) -> Estimate:
    """The largest memory and the time of a plan."""
    assert plan.time is not None
    return Estimate(compute_largest(plan), plan.time.seconds)
