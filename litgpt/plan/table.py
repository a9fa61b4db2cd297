"""The plan of a run as a table, and as values for JSON."""

from typing import Any, Protocol

from litgpt.plan.memory import StepMemory
from litgpt.plan.ranks import RunPlan
from litgpt.plan.time_table import describe_time, format_time
from litgpt.recipe.columns import format_columns

GIB = 2**30
FIXED_ALLOWANCE = 2 * GIB
ALLOWANCE_SHARE = 0.05
"""Of what a step needs: memory that the allocator holds in pieces too small to use. With `FIXED_ALLOWANCE`, for the
device's context and the buffers of its libraries, this is an assumption, the same for all runs."""
PART_NAMES = {
    "parameters": "Parameters",
    "gradients": "Gradients",
    "optimizer": "Optimizer states",
    "activations": "Activations",
    "logits": "Logits",
    "gathered_parameters": "Gathered parameters",
    "communication": "Communication",
    "reference": "Reference",
    "temporary": "Temporary",
    "other": "Other",
}


class PlannedDevice(Protocol):
    """A kind of GPU that a run should fit into, or the memory of this machine."""

    @property
    def gpu_label(self) -> str:
        """Its name, for messages."""

    @property
    def available_memory(self) -> float | None:
        """GiB; None if they are not known."""

    @property
    def price_per_hour(self) -> float | None:
        """Price of an hour of one device; None if it is not known."""


def compute_allowance(memory: StepMemory) -> int:
    """Bytes for what a step does not allocate itself."""
    return FIXED_ALLOWANCE + round(ALLOWANCE_SHARE * memory.peak)


def compute_total(memory: StepMemory) -> float:
    """GiB that a rank needs, with the allowance."""
    return (memory.peak + compute_allowance(memory)) / GIB


def compute_largest(plan: RunPlan) -> float:
    """GiB of the rank that needs the most, with the allowance."""
    return max(map(compute_total, plan.ranks.values()))


def describe_rank(plan: RunPlan, rank: int) -> dict[str, Any]:
    """The memory of a rank as JSON values, in GiB."""
    memory = plan.ranks[rank]
    parts = {**memory.parts, "allowance": compute_allowance(memory)}
    return {
        "rank": rank,
        "ranks_alike": plan.alike[rank],
        "peak_gib": round(compute_total(memory), 6),
        "parts": {name: round(size / GIB, 6) for name, size in parts.items()},
        "host_gib": round(memory.host / GIB, 6),
        "peak_at": {
            "phase": memory.phase,
            "micro_batch": memory.micro_batch,
            "op": memory.op,
            "shape": list(memory.shape),
            "gib": round(memory.op_bytes / GIB, 6),
        },
    }


def describe_plan(plan: RunPlan, device: PlannedDevice) -> dict[str, Any]:
    """The plan as JSON values."""
    available = device.available_memory
    worst = describe_rank(plan, plan.worst)
    return {
        "processes": plan.dims.world_size,
        "tokens_per_row": plan.length,
        **({} if plan.media is None else plan.media.describe()),
        "worst": worst,
        "ranks": [describe_rank(plan, rank) for rank in plan.ranks],
        "gpu_memory_gib": available,
        "fits": None if available is None else worst["peak_gib"] <= available,
        **({} if plan.time is None else describe_time(plan.time, device.price_per_hour)),
    }


def format_plan(plan: RunPlan, device: PlannedDevice) -> str:
    """Format the memory of the rank that needs the most, by what it holds, and whether that fits."""
    memory = plan.ranks[plan.worst]
    sizes = {PART_NAMES[name]: size for name, size in memory.parts.items() if size}
    sizes["Allowance"] = compute_allowance(memory)
    rows = [(name, f"{size / GIB:9.2f} GiB") for name, size in sizes.items()]
    total = compute_total(memory)
    rows.append(("Total", f"{total:9.2f} GiB"))
    if memory.host:
        rows.append(("Host memory", f"{memory.host / GIB:9.2f} GiB"))
    rows.append(("Peak", describe_peak(memory)))
    if (available := device.available_memory) is not None:
        name = device.gpu_label
        left = available - total
        verdict = f"yes, with {left:.2f} GiB left" if left >= 0 else f"no, {-left:.2f} GiB too much"
        rows.append(("Fits", f"{verdict} of the {available:g} GiB of {name}"))
    others = [f"rank {rank}: {compute_total(other):.2f} GiB" for rank, other in plan.ranks.items()]
    if len(others) > 1:
        rows.append(("Kinds of ranks", ", ".join(others)))
    alike = plan.alike[plan.worst]
    of_alike = f", the largest of {alike} alike" if alike > 1 else ""
    media = "" if plan.media is None else f" and {plan.media}"
    title = f"Memory of rank {plan.worst}{of_alike}, with rows of {plan.length} tokens{media}"
    lines = [title, *format_columns(rows, 20, indent=0)]
    if plan.time is not None:
        lines += [
            "",
            f"Time on {plan.dims.world_size} x {device.gpu_label}",
            *format_time(plan.time, device.price_per_hour),
        ]
    return "\n".join(lines)


def describe_peak(memory: StepMemory) -> str:
    """Describe where in the step the peak is."""
    shape, size = " x ".join(map(str, memory.shape)), memory.op_bytes / GIB
    is_of_batch = memory.phase in ("forward", "backward")
    place = f"{memory.phase} of micro-batch {memory.micro_batch}" if is_of_batch else memory.phase
    return f"in {place}, when {memory.op} returned {size:.2f} GiB ({shape})"
