"""Estimate the time of a training step from its operations and the figures of a GPU."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from litgpt.parallel.collective_calls import Collective
from litgpt.plan.operations import Operation
from litgpt.recipe.gpu import Gpu

TIME_PARTS = ("matmul", "attention", "memory", "collectives", "bubble")


@dataclass(frozen=True)
class Efficiencies:
    """Shares of published peaks that a step reaches, the same for all runs and GPUs.

    They were chosen so that the estimates of published runs, on A800 and H100, agree with their times.

    Attributes:
        matmul, attention: of the peak of products of the operands' type.
        memory: of the memory's bandwidth, in element-wise operations and in products with little to compute.
        link, network: of the bandwidth within and between nodes.
        kernel: s that a kernel takes at least.
        collective: s that a collective takes at least.
    """

    matmul: float = 0.72
    attention: float = 0.45
    memory: float = 0.8
    link: float = 0.75
    network: float = 0.8
    kernel: float = 4e-6
    collective: float = 2e-5


@dataclass
class PhaseTime:
    """Seconds of a part of a step.

    Attributes:
        computation: by the kind of the operations.
        collectives: that computation waits for.
        overlapped: collectives that computation goes on during.
        first_gather, last_reduction: the ones of them before and after which there is nothing to compute.
        transfers: each between stages of a pipeline, for which only the receiver waits.
    """

    computation: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("matmul", "attention", "memory"), 0.0))
    collectives: float = 0.0
    overlapped: float = 0.0
    first_gather: float = 0.0
    last_reduction: float = 0.0
    transfers: list[float] = field(default_factory=list)

    def exposed(self) -> float:
        """Seconds of collectives during which nothing is computed."""
        edges = self.first_gather + self.last_reduction
        return self.collectives + edges + max(0.0, self.overlapped - edges - sum(self.computation.values()))

    def add_to(self, parts: dict[str, float], times: float = 1.0) -> None:
        """Add the time to that of a step, a number of times."""
        for kind, seconds in self.computation.items():
            parts[kind] += times * seconds
        parts["collectives"] += times * self.exposed()

    def total(self) -> float:
        """Seconds from begin to end."""
        return sum(self.computation.values()) + self.exposed()


@dataclass(frozen=True)
class Machine:
    """What a step runs on.

    Attributes:
        gpus_per_node: consecutive ranks that are in one node.
    """

    gpu: Gpu
    gpus_per_node: int
    efficiencies: Efficiencies = Efficiencies()

    def compute_seconds(self, operation: Operation) -> float:
        """The time of an operation: the larger one of its products and its memory traffic (a roofline)."""
        if operation.collective is not None:
            return self.compute_collective_seconds(operation.collective)
        shares = self.efficiencies
        seconds = operation.bytes / (self.gpu.memory_bandwidth * 1e9 * shares.memory)
        if operation.flops:
            share = shares.attention if operation.kind == "attention" else shares.matmul
            seconds = max(seconds, operation.flops / (self.find_peak(operation.dtype) * share))
        return max(seconds, shares.kernel)

    def find_peak(self, dtype: torch.dtype | None) -> float:
        """Peak FLOP/s of products of a type of operands."""
        size = dtype.itemsize if dtype is not None else 4
        if size == 1:
            assert self.gpu.fp8_tflops is not None  # by `run_time.check_timed`
            return self.gpu.fp8_tflops * 1e12
        return (self.gpu.bf16_tflops if size == 2 else self.gpu.tf32_tflops) * 1e12

    def compute_collective_seconds(self, collective: Collective) -> float:
        """The time of a collective by its slowest connection.

        The share of the tensor that a rank receives from others, (n - 1) / n of n ranks, passes its link; what a node
        receives from other nodes is divided among its ranks of the group (ring algorithms: Patarasuk & Yuan 2009). An
        all-reduce is a reduce-scatter and an all-gather.
        """
        shares, ranks = self.efficiencies, len(collective.ranks)
        nodes = len({rank // self.gpus_per_node for rank in collective.ranks})
        if ranks == 1:
            return 0.0
        link = self.gpu.link_bandwidth * 1e9 * shares.link
        network = self.gpu.network_bandwidth * 1e9 * shares.network
        per_node = ranks / nodes
        if collective.kind in ("send", "broadcast"):
            seconds = collective.bytes / (link if nodes == 1 else network)
        elif collective.kind == "all_to_all":
            within = collective.bytes * (per_node - 1) / ranks / link
            seconds = max(within, collective.bytes * (1 - per_node / ranks) / network)
        else:
            within = collective.bytes * (ranks - 1) / ranks / link
            seconds = max(within, collective.bytes * (nodes - 1) / nodes / (per_node * network))
        return max(seconds * (2 if collective.kind == "all_reduce" else 1), shares.collective)


def add_up(operations: Iterable[Operation], machine: Machine) -> PhaseTime:
    """Add up the times of the operations of a phase."""
    time = PhaseTime()
    for operation in operations:
        seconds = machine.compute_seconds(operation)
        if operation.collective is None:
            time.computation[operation.kind] += seconds
        elif operation.collective.kind == "send":
            time.transfers.append(seconds)
        elif not operation.overlaps:
            time.collectives += seconds
        else:
            time.overlapped += seconds
            if operation.collective.kind == "all_gather":
                time.first_gather = time.first_gather or seconds
            else:
                time.last_reduction = seconds
    return time


def estimate_step(
    operations: Sequence[Operation], machine: Machine, *, planned: int, micro_batches: int
) -> dict[str, float]:
    """Seconds of a step without a pipeline, by `TIME_PARTS`.

    Args:
        operations: of a step of `planned` micro-batches, one or two.
        micro_batches: of the real step. Those between the first and the last one take what both have in common.
    """
    parts = dict.fromkeys(TIME_PARTS, 0.0)
    for name in ("forward", "backward"):
        by_number: dict[int, list[Operation]] = {}
        for operation in operations:
            if operation.phase == name:
                by_number.setdefault(operation.number, []).append(operation)
        times = [add_up(of_batch, machine) for of_batch in by_number.values()]
        assert len(times) == planned
        for time in times:
            time.add_to(parts)
        if micro_batches > planned:
            compute_common(times[0], times[-1]).add_to(parts, micro_batches - planned)
    rest = [operation for operation in operations if operation.phase not in ("forward", "backward")]
    add_up(rest, machine).add_to(parts)
    return parts


def compute_common(first: PhaseTime, last: PhaseTime) -> PhaseTime:
    """The time of a micro-batch that neither gathers what only the first one does, nor reduces as only the last one."""
    names = ("collectives", "overlapped", "first_gather", "last_reduction")
    return PhaseTime(first.computation, *(min(getattr(first, name), getattr(last, name)) for name in names))
