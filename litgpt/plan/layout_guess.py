"""A guess, in closed form, of what a layout needs, so that the most promising ones are planned first."""

from dataclasses import dataclass
from typing import Self

from litgpt.model.config import Config
from litgpt.model.flops import compute_training_flops, count_head_weights
from litgpt.model.moe import Experts
from litgpt.plan.layout_options import GPUS_PER_NODE, KEPT, LayoutOption
from litgpt.plan.operations import BACKWARD_SHARE
from litgpt.plan.step_time import Efficiencies
from litgpt.plan.table import GIB
from litgpt.recipe.gpu import Gpu
from litgpt.recipe.training import Training
from litgpt.train.run_spec import RunSpec

LOGIT_BYTES = 12  # of each logit of the plain loss: in 16 bits and in float32, and its gradients
BUBBLES = {"1f1b": 1.0, "gpipe": 1.0, "interleaved": 1 / 2, "zbv": 1 / 3}
"""Of the time of a micro-batch on a device, by the number of other devices (Narayanan et al. 2021, Qi et al. 2024)."""
STATES = {True: 8, False: 16}  # bytes of a trained parameter with two moments and its gradient, by bf16-true


@dataclass(frozen=True)
class RunFigures:
    """The figures of a run that are the same for all layouts.

    Attributes:
        trained, frozen: number of weights.
        experts: number of weights of experts, of the trained and frozen ones.
        flops: of a step, on all GPUs.
        head: the share of the output matrix in them.
    """

    config: Config
    gpu: Gpu
    trained: int
    frozen: int
    experts: int
    flops: float
    head: float

    @classmethod
    def of_run(cls, recipe: Training, spec: RunSpec, gpu: Gpu, length: int) -> Self:
        """Count the figures of a run with rows of `length` tokens."""
        model = spec.build_whole_model()
        sizes = {True: 0, False: 0}
        for parameter in model.parameters():
            sizes[parameter.requires_grad] += parameter.numel()
        modules = [module for module in model.modules() if isinstance(module, Experts)]
        experts = sum(parameter.numel() for module in modules for parameter in module.parameters())
        tokens, trained = recipe.train.global_batch_size * length, spec.measure_trained_shares()
        flops = compute_training_flops(spec.config, tokens=tokens, sequence_length=length, trained=trained)
        head = min(1.0, (4 + 2 * trained.head) * count_head_weights(spec.config) * tokens / flops)
        return cls(spec.config, gpu, sizes[True], sizes[False], experts, flops, head)

    def count_local_weights(self, layout: LayoutOption) -> float:
        """The weights of a rank, not sharded over data ranks."""
        dims, all_weights = layout.dims, self.trained + self.frozen
        return ((all_weights - self.experts) / dims.tensor + self.experts / dims.expert) / dims.pipeline


def guess_states(layout: LayoutOption, figures: RunFigures) -> float:
    """GiB of what is sharded: frozen weights in 16 bits; trained ones with two moments, and gradients."""
    dims, bytes_each = layout.dims, STATES[layout.base.precision == "bf16-true"]
    shards = dims.shard * dims.tensor * dims.pipeline
    return (figures.frozen * 2 + figures.trained * bytes_each) / shards / GIB


def guess_memory(layout: LayoutOption, figures: RunFigures) -> float:
    """GiB of the rank that needs the most."""
    dims, config, level = layout.dims, figures.config, layout.base.parallel.level
    local, layers = figures.count_local_weights(layout), config.n_layer / dims.pipeline
    tokens = layout.base.train.micro_batch_size * layout.length / dims.context
    recompute = layout.recompute
    kept = recompute.kept * layers * count_held(layout) + KEPT * recompute.segment
    if not layout.base.parallel.sequence:  # norms and residuals of all tokens, about 10 of 34 bytes
        kept *= (24 + 10 * dims.tensor) / 34
    activations = tokens * config.n_embd / dims.tensor * kept
    if layout.loss.impl == "plain":
        activations += tokens * (config.padded_vocab_size or 0) / dims.tensor * LOGIT_BYTES
    whole = 2 * local * (2 / config.n_layer if level == 3 else 1) * (dims.shard > 1)
    whole += 4 * local * (level == 1 and dims.shard > 1)  # gradients
    return guess_states(layout, figures) + (activations + whole) / GIB + 3


def count_held(layout: LayoutOption) -> float:
    """Micro-batches that a device holds at most, with all of its layers."""
    devices, total = layout.dims.pipeline, layout.base.train.accumulation(layout.dims.data_ranks)
    most = {"gpipe": total, "interleaved": devices + (devices - 1) / 2}
    return min(most.get(layout.base.parallel.pipeline_schedule, devices), total)


def guess_seconds(layout: LayoutOption, figures: RunFigures) -> float:
    """Seconds of a step."""
    dims, gpu, shares, parallel = layout.dims, figures.gpu, Efficiencies(), layout.base.parallel
    micro_batches = layout.base.train.accumulation(dims.data_ranks)
    link, network = gpu.link_bandwidth * 1e9 * shares.link, gpu.network_bandwidth * 1e9 * shares.network
    seconds = figures.flops / dims.world_size * layout.recompute.work / (gpu.bf16_tflops * 1e12 * shares.matmul)
    seconds *= 1 + figures.head * (dims.pipeline - 1)  # all of the head is on one device
    seconds += micro_batches * guess_exchanges(layout, figures, link, network)
    seconds *= 1 + BUBBLES[parallel.pipeline_schedule] * (dims.pipeline - 1) / micro_batches
    bandwidth = link if dims.shard * dims.tensor <= GPUS_PER_NODE else network
    gathers = {1: 2, 2: micro_batches + 1, 3: 3 * micro_batches}[parallel.level]
    local = figures.count_local_weights(layout)
    overlapped = gathers * 2 * local * (1 - 1 / dims.shard) / bandwidth
    overlapped += 4 * local / dims.shard / network * (dims.data_replicate > 1)
    return max(seconds, overlapped)


def guess_exchanges(layout: LayoutOption, figures: RunFigures, link: float, network: float) -> float:
    """Seconds of a micro-batch in which a rank waits for the tokens of others.

    Args:
        link, network: bytes per second within and between nodes.
    """
    dims, config, shares = layout.dims, figures.config, Efficiencies()
    tokens = layout.base.train.micro_batch_size * layout.length / dims.context
    layers, passes = config.n_layer / dims.pipeline, layout.recompute.passes
    seconds = 0.0
    if dims.tensor > 1:  # around attention and the feed-forward layers: an all-gather and a reduce-scatter each
        each = max(2 * tokens * config.n_embd * (1 - 1 / dims.tensor) / link, shares.collective)
        seconds += layers * passes * 4 * each
    if dims.context > 1:
        width = 2 * (config.n_query_groups or config.n_head) * (config.head_size or 0) / dims.tensor
        bandwidth = link if dims.context * dims.tensor <= GPUS_PER_NODE else network
        seconds += layers * passes * 2 * layout.length * width * (1 - 1 / dims.context) / bandwidth
        if layout.base.parallel.context_method == "all-gather":  # scores of all keys, of which causal ones are half
            queries = tokens * config.n_head * (config.head_size or 0) / dims.tensor
            peak = figures.gpu.bf16_tflops * 1e12 * shares.attention
            seconds += layers * (1 + BACKWARD_SHARE) * 2 * queries * layout.length / peak
    if dims.expert > 1:
        rows = tokens * config.n_expert_per_token / dims.tensor
        bandwidth = link if dims.expert <= GPUS_PER_NODE else network
        seconds += layers * passes * 2 * 2 * rows * config.n_embd * (1 - 1 / dims.expert) / bandwidth
    return seconds
