"""Terminal output of a run: a progress line that is updated in place, and a summary at the end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from litgpt.phases import Display, Phase

TASK_PREFIX = "tasks/"
"""What the names of the scores on tasks begin with in the logs."""


def format_duration(seconds: float) -> str:
    """Format seconds as h:mm:ss; days are counted as hours."""
    total = round(seconds)
    return f"{total // 3600}:{total % 3600 // 60:02}:{total % 60:02}"


def format_trained(trained: int, total: int) -> str:
    """Format how many of a model's parameters are trained."""
    return "all trained" if trained == total else f"{trained:,} trained ({trained / total:.2%})"


def format_progress(
    metrics: Mapping[str, float],
    total_steps: int | None = None,
    fraction: float | None = None,
    width: int | None = None,
) -> str:
    """Format the state of a run as one line; metrics that were not measured are left out.

    Args:
        width: columns of the terminal, in which the first parts that fit are shown; None for all parts.
    """
    speed = metrics.get("items_per_sec", metrics.get("device/items_per_sec"))
    remaining = metrics.get("remaining_time")
    parts = (
        (f"step {{:,.0f}}{f'/{total_steps:,}' if total_steps else ''}", metrics.get("step", 0)),
        ("{} left", None if remaining is None else format_duration(remaining)),
        ("loss {:.3f}", metrics.get("loss")),
        ("val {:.3f}", metrics.get("val_loss")),
        ("accuracy {:.2f}", metrics.get("rewards/accuracies")),
        ("margin {:.3f}", metrics.get("rewards/margins")),
        ("skipped {:.0f}", metrics.get("skipped_steps") or None),
        ("{:,.0f} tokens/s", speed),
        ("lr {:.2e}", metrics.get("learning_rate")),
        ("{:.1f} GB", metrics.get("memory_gb")),
        ("MFU {:.1%}", metrics.get("device/mfu")),
        ("epoch {:.2f}", metrics.get("epoch")),
        ("{:.0%}", fraction),
    )
    line = ""
    for form, value in parts:
        part = "" if value is None else " | " * bool(line) + form.format(value)
        if width is not None and len(line + part) >= width:
            break
        line += part
    return line


def render_validation(metrics: Mapping[str, float]) -> str:
    """Format the metrics of an evaluation as one line."""
    forms = {
        "val_loss": "val loss {:.4f}",
        "val_ppl": "val ppl {:.1f}",
        "val_rewards/accuracies": "val accuracy {:.3f}",
        "val_rewards/margins": "val margin {:.4f}",
    }
    forms |= {name: name.removeprefix(TASK_PREFIX) + " {:.4f}" for name in metrics if name.startswith(TASK_PREFIX)}
    return ", ".join(form.format(metrics[name]) for name, form in forms.items() if name in metrics)


class RunConsole:
    """A progress line at the bottom of the terminal; without a terminal, every update prints a line.

    Args:
        total_steps: optimizer steps of the whole run; None if it has no limit on steps.
        enabled: whether to print; only the first rank does.
    """

    def __init__(self, *, total_steps: int | None = None, enabled: bool = True, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        self.total_steps, self.enabled = total_steps, enabled
        self.metrics: dict[str, float] = {}
        self.fraction: float | None = None
        self.phase: Phase | None = None
        self.is_running = False  # between the first and the last step
        self.display = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> "RunConsole":
        self.is_running = True
        if self.enabled and self.console.is_terminal:
            self.display.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.is_running = False
        self.display.stop()

    def update(self, metrics: Mapping[str, float], fraction: float | None = None) -> None:
        """Show new values; metrics missing from this update keep their last value, such as the validation loss.

        Args:
            fraction: share of the run that is done, 0 to 1.
        """
        self.metrics |= metrics
        self.fraction = fraction
        if self.enabled and self.console.is_terminal:
            self.refresh()
        elif self.enabled:
            self.print_line(format_progress(self.metrics, self.total_steps, fraction))

    def show_phase(self, phase: Phase | None) -> None:
        """Show a phase in front of the progress line; without a terminal, print its name once."""
        previous, self.phase = self.phase, phase
        if self.enabled and self.console.is_terminal:
            self.display.start()
            self.refresh()
            if phase is None and not self.is_running:
                self.display.stop()
        elif self.enabled and phase is not None and phase is not previous:
            self.print_line(f"{phase.name} ...")

    def refresh(self) -> None:
        """Write the progress line again."""
        start = "" if self.phase is None else f"{self.phase.describe()}, {format_duration(self.phase.seconds)}"
        width = self.console.width - len(start) - 3 * bool(start)
        line = format_progress(self.metrics, self.total_steps, self.fraction, width) if self.metrics else ""
        text = Text(" | ".join(filter(None, (start, line))), no_wrap=True, overflow="ellipsis")
        self.display.update(text, refresh=True)

    def print_line(self, text: str) -> None:
        """Print one line, however long."""
        self.console.print(text, highlight=False, markup=False, no_wrap=True, crop=False, overflow="ignore")

    def print(self, text: RenderableType) -> None:
        """Print text that stays, above the progress line."""
        if self.enabled:
            self.console.print(text, highlight=False, markup=False)


def build_phase_display(*, enabled: bool) -> Display:
    """The display of the phases of a command that has no progress line of its own, on stderr."""
    return RunConsole(enabled=enabled, console=Console(stderr=True, soft_wrap=True)).show_phase


@dataclass(frozen=True)
class RunSummary:
    """Results of a run, for the summary at its end."""

    reason: str
    """Why the run ended, such as `all 100 steps are done`."""
    steps: int
    """Optimizer steps since the first start."""
    steps_run: int
    """Optimizer steps of this run; fewer than `steps` if it was resumed."""
    tokens: int
    """Tokens trained on since the first start, over all ranks."""
    tokens_run: int
    """Tokens trained on in this run."""
    tokens_per_sec: float | None
    """Throughput of this run over all ranks, of all steps but the first one; None after fewer than two steps."""
    training_seconds: float
    """Seconds of this run spent training."""
    other_seconds: Mapping[str, float] = field(default_factory=dict)
    """Other seconds of this run, by activity, such as `evaluation` and `saving`."""
    last_loss: float | None = None
    val_losses: Mapping[int, float] = field(default_factory=dict)
    """Validation loss by step."""
    skipped_steps: int = 0
    spikes: int = 0
    memory_gb: float | None = None
    checkpoint: Path | None = None
    """The newest checkpoint to resume from."""
    best: str | None = None
    """The best metric, and the checkpoint of its step."""
    uploads: tuple[str, ...] = ()
    """The destinations of checkpoints, and how many were uploaded."""
    final: Path | None = None
    """The folder of the finished model."""
    report: Path | None = None
    """The HTML report."""


def render_summary(summary: RunSummary) -> RenderableType:
    """Render the summary as a box."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in build_summary_rows(summary):
        if value is not None:
            table.add_row(name, Text(value))
    return Panel(table, title="Training ended", title_align="left", expand=False)


def build_summary_rows(summary: RunSummary) -> list[tuple[str, str | None]]:
    """Name and value of each row of the summary; None for values that are left out."""
    resumed = summary.steps_run != summary.steps
    steps, tokens = (
        f"{total:,} ({in_run:,} in this run)" if resumed else f"{total:,}"
        for total, in_run in ((summary.steps, summary.steps_run), (summary.tokens, summary.tokens_run))
    )
    times = [("training", summary.training_seconds), *summary.other_seconds.items()]
    speed = None if summary.tokens_per_sec is None else f"{summary.tokens_per_sec:,.0f}, mean after the first step"
    return [
        ("Why", summary.reason),
        ("Steps", steps),
        ("Tokens", tokens),
        ("Time", ", ".join(f"{name} {value:.1f} s" for name, value in times)),
        ("Tokens/s", speed),
        ("Loss", None if summary.last_loss is None else f"{summary.last_loss:.4f}"),
        ("Validation loss", format_validation(summary.val_losses)),
        ("Skipped steps", f"{summary.skipped_steps:,} (gradient not finite)" if summary.skipped_steps else None),
        ("Loss spikes", f"{summary.spikes:,}" if summary.spikes else None),
        ("Memory", None if summary.memory_gb is None else f"{summary.memory_gb:.2f} GB at most"),
        ("Checkpoint", None if summary.checkpoint is None else str(summary.checkpoint)),
        ("Best", summary.best),
        *(("Uploads", uploads) for uploads in summary.uploads),
        ("Model", None if summary.final is None else str(summary.final)),
        ("Report", None if summary.report is None else str(summary.report)),
    ]


def format_validation(losses: Mapping[int, float]) -> str | None:
    """Format the last of the losses by step, and the best one if it differs; None without losses."""
    if not losses:
        return None
    last, best_step = losses[max(losses)], min(losses, key=lambda step: losses[step])
    best = losses[best_step]
    return f"{last:.4f}, best {best:.4f} at step {best_step:,}" if best < last else f"{last:.4f}"
