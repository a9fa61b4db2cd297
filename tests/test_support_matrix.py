"""The page of what is tested together claims what tests trained that passed, and no more."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from litgpt import adapt
from litgpt.train import step
from tests import support_matrix, training_records
from tests.layouts.layouts import Case, collect_facts
from tests.training_records import VARIABLE, PassedTests, Trained, read_records

LORA = Trained("next token", "LoRA", "one process", "Qwen2ForCausalLM", "64-true + base in bnb.int8-training")


def test_the_page_is_that_of_the_data() -> None:
    text = support_matrix.PAGE.read_text(encoding="utf-8")
    assert text == support_matrix.format_page(support_matrix.read_head(), support_matrix.read_data())
    assert len(text.splitlines()) > 100


def test_the_tests_of_the_data_exist() -> None:
    tests = support_matrix.read_data()
    assert support_matrix.list_missing_tests(tests) == []
    gone = ["tests/test_support_matrix.py::test_gone", "tests/gone.py::test_the_page_is_that_of_the_data"]
    assert support_matrix.list_missing_tests([*tests, *gone]) == gone


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of records, and a page that claims what a test of LoRA and one of full training have trained."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    for name in ("DATA", "PAGE"):
        monkeypatch.setattr(support_matrix, name, tmp_path / name)
    (tmp_path / "PAGE").write_text(f"# Page\n\n{support_matrix.MARK}")
    full = LORA._replace(tuner="Full", precision="32-true", layout="FSDP2 + tensor")
    support_matrix.write({"tests/test_a.py::test_lora": [LORA], "tests/test_a.py::test_full": [full]})
    rows = [["tests/test_a.py::test_lora[x]", *LORA], ["tests/test_a.py::test_full", *full]]
    (tmp_path / training_records.RECORDS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def pass_tests(*names: str, failed: str = "") -> None:
    """Report tests with these names as passed, and another as failed when it was torn down."""
    plugin = PassedTests()
    for name in filter(None, (*names, failed)):
        outcomes = {"setup": "passed", "call": "passed", "teardown": "passed" if name != failed else "failed"}
        for phase, outcome in outcomes.items():
            report = SimpleNamespace(nodeid=f"tests/test_a.py::{name}", when=phase, outcome=outcome)
            plugin.pytest_runtest_logreport(cast(Any, report))


def test_a_page_that_claims_what_no_test_backs_is_an_error(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pass_tests("test_lora[x]", failed="test_full")
    assert support_matrix.compare(records) == 1
    line = capsys.readouterr().out
    assert "cells that no test backs, such as Qwen2ForCausalLM x FSDP2" in line and line.count("\n") == 1
    assert f"python -m tests.support_matrix --records {records}" in line
    assert support_matrix.compare(records / "empty") == 1
    capsys.readouterr()
    pass_tests("test_full")  # of the second of two runs of pytest
    assert support_matrix.compare(records) == 0
    assert capsys.readouterr().out == ""


def test_a_page_that_lacks_something_is_no_error(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pass_tests("test_lora[x]", "test_full")
    support_matrix.write({"tests/test_a.py::test_lora": [LORA]})
    page = (records / "PAGE").read_text()
    assert "| base in bnb.int8-training | ✓ |" in page and "FSDP2" not in page
    assert support_matrix.compare(records) == 0
    assert "cells missing, which tests back" in capsys.readouterr().out
    support_matrix.write(read_records(records))
    assert "| FSDP2 + tensor | next token |" in (records / "PAGE").read_text()


def test_steps_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    for module, name in ((step, "run_batches"), (adapt, "attach")):
        monkeypatch.setattr(module, name, inspect.unwrap(getattr(module, name)))  # those of the session's recording
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    training_records.observe_training()
    collect_facts(Case("tied", tuner="lora", quantize="bnb.int8-training"))
    collect_facts(Case("predictions", objective="predictions"))
    collect_facts(Case("tied", objective="simpo"))
    with training_records.stop_recording():
        collect_facts(Case("gemma"))
    (tmp_path / training_records.PASSED).write_text(json.dumps(request.node.nodeid) + "\n")
    (trained,) = read_records(tmp_path).values()
    full = Trained("simpo", "Full", "one process", "Qwen2ForCausalLM", "64-true")
    predictions = full._replace(objective="multi-token prediction", architecture="DeepseekV3ForCausalLM")
    assert trained == {LORA, full, predictions}
