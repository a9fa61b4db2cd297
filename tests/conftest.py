"""Fixtures for tests of several rooms."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from litgpt import cli
from litgpt.data.read.python_docs import write_python_docs
from tests import training_records

LONG_SECONDS = 900
"""A test with such a time limit, or a higher one, runs before others; those stay in the order of their files."""


class Outcome(NamedTuple):
    """The result of a command line: exit code, recipe, stdout and stderr."""

    code: int
    recipe: Any
    out: str
    err: str

    def error_line(self, code: int = 2) -> str:
        """The error in the only line of stderr, after a check of the exit code and that no command ran."""
        assert self.code == code
        assert self.recipe is None
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("litgpt: error: "), self.err
        return lines[0].removeprefix("litgpt: error: ")


USER_MODULE = '''
from dataclasses import dataclass
from litgpt.recipe.data import DataModule


@dataclass
class Letters(DataModule):
    """Letters in a row."""

    path: str
    copies: int = 3
    share: float | None = None

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None): ...
    def train_stream(self, shape): ...
    def val_stream(self, shape): ...
'''


@pytest.fixture
def litgpt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Parse a command line, and return the recipe instead of running the command."""
    real = cli.import_object

    def run(*argv: str) -> Outcome:
        recipes: list[Any] = []

        def replace_command(path: str) -> Any:
            if "early_checks" in path:
                return lambda _recipe: None
            return recipes.append if path.endswith(":run") else real(path)

        monkeypatch.setattr(cli, "import_object", replace_command)
        code = cli.main([str(word) for word in argv])
        return Outcome(code, recipes[0] if recipes else None, *capsys.readouterr())

    return run


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The dotted path of a data module in a file of the user."""
    (tmp_path / "own_letters.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_letters.Letters"


@pytest.fixture(scope="session")
def python_docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a `PythonDocs` whose text is written, by one of the workers for all of them."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    (shared / "python-docs").mkdir(exist_ok=True)
    write_python_docs(shared / "python-docs")
    return shared / "python-docs"


@pytest.fixture(autouse=True)
def keep_process_alone() -> Iterator[None]:
    """Restore the environment, where libraries look for a rank, and check that no process group is left.

    A run in a process with a group ends the process.
    """
    with mock.patch.dict(os.environ):
        yield
    distributed = sys.modules.get("torch.distributed")
    assert distributed is None or not distributed.is_initialized(), "the test leaves a process group"


def pytest_configure(config: pytest.Config) -> None:
    """Record what the tests train, if an environment variable says so."""
    training_records.observe_training()
    if training_records.VARIABLE in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(training_records.PassedTests())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that may take longest first, so that no worker waits for them at the end."""
    items.sort(key=lambda item: -find_limit(item) if find_limit(item) >= LONG_SECONDS else 0)


def find_limit(item: pytest.Item) -> float:
    """The time limit of a test in seconds; 0 for that of all others."""
    marker = item.get_closest_marker("timeout")
    return 0 if marker is None else float(marker.args[0] if marker.args else marker.kwargs["timeout"])
