"""Measure what this machine can compute, and what of it each part of a training step uses.

    litgpt pretrain ... --out_dir out --profile.steps '[10,13]'
    python benchmarks/limit.py out/profile/trace.json.gz

Run it with the interpreter that this package is installed in, on an idle machine, with the cores and the threads of the
run. Prints the rate of matrix products in float32 and bfloat16, with one thread and with all, of size 2048 and of the
largest products of the step: by torch (on x86, MKL in float32 and oneDNN in bfloat16), and by oneDNN; the bandwidth of
the memory; and the time of the step by its parts. The limit of a dtype is its highest rate with all threads: a share is
the FLOPs of products over their time and this limit. The limit of the optimizer is the bandwidth, with 28 bytes a
parameter that is trained, as `run.json` of the run counts them (AdamW in float32).
"""

import argparse
import gzip
import json
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float": "float32", "c10::BFloat16": "bfloat16"}  # names in traces
SIZE, ADDED_FLOATS = 2048, 1 << 26
SECONDS = 0.4  # for each rate
LARGEST = 4  # products of the step that are measured alone
ADAMW_BYTES = 28  # reads four float32 numbers of a parameter and writes three
PARTS = {  # of a step: the outermost annotation or operation whose name contains one of these
    "data": ("data",),
    "optimizer": ("optimizer", "gradient_norm"),
    "head and loss": ("CrossEntropy", "cross_entropy", "nll_loss", "log_softmax", "LogProb"),
    "attention": ("scaled_dot_product", "attention"),
    "products": ("aten::mm", "addmm", "bmm", "grouped_mm"),
}
OTHERS, PYTHON = "norms, activations, others", "Python and dispatch"

Shape = tuple[int, int, int]  # rows, inner size, columns


def main() -> None:
    """Print the rates, and the parts of the step in a trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="trace.json.gz of a run with profile.steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of the run")
    parser.add_argument("--json", type=Path, help="also write limits and parts to this file")
    options = parser.parse_args()
    parts, shapes = read_trace(options.trace)
    parts["optimizer"]["bandwidth"] = count_optimizer_bytes(options.trace)
    limits = {dtype: print_rates(dtype, shapes, options.threads) for dtype in DTYPES.values()}
    limits["bandwidth"] = max(measure_bandwidth(threads) for threads in (1, options.threads))
    print(f"memory: {limits['bandwidth'] / 1e9:.1f} GB/s read and written by a sum in place\n")
    print_parts(parts, limits)
    if options.json:
        seconds = sum(compute_seconds_at_limit(part, limits) for part in parts.values())
        options.json.write_text(json.dumps({"seconds_at_limit": seconds, "limits": limits, "parts": parts}))


def print_rates(dtype: str, shapes: dict[str, list[Shape]], threads: int) -> float:
    """Print the rates of products in a dtype, in GFLOP/s; returns the highest with all threads in FLOP/s."""
    columns = [(library, count) for library in LIBRARIES for count in dict.fromkeys((1, threads))]
    print(f"{dtype + ', GFLOP/s':26}" + "".join(f"{f'{name}, {count}':>14}" for name, count in columns))
    highest = 0.0
    for shape in [(SIZE, SIZE, SIZE), *shapes[dtype]]:
        rates = [measure_product(LIBRARIES[name], shape, getattr(torch, dtype), count) for name, count in columns]
        print(f"{' x '.join(map(str, shape)):26}" + "".join(f"{rate / 1e9:>14.0f}" for rate in rates))
        highest = max(highest, *(rate for rate, (_, count) in zip(rates, columns, strict=True) if count == threads))
    print()
    return highest


def multiply_by_onednn(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right.T by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


LIBRARIES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "torch": lambda left, right: left @ right.T,
    "oneDNN": multiply_by_onednn,
}


def measure_product(multiply: Callable[..., Any], shape: Shape, dtype: torch.dtype, threads: int) -> float:
    """The highest FLOP/s of a product with `threads` threads."""
    rows, inner, columns = shape
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    return 2 * prod(shape) / measure_seconds(lambda: multiply(left, right), threads)


def measure_bandwidth(threads: int) -> float:
    """The highest bytes/s of a sum in place that no cache holds, which reads what it writes, as an optimizer does."""
    source, target = torch.zeros(ADDED_FLOATS), torch.ones(ADDED_FLOATS)
    return 3 * source.nbytes / measure_seconds(lambda: target.add_(source), threads)


def measure_seconds(work: Callable[[], Any], threads: int) -> float:
    """The shortest time of a call, after one that is not counted."""
    torch.set_num_threads(threads)
    work()
    times, end = [], time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def read_trace(path: Path) -> tuple[dict[str, dict[str, float]], dict[str, list[Shape]]]:
    """Read the seconds of a step by part, with FLOPs by dtype; and the largest products."""
    with gzip.open(path) as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X" and event["dur"] > 0]
    steps = [event for event in events if event["name"].startswith("step ")]
    events = [event for event in events if event["tid"] == steps[0]["tid"] and steps[0]["ts"] <= event["ts"]]
    parts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    shapes: dict[str, dict[Shape, float]] = {dtype: defaultdict(float) for dtype in DTYPES.values()}
    open_events: list[tuple[float, str, bool]] = []  # of what contains the next: end, part, whether its work is counted
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while open_events and open_events[-1][0] <= event["ts"]:
            open_events.pop()
        _, outer, counted = open_events[-1] if open_events else (0.0, None, False)
        part = outer if outer in PARTS else find_part(event)
        if outer is not None:
            parts[outer]["seconds"] -= event["dur"] / 1e6 / len(steps)
        if outer is not None or event["name"].startswith("step "):
            parts[part]["seconds"] += event["dur"] / 1e6 / len(steps)
            work = {} if counted else count_work(event, shapes)
            open_events.append((event["ts"] + event["dur"], part, counted or bool(work)))
            for key, amount in work.items():
                parts[part][key] += amount / len(steps)
    largest = {dtype: sorted(found, key=lambda shape: -found[shape])[:LARGEST] for dtype, found in shapes.items()}
    return {name: dict(figures) for name, figures in parts.items()}, largest


def count_optimizer_bytes(trace: Path) -> float:
    """The bytes that AdamW moves in a step of the run of a trace, which has no sizes of lists of many tensors."""
    record = json.loads((trace.parents[1] / "run.json").read_text(encoding="utf-8"))
    return ADAMW_BYTES * record["model"]["trained_parameters"]


def find_part(event: dict[str, Any]) -> str:
    """The part of a step that an annotation or operation belongs to, if what contains it has none."""
    name = event["name"]
    for part, words in PARTS.items():
        if any(word in name for word in words):
            return part
    return OTHERS if name.startswith("aten::") else PYTHON


def count_work(event: dict[str, Any], shapes: dict[str, dict[Shape, float]]) -> dict[str, float]:
    """Count the FLOPs of a product by its dtype, which is added to `shapes`."""
    name, arguments = event["name"], event.get("args", {})
    dims, types = arguments.get("Input Dims", []), arguments.get("Input type", [])
    if name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm"):
        (left, right), dtype = dims[:2] if name in ("aten::mm", "aten::bmm") else dims[1:3], DTYPES[types[0]]
        flops = 2.0 * prod(left) * right[-1]
        shapes[dtype][left[-2], left[-1], right[-1]] += flops
        return {dtype: flops}
    is_own = name.startswith("litgpt::causal_attention")
    if is_own or (name.startswith("aten::_scaled_dot_product") and "flash" in name):
        backward = name.endswith("backward")
        batch, heads, queries, size = dims[1 if backward else 0]
        causal = is_own or "True" in arguments["Concrete Inputs"]
        products = (5 if backward else 2) / (2 if causal else 1)
        dtype = "float32" if is_own and backward else DTYPES[types[0]]  # in 16 bits, the backward pass is in float32
        return {dtype: 2.0 * products * batch * heads * queries * dims[2][-2] * size}
    return {}


def print_parts(parts: dict[str, dict[str, float]], limits: dict[str, float]) -> None:
    """Print the parts of a step, the largest first, with their share of its time and of the limit."""
    total = sum(part["seconds"] for part in parts.values())
    rows = {**dict(sorted(parts.items(), key=lambda item: -item[1]["seconds"])), "all": {"seconds": total}}
    print(f"{'a step with the profiler':28}{'ms':>9}{'of step':>9}{'GFLOP':>9}{'of limit':>10}")
    for name, part in rows.items():
        measured = list(parts.values()) if name == "all" else [part]
        flops = sum(each.get(dtype, 0) for each in measured for dtype in DTYPES.values())
        share = sum(map(partial(compute_seconds_at_limit, limits=limits), measured)) / part["seconds"]
        figures = f"{flops / 1e9:>9.1f}{share:>10.1%}" if share else ""
        print(f"{name:28}{part['seconds'] * 1e3:>9.1f}{part['seconds'] / total:>9.1%}{figures}")


def compute_seconds_at_limit(part: dict[str, float], limits: dict[str, float]) -> float:
    """The seconds that the work of a part takes at the limits."""
    return sum(part.get(kind, 0) / limit for kind, limit in limits.items())


if __name__ == "__main__":
    main()
