"""The layouts of a run on a number of GPUs: settings of parallelism, recomputation, the loss and the micro-batch."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.parallel.schedules import SCHEDULES, split_layers
from litgpt.plan.ranks import resolve_run
from litgpt.plan.repeated_layers import describe_layers, find_repetition
from litgpt.recipe.parallel import AXIS_OF, ParallelArgs, ParallelDims
from litgpt.recipe.recompute import RecomputeArgs, RecomputePart
from litgpt.recipe.train import LossArgs
from litgpt.recipe.training import Training
from litgpt.train.run_spec import RunSpec

GPUS_PER_NODE = 8
LARGEST_DEGREE = 8  # stages of a pipeline, parts of a row, and rows of a micro-batch
PARTS_RECOMPUTED = (0.25, 0.5, 0.75)  # of the layers of a stage
DEGREES = ("tensor", "context", "pipeline", "data_replicate", "expert")


class Recomputation(NamedTuple):
    """Settings of `recompute`, and what they are guessed to need.

    Attributes:
        kept: bytes per token, width and layer between forward and backward (Korthikanti et al. 2022, without scores).
        work: products by those without recomputation.
        segment: layers whose activations are computed again at a time.
    """

    settings: RecomputeArgs
    kept: float
    work: float
    segment: int = 1

    @property
    def passes(self) -> float:
        """How often a layer's products exchange tensors, by how often they do in a forward pass."""
        return 2 + 3 * (self.work - 1) * (self.settings.granularity == "full")


KEPT, KEPT_RECOMPUTED = 34, 2
FEED_FORWARD: dict[tuple[bool, ...], list[RecomputePart]] = {
    (False,): ["mlp"],
    (True,): ["moe"],
    (False, True): ["mlp", "moe"],
}
"""The parts of `recompute.modules` for feed-forward layers, by whether layers have experts."""


@dataclass(frozen=True)
class LayoutOption:
    """Settings of a layout.

    Attributes:
        given: the recipe that is searched.
        base: the same with the settings of parallelism and the micro-batch.
        dims: its ranks along each axis.
        length: tokens per row.
    """

    given: Training
    base: Training
    recompute: Recomputation
    loss: LossArgs
    dims: ParallelDims
    length: int

    @cached_property
    def recipe(self) -> Training:
        """The recipe with all settings."""
        return replace(self.base, recompute=self.recompute.settings, loss=self.loss)

    @cached_property
    def axes(self) -> dict[str, Any]:
        """The settings of `parallel` that have an effect."""
        parallel, dims = self.base.parallel, self.dims
        axes = {name: degree for name in DEGREES if (degree := getattr(parallel, name)) > 1}
        axes |= {"data_shard": dims.data_shard} | ({} if parallel.zero is None else {"zero": parallel.zero})
        names = ("sequence", "pipeline_schedule", "context_method", "expert_dispatch")
        changed = list_other_fields(parallel, ParallelArgs())
        return axes | {name: changed[name] for name in names if name in changed}

    def describe(self) -> str:
        """Describe the settings in a line."""
        axes = [f"{name} {str(value).lower()}" for name, value in self.axes.items()]
        micro, loss = self.base.train.micro_batch_size, self.loss.impl
        losses = [] if loss == self.given.loss.impl else [f"{loss} loss"]
        return ", ".join(
            [*axes, f"recompute {describe_recomputation(self.recompute)}", *losses, f"micro-batch {micro}"]
        )

    def as_tree(self) -> dict[str, Any]:
        """The settings as a part of a recipe, to be given after that without them."""
        given, recompute = self.given, self.recompute.settings
        changes = list_other_fields(recompute, given.recompute) | list_other_fields(recompute, RecomputeArgs())
        tree = {
            **{"devices": self.base.devices, "num_nodes": self.base.num_nodes},
            "parallel": list_other_fields(self.base.parallel, given.parallel) | self.axes,
            "recompute": {"granularity": recompute.granularity} | changes,
            "loss": list_other_fields(self.loss, given.loss),
            "train": {"micro_batch_size": self.base.train.micro_batch_size},
        }
        return {name: value for name, value in tree.items() if value != {}}


def list_other_fields(settings: Any, given: Any) -> dict[str, Any]:
    """The fields of settings that differ from those of others."""
    pairs = {field.name: (getattr(settings, field.name), getattr(given, field.name)) for field in fields(settings)}
    return {name: value for name, (value, other) in pairs.items() if value != other}


def describe_recomputation(recompute: Recomputation) -> str:
    """Describe what is recomputed in a few words."""
    settings = recompute.settings
    if settings.granularity == "selective":
        return " and ".join(settings.modules)
    if settings.method == "block":
        return f"{settings.num_layers} layers of a stage"
    return settings.granularity + (f" by {settings.num_layers} layers" if settings.num_layers > 1 else "")


def split_gpus(gpus: int) -> tuple[int, int]:
    """The GPUs of each node, and the number of nodes.

    Raises:
        UserError: if they do not make whole nodes.
    """
    if gpus > GPUS_PER_NODE and gpus % GPUS_PER_NODE:
        nearest = gpus // GPUS_PER_NODE * GPUS_PER_NODE
        raise UserError(f"gpus: {gpus} is not a multiple of the {GPUS_PER_NODE} GPUs of a node; set {nearest}")
    return min(gpus, GPUS_PER_NODE), max(1, gpus // GPUS_PER_NODE)


def list_legal_layouts(recipe: Training, spec: RunSpec, gpus: int, refused: Counter[str]) -> Iterator[LayoutOption]:
    """List the layouts that the recipe's own checks allow; count the errors of the others."""
    devices, nodes = split_gpus(gpus)
    losses = [replace(recipe.loss, impl=impl) for impl in dict.fromkeys(("chunked", recipe.loss.impl))]
    for parallel in list_parallel_settings(spec.config, devices, nodes):
        is_split = parallel["context"] > 1  # rows of a larger micro-batch need not be
        for micro in (1,) if is_split else (1, 2, 4, LARGEST_DEGREE):
            if micro > recipe.train.global_batch_size:
                continue
            try:
                settings = reset_parallel(recipe.parallel, parallel)
                train = replace(recipe.train, micro_batch_size=micro)
                base = replace(recipe, devices=devices, num_nodes=nodes, parallel=settings, train=train)
                length, dims = resolve_run(base, spec)
            except UserError as error:
                refused[str(error)] += 1
                continue
            for recompute, loss in product(list_recomputation(base, spec.config), losses):
                yield LayoutOption(recipe, base, recompute, loss, dims, length)


def reset_parallel(given: ParallelArgs, changes: dict[str, Any]) -> ParallelArgs:
    """The settings of parallelism with other degrees, and without what has no effect with these."""
    defaults, kept = ParallelArgs(), ("context_method", "expert_dispatch")
    names = [*DEGREES, "data_shard", "zero", "reshard_after_forward", "expert_tensor", "pipeline_layers", "sequence"]
    names += ["pipeline_schedule", *(name for name in kept if changes.get(AXIS_OF[name], 1) == 1)]
    return replace(given, **({name: getattr(defaults, name) for name in names} | changes))


def list_parallel_settings(config: Config, devices: int, nodes: int) -> Iterator[dict[str, Any]]:
    """List settings of parallelism, legal or not."""
    gpus = devices * nodes
    degrees = [
        list_divisors(devices),
        list_divisors(min(devices, LARGEST_DEGREE)),
        list_divisors(gpus),
        sorted({1, nodes}),
    ]
    for tensor, context, pipeline, replicate in product(*degrees):
        rest, remainder = divmod(gpus, tensor * context * pipeline * replicate)
        if remainder or pipeline > LARGEST_DEGREE:
            continue
        axes = {"tensor": tensor, "context": context, "pipeline": pipeline, "data_replicate": replicate}
        choices: dict[str, Sequence[Any]] = {
            "expert": [n for n in list_divisors(rest * context * tensor) if n <= max(1, config.n_expert)],
            "zero": [None] if rest * context == 1 else [1, 3] if pipeline > 1 else [2, 3],
            "pipeline_schedule": list(SCHEDULES) if pipeline > 1 else ["1f1b"],
            "sequence": [True, False] if tensor > 1 else [True],
        }
        for values in product(*choices.values()):
            yield {"data_shard": rest} | axes | dict(zip(choices, values, strict=True))


def list_recomputation(recipe: Training, config: Config) -> Iterator[Recomputation]:
    """List what can be recomputed of a layout."""
    given = recipe.recompute
    plain = RecomputeArgs(offload=given.offload)
    has_experts = tuple(sorted({config.has_experts(layer) for layer in range(config.n_layer)}))
    selective = [
        Recomputation(replace(plain, granularity="selective", modules=["norms", "activation"]), 26, 1.02),
        Recomputation(replace(plain, granularity="selective", modules=FEED_FORWARD[has_experts]), 16, 1.15),
    ]
    if given.granularity == "selective" and given not in [option.settings for option in selective]:
        selective.append(Recomputation(given, 26, 1.05))
    full = replace(plain, granularity="full")
    yield from (Recomputation(plain, KEPT, 1), *selective, Recomputation(full, KEPT_RECOMPUTED, 4 / 3))
    stages = len(split_layers(recipe.parallel, config.n_layer)) if recipe.parallel.pipeline > 1 else 1
    layers = -(-config.n_layer // stages)
    if find_repetition(describe_layers(config)) != (0, 1) or layers < 4:  # whose plans do not follow from a few layers
        return
    for part in PARTS_RECOMPUTED:
        settings = replace(full, method="block", num_layers=round(part * layers))
        yield Recomputation(settings, KEPT + part * (KEPT_RECOMPUTED - KEPT), 1 + part / 3)
    yield Recomputation(replace(full, num_layers=2), KEPT_RECOMPUTED / 2, 4 / 3, segment=2)


def list_divisors(number: int) -> list[int]:
    """The divisors of a number, in order."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
