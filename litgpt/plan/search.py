"""Search the layouts of a run on a number of GPUs for the fastest ones that fit."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.flops import compute_training_flops
from litgpt.plan.ranks import resolve_run
from litgpt.plan.repeated_layers import Estimate, estimate_run
from litgpt.plan.step_time import Efficiencies
from litgpt.plan.table import GIB
from litgpt.recipe.gpu import Gpu
from litgpt.recipe.parallel import ParallelDims
from litgpt.recipe.recompute import RecomputeArgs
from litgpt.recipe.training import Training
from litgpt.train.run_spec import RunSpec

GPUS_PER_NODE = 8
PLANNED, WANTED = 12, 4  # at most so many layouts are planned, until so many fit
NO_GUESS = Estimate(0.0, 0.0)


class Recomputation(NamedTuple):
    """Settings of `recompute`, and what they are guessed to need.

    Attributes:
        kept: bytes per token, width and layer between forward and backward (Korthikanti et al. 2022, without scores).
        work: products by those without recomputation.
    """

    settings: dict[str, Any]
    kept: float
    work: float


RECOMPUTE = (
    Recomputation({"granularity": "none"}, 34, 1),
    Recomputation({"granularity": "selective", "modules": ["norms", "activation"]}, 26, 1.02),
    Recomputation({"granularity": "selective", "modules": ["mlp"]}, 16, 1.15),
    Recomputation({"granularity": "full"}, 2, 4 / 3),
)


@dataclass(frozen=True)
class LayoutOption:
    """Settings of `parallel`, `recompute` and the micro-batch, with a rough guess of what the run needs with them.

    Attributes:
        states: GiB of parameters, gradients and optimizer states of a rank, without which no run fits.
        guess: of GiB in all, and of seconds per step.
    """

    parallel: dict[str, Any]
    recompute: Recomputation
    micro_batch_size: int
    recipe: Training
    states: float = 0.0
    guess: Estimate = NO_GUESS

    def describe(self) -> str:
        """Describe the settings in a line."""
        axes = [f"{name} {value}" for name, value in self.parallel.items()]
        settings = self.recompute.settings
        recompute = " and ".join(settings.get("modules", [settings["granularity"]]))
        return f"{', '.join(axes)}, recompute {recompute}, micro-batch {self.micro_batch_size}"

    def as_tree(self) -> dict[str, Any]:
        """The settings as a part of a recipe."""
        tree: dict[str, Any] = {"devices": self.recipe.devices, "num_nodes": self.recipe.num_nodes}
        tree |= {"parallel": self.parallel, "recompute": self.recompute.settings}
        return tree | {"train": {"micro_batch_size": self.micro_batch_size}}


@dataclass
class SearchResult:
    """The layouts of a run.

    Attributes:
        fitting: the layouts that fit, the fastest one first, and what they need.
        too_large: those that were planned and do not fit.
        legal: number of layouts that the recipe allows.
        refused: the errors of the others, and their number.
        skipped: why legal ones were not planned, and their number.
    """

    fitting: list[tuple[LayoutOption, Estimate]] = field(default_factory=list)
    too_large: list[tuple[LayoutOption, Estimate]] = field(default_factory=list)
    legal: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)


def search_layouts(recipe: Training, spec: RunSpec, gpu: Gpu, gpus: int) -> SearchResult:
    """Search the layouts of a run.

    All legal ones are ordered by a rough guess of their time. The first of them that may fit are planned on fake
    tensors; their real memory corrects the guess for others with the same recomputation.

    Raises:
        UserError: if the GPUs do not make whole nodes.
    """
    result = SearchResult()
    layouts = list(list_legal_layouts(recipe, spec, gpu, gpus, result))
    ratios: dict[float, float] = {}
    planned = 0
    for layout in sorted(layouts, key=lambda layout: layout.guess.seconds):
        kind = layout.recompute.kept
        if layout.states > gpu.memory:
            result.skipped["parameters, gradients and optimizer states do not fit"] += 1
        elif layout.guess.memory * ratios.get(kind, 0.7) > gpu.memory:
            result.skipped["by a rough guess they do not fit"] += 1
        elif planned == PLANNED or len(result.fitting) == WANTED:
            result.skipped["others were guessed to be faster"] += 1
        else:
            planned += 1
            estimate = estimate_run(layout.recipe, spec, gpu)
            ratios[kind] = estimate.memory / layout.guess.memory
            (result.fitting if estimate.memory <= gpu.memory else result.too_large).append((layout, estimate))
    result.fitting.sort(key=lambda pair: pair[1].seconds)
    return result


def list_legal_layouts(
    recipe: Training, spec: RunSpec, gpu: Gpu, gpus: int, result: SearchResult
) -> Iterator[LayoutOption]:
    """List the layouts that the recipe's own checks allow, with guesses; count them and the refusals of others."""
    devices, nodes = split_gpus(gpus)
    model, trained = spec.build_whole_model(), spec.measure_trained_shares()
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    for parallel, recompute, micro in list_combinations(gpus, devices, nodes, spec, recipe):
        try:
            changed = replace(
                recipe,
                devices=devices,
                num_nodes=nodes,
                parallel=replace(recipe.parallel, **parallel),
                recompute=replace(RecomputeArgs(offload=recipe.recompute.offload), **recompute.settings),
                train=replace(recipe.train, micro_batch_size=micro),
            )
            length, dims = resolve_run(changed, spec)
        except UserError as error:
            result.refused[str(error)] += 1
            continue
        result.legal += 1
        layout = LayoutOption(parallel, recompute, micro, changed)
        states = guess_states(layout, dims, trained=sizes[True], frozen=sizes[False])
        tokens = recipe.train.global_batch_size * length
        flops = compute_training_flops(spec.config, tokens=tokens, sequence_length=length, trained=trained)
        weights, tokens = sum(sizes.values()), micro * length // dims.context
        guess = guess_needs(layout, spec.config, dims, gpu, tokens=tokens, states=states, weights=weights, flops=flops)
        yield replace(layout, states=states, guess=guess)


def split_gpus(gpus: int) -> tuple[int, int]:
    """The GPUs of each node, and the number of nodes.

    Raises:
        UserError: if they do not make whole nodes.
    """
    if gpus > GPUS_PER_NODE and gpus % GPUS_PER_NODE:
        nearest = gpus // GPUS_PER_NODE * GPUS_PER_NODE
        raise UserError(f"gpus: {gpus} is not a multiple of the {GPUS_PER_NODE} GPUs of a node; set {nearest}")
    return min(gpus, GPUS_PER_NODE), max(1, gpus // GPUS_PER_NODE)


def list_combinations(
    gpus: int, devices: int, nodes: int, spec: RunSpec, recipe: Training
) -> Iterator[tuple[dict[str, Any], Recomputation, int]]:
    """List settings of parallelism, recomputation and the micro-batch, legal or not."""
    tensors, powers = list_divisors(devices), [1, 2, 4, 8]
    replicas = [1, nodes] if nodes > 1 else [1]
    for tensor, pipeline, replicate in product(tensors, list_divisors(gpus), replicas):
        rest, remainder = divmod(gpus, tensor * pipeline * replicate)
        if remainder or pipeline > 8:
            continue
        experts = list_divisors(min(rest * tensor, devices)) if spec.config.n_expert else [1]
        zeros: Sequence[int | None] = [None] if rest == 1 else [1, 3] if pipeline > 1 else [2, 3]
        for expert, zero, recompute, micro in product(experts, zeros, RECOMPUTE, powers):
            axes = {"tensor": tensor, "pipeline": pipeline, "data_replicate": replicate, "expert": expert}
            parallel: dict[str, Any] = {name: degree for name, degree in axes.items() if degree > 1}
            parallel |= {"data_shard": rest} | ({} if zero is None else {"zero": zero})
            if micro <= recipe.train.global_batch_size:
                yield parallel, recompute, micro


def list_divisors(number: int) -> list[int]:
    """The divisors of a number, in order."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def guess_states(layout: LayoutOption, dims: ParallelDims, *, trained: int, frozen: int) -> float:
    """GiB of what is sharded: frozen weights in 16 bits; trained ones with two moments, and gradients."""
    bytes_each = 8 if layout.recipe.precision == "bf16-true" else 16
    shards = dims.shard * dims.tensor * dims.pipeline
    return (frozen * 2 + trained * bytes_each) / shards / GIB


def guess_needs(
    layout: LayoutOption,
    config: Config,
    dims: ParallelDims,
    gpu: Gpu,
    *,
    tokens: int,
    states: float,
    weights: int,
    flops: float,
) -> Estimate:
    """Guess memory and time in closed form, to plan the most promising layouts first.

    Args:
        tokens: of a micro-batch on a rank.
        states: GiB, from `guess_states`.
        weights: number of all weights.
        flops: of a step, on all GPUs.
    """
    shares, recipe, zero = Efficiencies(), layout.recipe, layout.recipe.parallel.level
    micro_batches = recipe.train.accumulation(dims.data_ranks)
    local, layers = weights / (dims.tensor * dims.pipeline), config.n_layer / dims.pipeline
    hidden = tokens * config.n_embd
    kept = layout.recompute.kept * layers * min(dims.pipeline, micro_batches) + RECOMPUTE[0].kept
    whole = 2 * local * (2 / config.n_layer if zero == 3 else 1) * (dims.shard > 1)
    memory = states + (hidden / dims.tensor * kept + whole) / GIB + 3
    link, network = gpu.link_bandwidth * 1e9 * shares.link, gpu.network_bandwidth * 1e9 * shares.network
    seconds = flops / dims.world_size * layout.recompute.work / (gpu.bf16_tflops * 1e12 * shares.matmul)
    passes = 12 if recipe.recompute.granularity == "full" else 8  # collectives of a layer
    seconds += passes * 2 * hidden * micro_batches * layers * (1 - 1 / dims.tensor) / link
    seconds *= 1 + (dims.pipeline - 1) / micro_batches
    bandwidth = link if dims.shard * dims.tensor <= GPUS_PER_NODE else network
    gathers = {1: 2, 2: micro_batches + 1, 3: 3 * micro_batches}[zero]
    exchange = gathers * 2 * local * (1 - 1 / dims.shard) / bandwidth
    exchange += 4 * local / dims.shard / network * (dims.data_replicate > 1)
    return Estimate(memory, seconds + max(0.0, exchange - seconds))
