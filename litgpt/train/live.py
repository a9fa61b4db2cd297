"""What a person sees of a run: one line that stays up to date, and a report at the end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live as RichLive
from rich.panel import Panel
from rich.table import Table
from rich.text import Text


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss; the days stay in the hours."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"


def line(metrics: Mapping[str, float], total_steps: int | None = None, fraction: float | None = None) -> str:
    """The state of a run as one line; what was not measured is not in it."""
    speed = metrics.get("items_per_sec", metrics.get("device/items_per_sec"))
    step = f"step {metrics.get('step', 0):,.0f}" + (f"/{total_steps:,}" if total_steps else "")
    shown = (
        ("{:.0%}", fraction),
        ("loss {:.3f}", metrics.get("loss")),
        ("val {:.3f}", metrics.get("val_loss")),
        ("{:,.0f} tokens/s", speed),
        ("MFU {:.1%}", metrics.get("device/mfu")),
        ("{:.1f} GB", metrics.get("memory_gb")),
        ("lr {:.2e}", metrics.get("learning_rate")),
        ("epoch {:.2f}", metrics.get("epoch")),
        ("skipped {:.0f}", metrics.get("skipped_steps") or None),
    )
    parts = [step, *(form.format(value) for form, value in shown if value is not None)]
    if (left := metrics.get("remaining_time")) is not None:
        parts.append(f"{duration(left)} left")
    return " | ".join(parts)


class Live:
    """One line at the foot of the terminal; where there is no terminal, an ordinary line for every update."""

    def __init__(self, *, total_steps: int | None = None, enabled: bool = True, console: Console | None = None) -> None:
        """
        Args:
            total_steps: the optimizer steps of the whole run, if it ends on a step.
            enabled: False on every rank but the first, which alone prints.
        """
        self.console = console or Console(soft_wrap=True)
        self.total_steps, self.enabled = total_steps, enabled
        self.metrics: dict[str, float] = {}
        self.display = RichLive(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Live":
        if self.enabled and self.console.is_terminal:
            self.display.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.display.stop()

    def update(self, metrics: Mapping[str, float], fraction: float | None = None) -> None:
        """Show new values; those of earlier updates stay where there are none, such as the validation loss.

        Args:
            fraction: the share of the run that is done, 0 to 1.
        """
        self.metrics |= metrics
        if not self.enabled:
            return
        text = Text(line(self.metrics, self.total_steps, fraction), no_wrap=True, overflow="ellipsis")
        if self.console.is_terminal:
            self.display.update(text, refresh=True)
        else:
            self.console.print(text, highlight=False, no_wrap=True, crop=False, overflow="ignore")

    def say(self, text: RenderableType) -> None:
        """Print something that stays, above the live line."""
        if self.enabled:
            self.console.print(text, highlight=False, markup=False)


@dataclass(frozen=True)
class Outcome:
    """What a run came to, for its end report."""

    reason: str
    """Why it ended, such as `max_steps: 100 reached`."""
    steps: int
    """Optimizer steps since the first start."""
    steps_run: int
    """Those of this run, which began at a checkpoint if they are fewer."""
    tokens: int
    """Tokens trained on since the first start, over all devices."""
    tokens_run: int
    """Those of this run."""
    training_seconds: float
    """Seconds of this run that were spent training."""
    apart_seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds of this run that were not, by what they were spent on."""
    last_loss: float | None = None
    last_val_loss: float | None = None
    best_val_loss: float | None = None
    best_val_step: int | None = None
    skipped_steps: int = 0
    spikes: int = 0
    memory_gb: float | None = None
    checkpoints: Path | None = None
    """The newest checkpoint that training can go on from."""
    final: Path | None = None
    """The finished model folder."""
    report: Path | None = None
    """The HTML page."""


def end_report(outcome: Outcome) -> RenderableType:
    """A box with everything that `outcome` knows."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in report_rows(outcome):
        table.add_row(name, Text(value))
    return Panel(table, title="Training ended", title_align="left", expand=False)


def report_rows(outcome: Outcome) -> list[tuple[str, str]]:
    """Name and value of every line of the end report."""
    resumed = outcome.steps_run != outcome.steps
    of_run = f" ({outcome.steps_run:,} in this run)" if resumed else ""
    tokens_of_run = f" ({outcome.tokens_run:,} in this run)" if resumed else ""
    seconds = outcome.training_seconds
    speed = f"{outcome.tokens_run / seconds:,.0f} of this run's training time" if seconds > 0 else None
    rows: list[tuple[str, str | None]] = [
        ("Why", outcome.reason),
        ("Steps", f"{outcome.steps:,}{of_run}"),
        ("Tokens", f"{outcome.tokens:,}{tokens_of_run}"),
        ("Time", times(outcome)),
        ("Tokens/s", speed),
        ("Loss", None if outcome.last_loss is None else f"{outcome.last_loss:.4f}"),
        ("Validation loss", validation(outcome)),
        ("Skipped steps", f"{outcome.skipped_steps:,} (gradient not finite)" if outcome.skipped_steps else None),
        ("Loss spikes", f"{outcome.spikes:,}" if outcome.spikes else None),
        ("Memory", None if outcome.memory_gb is None else f"{outcome.memory_gb:.2f} GB at most"),
        ("Checkpoint", None if outcome.checkpoints is None else str(outcome.checkpoints)),
        ("Model", None if outcome.final is None else str(outcome.final)),
        ("Report", None if outcome.report is None else str(outcome.report)),
    ]
    return [(name, value) for name, value in rows if value is not None]


def times(outcome: Outcome) -> str:
    """The seconds of a run, training and the rest apart."""
    apart = (f"{name} {seconds:.1f} s" for name, seconds in outcome.apart_seconds.items())
    return ", ".join([f"training {outcome.training_seconds:.1f} s", *apart])


def validation(outcome: Outcome) -> str | None:
    """The last validation loss, and the best one if it was another."""
    if outcome.last_val_loss is None:
        return None
    best = outcome.best_val_loss
    if best is None or best >= outcome.last_val_loss:
        return f"{outcome.last_val_loss:.4f}"
    where = "" if outcome.best_val_step is None else f" at step {outcome.best_val_step:,}"
    return f"{outcome.last_val_loss:.4f}, best {best:.4f}{where}"
