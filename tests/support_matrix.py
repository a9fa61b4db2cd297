"""The tables of `tutorials/support_matrix.md`: what the tests train, as they recorded it.

python -m tests.support_matrix                          runs all tests, and writes the page from what they trained
python -m tests.support_matrix tests/layouts -m slow    runs these, and replaces what the page has of them
python -m tests.support_matrix --records FOLDER         writes the page from what tests recorded that ran before
python -m tests.support_matrix --compare FOLDER         compares the page with that
"""

import ast
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.tuner import TUNERS
from tests.training_records import VARIABLE, Trained, read_records

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "tutorials" / "support_matrix.md"
DATA = Path(__file__).with_suffix(".json")
COMMAND = "python -m tests.support_matrix"
MARK = f"<!-- The tables below are generated: {COMMAND} -->\n"
AXES = ("one process", "DDP", "FSDP2", "HSDP", "tensor", "sequence", "context", "pipeline", "expert", "expert_tensor")
ORDER = {name: place for place, name in enumerate((*AXES, *TUNERS, *PRECISIONS, "next token"))}
TABLES = {
    "Objectives and tuners": ("objective", "tuner"),
    "Objectives and layouts": ("objective", "layout"),
    "Tuners and layouts": ("tuner", "layout"),
    "Objectives and precisions": ("objective", "precision"),
    "Precisions and layouts": ("precision", "layout"),
    "Tuners and precisions": ("precision", "tuner"),
    "Architectures and layouts": ("architecture", "layout"),
    "Architectures and tuners": ("architecture", "tuner"),
}
Tests = Mapping[str, Iterable[Trained]]
Cell = tuple[str, str, str]


def list_values(trained: Trained, field: str) -> list[str]:
    """The values of a field; those of a layout are its axes, without the method of each."""
    values = getattr(trained, field).split(" + ")
    return [value.partition(":")[0] for value in values] if field == "layout" else values


def iter_cells(tests: Tests) -> Iterator[Cell]:
    """Yield the title, the row and the column of every cell that a test backs."""
    for trained in {item for rows in tests.values() for item in rows}:
        for title, (row_field, column_field) in TABLES.items():
            for row in list_values(trained, row_field):
                for column in list_values(trained, column_field):
                    yield title, row, column
        yield "Combinations", trained.layout, trained.objective


def sort_names(names: Iterable[str]) -> list[str]:
    """Names without repetitions: known ones in their order, then others by the alphabet."""
    return sorted(set(names), key=lambda name: (ORDER.get(name, len(ORDER)), name.lower()))


def format_table(cells: set[tuple[str, str]], heading: str) -> str:
    """A table with a tick in each of the cells, which are pairs of a row and a column."""
    columns = sort_names(column for _, column in cells)
    lines = [f"| {heading} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in sort_names(row for row, _ in cells):
        marks = ["✓" if (row, column) in cells else "" for column in columns]
        lines.append(f"| {row} | {' | '.join(marks)} |")
    return "\n".join(lines)


def format_combinations(cells: set[tuple[str, str]]) -> str:
    """A table of the layouts with several axes, and the objectives that each was trained with."""
    objectives: dict[str, set[str]] = defaultdict(set)
    for layout, objective in cells:
        if len(set(layout.split(" + ")) - {"sequence"}) > 1:
            objectives[layout].add(objective)
    lines = [f"| {layout} | {', '.join(sort_names(names))} |" for layout, names in sorted(objectives.items())]
    return "\n".join(["| layout | objectives |", "|---|---|", *lines])


def format_page(head: str, tests: Tests) -> str:
    """The page: a part that is written by hand, and the tables."""
    tables: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for title, row, column in iter_cells(tests):
        tables[title].add((row, column))
    sections = [f"## {title}\n\n{format_table(tables[title], fields[0])}" for title, fields in TABLES.items()]
    sections.append(f"## Combinations of axes\n\n{format_combinations(tables['Combinations'])}")
    return head + MARK + "\n" + "\n\n".join(sections) + "\n"


def read_head() -> str:
    """The part of the page that is written by hand."""
    return PAGE.read_text(encoding="utf-8").partition(MARK)[0]


def read_data() -> dict[str, list[Trained]]:
    """What each test function trains, as committed."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    return {test: [Trained(*row.split(" | ")) for row in rows] for test, rows in data.items()}


def write(tests: Tests) -> None:
    """Write the data and the page."""
    data = {test: sorted(" | ".join(row) for row in rows) for test, rows in sorted(tests.items()) if rows}
    DATA.write_text(json.dumps(data, indent=0) + "\n", encoding="utf-8")
    PAGE.write_text(format_page(read_head(), read_data()), encoding="utf-8")


def list_missing_tests(tests: Iterable[str]) -> list[str]:
    """The test functions that no file defines."""
    defined: dict[str, set[str]] = {}
    for name in {test.partition("::")[0] for test in tests}:
        path = ROOT / name
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
        defined[name] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return [test for test in tests if test.rpartition("::")[2] not in defined[test.partition("::")[0]]]


def compare(folder: Path) -> int:
    """Compare the page with what tests have recorded; 1 if it has a cell that no test backs, else 0."""
    claimed, backed = set(iter_cells(read_data())), set(iter_cells(read_records(folder)))
    cure = f"{COMMAND} --records {folder}"
    for cells, text in ((claimed - backed, "that no test backs"), (backed - claimed, "missing, which tests back")):
        if cells:
            title, row, column = min(cells)
            print(f"{PAGE.name}: {len(cells)} cells {text}, such as {row} x {column} ({title}); run {cure}")
    return int(not claimed <= backed)


def run_tests(arguments: list[str]) -> Path:
    """Run tests, and return the folder of what they have recorded."""
    folder = ROOT / "build" / "training-records"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ[VARIABLE] = str(folder)
    os.environ.pop("LITGPT_TEST_ASSETS", None)  # the page has what everybody can run
    if code := pytest.main(["-q", *(arguments or ["-n", "2", "-m", "slow or not slow"])]):
        print(f"pytest ended with {code}: the tests that failed back nothing")
    return folder


def main(arguments: list[str]) -> int:
    """Run tests if none have run, and write or compare the page."""
    match arguments:
        case ["--compare", folder]:
            return compare(Path(folder))
        case ["--records", folder]:
            write(read_records(Path(folder)))
        case []:
            write(read_records(run_tests([])))
        case _:
            tests = read_data() | read_records(run_tests(arguments))
            missing = list_missing_tests(tests)
            write({test: rows for test, rows in tests.items() if test not in missing})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
