"""A comparison of several runs: their charts, their figures, and the settings that differ between their recipes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.errors import UserError
from litgpt.recipe.from_yaml import read_yaml
from litgpt.train.best_metric import BestMetric
from litgpt.train.charts import COLORS, Rows, build_comparison_charts
from litgpt.train.report import build_tiles, find_skipped, read_newest_metrics, render_page
from litgpt.train.resumed_recipe import find_differences, format_value


@dataclass(frozen=True)
class ComparedRun:
    """A run that is compared with others.

    Attributes:
        recipe: every setting; empty if it is not known.
    """

    name: str
    rows: Rows
    recipe: Mapping[str, Any]


def write_comparison(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the comparison of the newest runs in some folders as one page, and return its path.

    Args:
        output: None for comparison.html in the first folder.

    Raises:
        UserError: if there are too many runs, or a file of one is not valid.
    """
    if len(folders) > len(COLORS):
        raise UserError(f"others: {len(folders) - 1} are too many; compare at most {len(COLORS)} runs at a time")
    names = name_folders(folders)
    runs = [
        ComparedRun(name, read_newest_metrics(folder)[1], read_run_recipe(folder))
        for name, folder in zip(names, folders, strict=True)
    ]
    output = output or folders[0] / "comparison.html"
    render_page(output, "comparison.html.j2", compare_runs(runs))
    return output


def name_folders(folders: Sequence[Path]) -> list[str]:
    """The paths of folders without what all of them begin with."""
    parent = os.path.commonpath([folder.resolve().parent for folder in folders])
    return [folder.resolve().relative_to(parent).as_posix() for folder in folders]


def read_run_recipe(folder: Path) -> dict[str, Any]:
    """Every setting of a run; empty if it has written no recipe."""
    path = folder / "recipe.yaml"
    return read_yaml(str(path)) if path.is_file() else {}


def compare_runs(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """The values of the page: the names of the runs, a table of figures, one of settings, and the charts."""
    tiles = [dict(build_tiles(run.rows, find_skipped(run.rows), BestMetric(None))) for run in runs]
    labels = dict.fromkeys(label for tile in tiles for label in tile)
    return {
        "runs": [{"name": run.name, "color": color} for run, color in zip(runs, COLORS, strict=False)],
        "tiles": [(label, [tile.get(label, "") for tile in tiles]) for label in labels],
        "differences": compare_recipes([run.recipe for run in runs]),
        "page": build_comparison_charts([run.rows for run in runs]),
    }


def compare_recipes(recipes: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The settings that differ from those of the first recipe in any other one, and their values in each.

    A value is empty in a recipe that has none, as of a setting of another optimizer than the first one's.
    """
    changes = [{key: now for key, _, now in find_differences(recipes[0], recipe)} for recipe in recipes]
    first = {key: value for recipe in recipes for key, value, _ in find_differences(recipes[0], recipe)}
    table = []
    for key in first:
        parents = {key[:place] for place, character in enumerate(key) if character == "."}
        values = ["" if parents & change.keys() else change.get(key, first[key]) for change in changes]
        table.append((key, ["" if value is None else format_value(value) for value in values]))
    return table
