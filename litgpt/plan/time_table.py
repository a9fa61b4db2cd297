"""The time of a run as a table, and as values for JSON."""

from typing import Any

from litgpt.plan.run_time import RunTime
from litgpt.recipe.columns import format_columns

TIME_PART_NAMES = {
    "matmul": "Matrix products",
    "attention": "Attention",
    "memory": "Element-wise",
    "collectives": "Waiting for ranks",
    "bubble": "Pipeline bubble",
}


def describe_time(time: RunTime, price_per_hour: float | None) -> dict[str, Any]:
    """The time of a step and of the run as JSON values; the price is that of all GPUs."""
    hours = time.hours
    price = None if hours is None or price_per_hour is None else hours * time.gpus * price_per_hour
    return {
        "step": {
            "seconds": round(time.seconds, 6),
            "tokens_per_second_per_gpu": round(time.tokens_per_second_per_gpu, 3),
            "mfu": round(time.mfu, 6),
            "parts": {name: round(seconds, 6) for name, seconds in time.parts.items()},
        },
        "run": {"steps": time.steps, "hours": hours, "price": price},
    }


def format_time(time: RunTime, price_per_hour: float | None) -> list[str]:
    """Format the time of a step by what it is spent on, the throughput, and the hours and the price of the run."""
    rows = [
        (TIME_PART_NAMES[name], f"{format_seconds(seconds)}  {seconds / time.seconds:5.0%}")
        for name, seconds in time.parts.items()
        if seconds
    ]
    rows.append(("Step", format_seconds(time.seconds)))
    rows.append(("Throughput", f"{time.tokens_per_second_per_gpu:,.0f} tokens/s per GPU, MFU {time.mfu:.1%}"))
    rows.append(("Run", describe_length(time, price_per_hour)))
    return format_columns(rows, 20, indent=0)


def format_seconds(seconds: float) -> str:
    """Format a time of a step, such as `    9.04 s`."""
    return f"{seconds:8.2f} s" if seconds >= 0.1 else f"{1000 * seconds:8.2f} ms"


def describe_length(time: RunTime, price_per_hour: float | None) -> str:
    """Describe the length of the run, and its price if that of an hour is known."""
    if time.hours is None:
        return "set train.max_steps for its hours"
    gpu_hours = time.hours * time.gpus
    length = f"{time.hours:,.1f} hours" if time.hours >= 1 else f"{60 * time.hours:.1f} minutes"
    text = f"{time.steps:,} steps in {length}, {gpu_hours:,.2f} GPU-hours"
    return text if price_per_hour is None else f"{text}, for {gpu_hours * price_per_hour:,.2f}"
