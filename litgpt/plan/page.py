"""The plan of a run as one HTML page: the memory of its ranks, that of a step, its time, and other layouts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from litgpt.plan.layout_options import LayoutOption
from litgpt.plan.ranks import RunPlan
from litgpt.plan.repeated_layers import Estimate
from litgpt.plan.search import SearchResult
from litgpt.plan.search_table import format_reasons
from litgpt.plan.table import (
    GIB,
    PART_NAMES,
    PlannedDevice,
    compute_allowance,
    compute_largest,
    compute_total,
    describe_peak,
)
from litgpt.plan.time_table import TIME_PART_NAMES, describe_length, format_seconds
from litgpt.recipe.to_yaml import dump_recipe, format_yaml
from litgpt.recipe.training import Training
from litgpt.train.report import render_page

Bar = dict[str, Any]
BAR_NAMES = PART_NAMES | {"allowance": "Allowance"}


def write_plan_page(
    output: Path,
    recipe: Training,
    model: str,
    plan: RunPlan | None,
    device: PlannedDevice,
    search: SearchResult | None = None,
) -> None:
    """Write the page of a plan.

    Args:
        model: its name.
        plan: of the run, or of the fastest layout that a search has found; None if there is none.
        search: the layouts that were compared with it.
    """
    available = device.available_memory
    values = {
        "model": model,
        "lead": describe_devices_and_rows(plan, device),
        "tiles": build_plan_tiles(plan, device),
        "ranks": [] if plan is None else build_rank_bars(plan, available),
        "limit": None if plan is None or available is None else 100 * available / find_scale(plan, available),
        "available": available,
        "kinds": [] if plan is None else list_shown_kinds(plan),
        "peak": "" if plan is None else describe_peak(plan.ranks[plan.worst]),
        "time": [] if plan is None or plan.time is None else build_time_bar(plan.time.parts),
        "length": "" if plan is None or plan.time is None else describe_length(plan.time, device.price_per_hour),
        "layouts": [] if search is None else build_layouts(search),
        "reasons": [] if search is None else format_reasons(search.skipped.most_common()),
        "settings": format_yaml(search.fitting[0][0].as_tree()) if search and search.fitting else "",
        "recipe": dump_recipe(recipe),
    }
    page = {
        "timeline": None if plan is None else describe_timeline(plan),
        "layouts": values["layouts"],
        "available": available,
    }
    render_page(output, "plan.html.j2", values | {"page": page}, Path(__file__).parent)


def describe_devices_and_rows(plan: RunPlan | None, device: PlannedDevice) -> str:
    """The devices, their layout and the rows of a run, in a line."""
    if plan is None:
        return device.gpu_label
    degrees = [f"{name} {degree}" for name, degree in vars(plan.dims).items() if degree > 1]
    rows = f"rows of {plan.length:,} tokens" + ("" if plan.media is None else f" and {plan.media}")
    return " · ".join([f"{plan.dims.world_size} x {device.gpu_label}", *degrees, rows])


def build_plan_tiles(plan: RunPlan | None, device: PlannedDevice) -> list[tuple[str, str]]:
    """Name and value of the figures at the top of the page."""
    if plan is None:
        return []
    total, available = compute_largest(plan), device.available_memory
    tiles = [("Memory", f"{total:.1f} GiB")]
    if available is not None:
        left = available - total
        tiles += [("Available", f"{available:.1f} GiB"), ("Fits", "yes" if left >= 0 else f"no: {-left:.1f} GiB")]
    if (time := plan.time) is not None:
        tiles += [
            ("Step", format_seconds(time.seconds).strip()),
            ("Tokens/s per GPU", f"{time.tokens_per_second_per_gpu:,.0f}"),
            ("MFU", f"{time.mfu:.1%}"),
        ]
        if time.hours is not None:
            tiles.append(("Run", f"{time.hours:,.1f} h" if time.hours >= 1 else f"{60 * time.hours:.1f} min"))
    return tiles


def find_scale(plan: RunPlan, available: float | None) -> float:
    """GiB that the whole width of the bars stands for."""
    return 1.02 * max(compute_largest(plan), available or 0.0)


def list_shown_kinds(plan: RunPlan) -> list[tuple[str, str]]:
    """Kinds of memory that any rank has, and their names."""
    return [
        (kind, name)
        for kind, name in BAR_NAMES.items()
        if kind == "allowance" or any(memory.parts[kind] > 2**20 for memory in plan.ranks.values())
    ]


def build_rank_bars(plan: RunPlan, available: float | None) -> list[Bar]:
    """The memory of each kind of rank: its parts with their GiB and their percentage of the width."""
    scale = find_scale(plan, available)
    bars = []
    for rank, memory in plan.ranks.items():
        parts = {**memory.parts, "allowance": compute_allowance(memory)}
        alike = plan.alike[rank]
        bars.append(
            {
                "label": f"Rank {rank}" + (f" ({alike} alike)" if alike > 1 else ""),
                "total": compute_total(memory),
                "host": memory.host / GIB,
                "parts": [
                    {"kind": kind, "name": name, "size": parts[kind] / GIB, "width": 100 * parts[kind] / GIB / scale}
                    for kind, name in list_shown_kinds(plan)
                ],
            }
        )
    return bars


def build_time_bar(parts: Mapping[str, float]) -> list[Bar]:
    """What a step spends its time on: names, times and percentages."""
    total = sum(parts.values())
    return [
        {"kind": kind, "name": TIME_PART_NAMES[kind], "time": format_seconds(seconds), "width": 100 * seconds / total}
        for kind, seconds in parts.items()
        if seconds
    ]


def describe_timeline(plan: RunPlan) -> dict[str, Any]:
    """The memory of the rank that needs the most over the events of a step, as JSON values, in GiB."""
    timeline = plan.ranks[plan.worst].timeline
    return {
        "events": timeline.events,
        "last": timeline.last,
        "phases": [[f"{name.replace('_', ' ')} {number}", start, end] for name, number, start, end in timeline.phases],
        "parts": [
            {"kind": kind, "name": name, "values": [round(size / GIB, 6) for size in timeline.parts[kind]]}
            for kind, name in PART_NAMES.items()
            if max(timeline.parts.get(kind, [0]))
        ],
    }


def build_layouts(search: SearchResult) -> list[dict[str, Any]]:
    """The layouts that were planned, as JSON values: those that fit, the fastest one first, and then the others."""

    def describe(pairs: Sequence[tuple[LayoutOption, Estimate]], *, fits: bool) -> list[dict[str, Any]]:
        return [
            {"settings": layout.describe(), "memory": needs.memory, "seconds": needs.seconds, "fits": fits}
            for layout, needs in pairs
        ]

    return [*describe(search.fitting, fits=True), *describe(search.too_large, fits=False)]
