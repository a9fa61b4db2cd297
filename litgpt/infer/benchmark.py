"""Figures of LitGPT's `LLM.benchmark`: for each key, a list with one value for each call."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

BENCHMARK_KEYS = (
    "Seconds total",
    "Seconds to first token",
    "Tokens generated",
    "Inference speed in tokens/sec",
    "Total GPU memory allocated in GB",
)


def benchmark_dict_to_markdown_table(figures: Mapping[str, Sequence[float]]) -> str:
    """A Markdown table with the mean of each figure and its standard deviation over the calls.

    The deviation is that of a sample, and empty for a single call.
    """
    lines = ["| Metric | Mean | Std Dev |", "|---|---|---|"]
    for key, values in figures.items():
        deviation = f"{stdev(values):.2f}" if len(values) > 1 else ""
        lines.append(f"| {key} | {mean(values):.2f} | {deviation} |")
    return "\n".join(lines)
