"""The layouts that a search found as a table, and as values for JSON."""

from collections.abc import Iterable
from typing import Any

from litgpt.plan.layout_options import LayoutOption
from litgpt.plan.repeated_layers import Estimate
from litgpt.plan.search import SearchResult
from litgpt.recipe.columns import format_columns
from litgpt.recipe.to_yaml import format_yaml

REASONS = 5  # that are shown of each kind


def describe_search(result: SearchResult) -> dict[str, Any]:
    """The layouts as JSON values, the fastest one that fits first."""
    return {
        "fits": [describe_layout(*pair) for pair in result.fitting],
        "too_large": [describe_layout(*pair) for pair in result.too_large],
        "legal": result.legal,
        "skipped": dict(result.skipped),
        "refused": dict(result.refused),
    }


def describe_layout(layout: LayoutOption, estimate: Estimate) -> dict[str, Any]:
    """A layout and what it needs as JSON values."""
    return {"settings": layout.as_tree(), "peak_gib": round(estimate.memory, 3), "seconds": round(estimate.seconds, 6)}


def format_search(result: SearchResult, label: str, memory: float) -> str:
    """Format the layouts that fit, why others do not, and the settings of the fastest one.

    Args:
        label: of the GPUs.
        memory: GiB of each.
    """
    refused = sum(result.refused.values())
    lines = [f"Layouts of {label}: {result.legal} are legal, {refused} are not"]
    lines += ["", "Fit, the fastest first", *format_layouts(result.fitting)]
    if result.too_large:
        lines += ["", f"Do not fit into {memory:g} GiB", *format_layouts(result.too_large)]
    if result.skipped:
        lines += ["", "Not planned", *format_reasons(result.skipped.most_common())]
    if result.refused:
        lines += ["", "Not legal", *format_reasons(result.refused.most_common(REASONS))]
    if result.fitting:
        fastest = format_yaml(result.fitting[0][0].as_tree())
        lines += ["", "# the fastest one", fastest.rstrip()]
    return "\n".join(lines)


def format_layouts(pairs: Iterable[tuple[LayoutOption, Estimate]]) -> list[str]:
    """Format layouts with their seconds per step and GiB, a line each."""
    rows = [(f"{needs.seconds:8.2f} s {needs.memory:7.1f} GiB", layout.describe()) for layout, needs in pairs]
    return format_columns(rows, 24, indent=0) or ["none"]


def format_reasons(reasons: Iterable[tuple[str, int]]) -> list[str]:
    """Format reasons with the number of layouts that each of them excludes."""
    return format_columns([(f"{count:5}", reason) for reason, count in reasons], 8, indent=0)
