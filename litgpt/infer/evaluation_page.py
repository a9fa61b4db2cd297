"""The scores of an evaluation as a table in the terminal, and as a page that needs no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.files import write_text

SAMPLES_PER_TASK = 5
ARROWS = {"True": "↑", "False": "↓"}


@dataclass(frozen=True)
class Score:
    """One metric of a task.

    Attributes:
        shots: the number of solved examples in each prompt.
        direction: an arrow up if more is better, one down if less is, or nothing if that is not known.
        value: a number, or a text if the metric is not one.
        error: the standard error of the mean; None if it is not known.
    """

    task: str
    metric: str
    shots: str
    direction: str
    value: float | str
    error: float | None

    @property
    def texts(self) -> tuple[str, str, str, str, str]:
        """The texts of a row of a table."""
        value = f"{self.value:.4f}" if isinstance(self.value, float) else str(self.value)
        error = "" if self.error is None else f"± {self.error:.4f}"
        return self.task, self.shots, f"{self.metric} {self.direction}".strip(), value, error


HEADER = ("Task", "Shots", "Metric", "Value", "Error")


def list_scores(results: Mapping[str, Any]) -> list[Score]:
    """The scores in the results of lm-eval, those of groups too, of a text, and of prompts with answers."""
    scores = []
    for task, values in (results.get("results", {}) | results.get("groups", {})).items():
        directions = results.get("higher_is_better", {}).get(task) or {}
        for key, value in values.items():
            metric, separator, filter_name = key.partition(",")
            if not separator or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            scores.append(
                Score(
                    task=str(values.get("alias", task)).strip(" -"),
                    metric=metric if filter_name == "none" else f"{metric} ({filter_name})",
                    shots=str(results.get("n-shot", {}).get(task, "")),
                    direction=ARROWS.get(str(directions.get(metric)), ""),
                    value=float(value) if isinstance(value, int | float) else str(value),
                    error=error if isinstance(error, float) else None,
                )
            )
    for metric in ("bits_per_byte", "token_perplexity") if "text" in results else ():
        text = results["text"]
        scores.append(Score(text["file"], metric, "", "↓", text[metric], None))
    if "prompts" in results:
        values = results["prompts"]
        error = values["exact_match_stderr"]
        scores.append(Score(values["file"], "exact_match", "0", ARROWS["True"], values["exact_match"], error))
    return scores


def print_scores(scores: Sequence[Score]) -> None:
    """Print a table of scores to stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADER)
    for column in table.columns[3:]:
        column.justify = "right"
    for score in scores:
        table.add_row(*score.texts)
    console = Console(markup=False)
    console.width = console.width if console.is_terminal else 100  # a file is not cut at a terminal's 80 columns
    console.print(table)


def write_page(path: Path, title: str, facts: Mapping[str, str], results: Mapping[str, Any]) -> None:
    """Write a page with the scores, and the first samples of each task.

    Args:
        facts: what was evaluated, and how.
        results: of lm-eval, with `samples`.
    """
    from jinja2 import Environment, FileSystemLoader

    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("evaluation.html.j2")
    samples = {task: rows[:SAMPLES_PER_TASK] for task, rows in results.get("samples", {}).items()}
    rows = [score.texts for score in list_scores(results)]
    shown = {task: [describe_sample(row) for row in rows] for task, rows in samples.items()}
    write_text(path, page.render(title=title, facts=facts, header=HEADER, rows=rows, samples=shown))


def describe_sample(row: Mapping[str, Any]) -> dict[str, str]:
    """The prompt, the target, the answer of the model and the metrics of a sample of lm-eval."""
    values = ", ".join(f"{name} {row[name]}" for name in row.get("metrics", []) if name in row)
    return {
        "prompt": "".join(map(str, row["arguments"][0][:1])),
        "target": str(row.get("target", "")),
        "answer": "\n".join(str(answer) for answer in row.get("filtered_resps", [])),
        "metrics": values,
    }
