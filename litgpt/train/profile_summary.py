"""The summary of a profile on one page: the share of each phase and kind of operation, gaps, the largest operations."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

# Kinds of operations by parts of their names, the first one that matches: of ATen on CPUs, of kernels on GPUs.
OPERATION_KINDS = {
    "communication": ("nccl", "gloo", "c10d", "record_param_comms"),
    "attention": ("scaled_dot_product", "flash", "fmha", "attention"),
    "matrix products": ("aten::mm", "addmm", "bmm", "gemm", "cutlass", "cublas", "grouped_mm", "scaled_mm", "mkldnn"),
    "normalization": ("norm",),
    "softmax and losses": ("softmax", "nll_loss", "cross_entropy", "logsumexp"),
    "embeddings and indexing": ("embedding", "index", "gather", "scatter", "aten::select", "sort", "topk"),
    "copies and conversions": ("copy", "memcpy", "memset", "aten::cat", "aten::clone", "fill_", "zero_", "empty"),
    "compiled kernels": ("triton", "inductor", "compiledfunction", "torchdynamo"),
    "autograd": ("autograd::", "backward"),
}
OWN_OPERATIONS = "litgpt::"  # what they call is of their kind
REST = "other (logging, evaluation, saving)"
OTHER_KIND = "elementwise, reductions and others"
ALLOCATORS = ("aten::empty", "aten::empty_strided", "aten::new_empty", "aten::resize_")  # for the operation above
TABLE_ROWS = 12  # of the tables of operations
GAPS = 5
MILLISECOND, MEGABYTE = 1e3, 1e6  # in microseconds, in bytes


class Gap(NamedTuple):
    """A time in which no operation runs, in microseconds; and the operations before and after it."""

    duration: float
    before: str
    after: str


def find_kind(name: str) -> str:
    """Return the kind of an operation."""
    lowered = name.lower()
    return next((kind for kind, parts in OPERATION_KINDS.items() if any(part in lowered for part in parts)), OTHER_KIND)


def find_own_operation(event: FunctionEvent) -> FunctionEvent:
    """Return the operation of this package that an event is a part of; itself if there is none."""
    outer = event.cpu_parent
    while outer is not None and not outer.name.startswith(OWN_OPERATIONS):
        outer = outer.cpu_parent
    return event if outer is None else outer


def find_gaps(events: Iterable[FunctionEvent], start: float, end: float) -> tuple[float, list[Gap]]:
    """Find the times between `start` and `end` in which no operation runs.

    Returns:
        Their sum in microseconds, and the gaps, longest first.
    """
    gaps, before = [], "the start"
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.time_range.start > start:
            gaps.append(Gap(event.time_range.start - start, before, event.name))
        if event.time_range.end > start:
            start, before = event.time_range.end, event.name
    if end > start:
        gaps.append(Gap(end - start, before, "the end"))
    return sum(gap.duration for gap in gaps), sorted(gaps, key=lambda gap: -gap.duration)


def get_self_time(event: FunctionEvent) -> float:
    """Return the time of an operation without those that it calls, in microseconds."""
    is_kernel = event.device_type != DeviceType.CPU
    return event.time_range.elapsed_us() if is_kernel else event.self_cpu_time_total


def format_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Format a table in Markdown."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines, ""]


def format_share(time: float, total: float) -> tuple[str, str]:
    """Format a time in milliseconds, and its share of a total."""
    return f"{time / MILLISECOND:,.2f}", f"{time / total:.1%}"


def format_shapes(event: FunctionEvent) -> str:
    """Format the shapes of the arguments that are tensors."""
    shapes: Any = event.input_shapes  # a list of integers for each argument, empty if it is not a tensor
    return " ".join("x".join(map(str, shape)) for shape in shapes or () if shape) or "-"


def sum_phases(annotations: Iterable[FunctionEvent], total: float) -> dict[str, float]:
    """Sum the time of each phase of the steps, in microseconds, and the rest of a total."""
    times: dict[str, float] = defaultdict(float)
    for event in annotations:
        if event.cpu_parent is not None and event.cpu_parent.name.startswith("step "):
            times[event.name] += event.time_range.elapsed_us()
    return times | {REST: total - sum(times.values())}


def format_operations(operations: list[FunctionEvent], total: float) -> list[str]:
    """Format the operations that take the most time, by name and shapes of their arguments."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in operations:
        times[event.name, format_shapes(event)].append(get_self_time(event))
    largest = sorted(times.items(), key=lambda item: -sum(item[1]))[:TABLE_ROWS]
    rows = [(name[:80], shapes, len(each), *format_share(sum(each), total)) for (name, shapes), each in largest]
    return format_table(("operation", "shapes", "calls", "ms", "share"), rows)


def format_allocations(events: Iterable[FunctionEvent], *, is_cuda: bool) -> list[str]:
    """Format the operations that allocate the most memory in a call, by name and shapes of their arguments."""
    sizes: dict[tuple[str, str], list[int]] = defaultdict(list)
    for event in events:
        size = event.self_device_memory_usage if is_cuda else event.self_cpu_memory_usage
        if size > 0:
            owner = event.cpu_parent if event.cpu_parent and event.name in ALLOCATORS else event
            sizes[owner.name, format_shapes(owner)].append(size)
    largest = sorted(sizes.items(), key=lambda item: -max(item[1]))[:TABLE_ROWS]
    rows = [(name[:80], shapes, len(each), f"{max(each) / MEGABYTE:,.2f}") for (name, shapes), each in largest]
    return format_table(("allocated in", "shapes", "calls", "largest, MB"), rows)


def format_summary(events: Iterable[FunctionEvent], steps: list[int], *, is_cuda: bool) -> str:
    """Format the summary of a profile in Markdown.

    Args:
        events: the events of the profiler.
        steps: the numbers of the steps.
        is_cuda: whether operations are kernels on a GPU, rather than on the CPU.
    """
    events, device = list(events), DeviceType.CUDA if is_cuda else DeviceType.CPU
    annotations = [event for event in events if event.is_user_annotation and event.device_type == DeviceType.CPU]
    calls = [event for event in events if not event.is_user_annotation and event.device_type == DeviceType.CPU]
    operations = [event for event in events if not event.is_user_annotation and event.device_type == device]
    names = {f"step {step}" for step in steps}
    ranges = [event.time_range for event in annotations if event.name in names]
    start, end = min(each.start for each in ranges), max(each.end for each in ranges)
    idle, gaps = find_gaps(operations, start, end)
    kinds: dict[str, float] = defaultdict(float)
    for event in operations:
        kinds[find_kind(find_own_operation(event).name)] += get_self_time(event)
    total, busy = end - start, sum(kinds.values()) or 1.0
    by_time = {
        name: sorted(times.items(), key=lambda item: -item[1])
        for name, times in {"phases": sum_phases(annotations, end - start), "kinds": kinds}.items()
    }
    where = "GPU" if is_cuda else "CPU"
    lines = [
        f"# Profile of steps {steps[0]} to {steps[-1]}",
        "",
        f"{len(steps)} steps in {total / MILLISECOND:,.1f} ms, {total / len(steps) / MILLISECOND:,.1f} ms each. The "
        f"profiler itself slows them down. Open `trace.json.gz` at https://ui.perfetto.dev.",
        "",
        "## Phases",
        "",
        *format_table(("phase", "ms", "share"), ((name, *format_share(t, total)) for name, t in by_time["phases"])),
        f"## Operations on the {where}, by kind",
        "",
        *format_table(("kind", "ms", "share"), ((name, *format_share(t, busy)) for name, t in by_time["kinds"])),
        f"## Gaps: no operation on the {where}",
        "",
        f"{idle / MILLISECOND:,.1f} ms, {idle / total:.1%} of the time. The longest:",
        "",
        *format_table(
            ("ms", "after", "before"),
            ((f"{gap.duration / MILLISECOND:,.2f}", gap.before[:60], gap.after[:60]) for gap in gaps[:GAPS]),
        ),
        "## Operations that take the most time",
        "",
        *format_operations(operations, busy),
        "## Largest allocations",
        "",
        *format_allocations(calls, is_cuda=is_cuda),
    ]
    return "\n".join(lines)
