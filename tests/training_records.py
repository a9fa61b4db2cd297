"""What the tests train: a record of the configuration of each training step that a test takes, in any of its processes.

Records are collected if `LITGPT_TRAINING_RECORDS` names a folder. Then `litgpt.train.step` is observed, which all
training goes through, in the processes of pytest and in those that `tests.processes` starts.
"""

import functools
import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from weakref import WeakKeyDictionary

import pytest

VARIABLE = "LITGPT_TRAINING_RECORDS"
TEST_VARIABLE = "PYTEST_CURRENT_TEST"  # which pytest sets
RECORDS, PASSED = "records.jsonl", "passed.jsonl"


class Trained(NamedTuple):
    """One configuration; several values of a field, such as axes of parallelism, are joined by " + "."""

    objective: str
    tuner: str
    layout: str
    architecture: str
    precision: str


def observe_training() -> None:
    """Record the configurations that this process and its forks train, if `LITGPT_TRAINING_RECORDS` is set."""
    if VARIABLE not in os.environ:
        return
    from litgpt import adapt
    from litgpt.train import step

    path = Path(os.environ[VARIABLE]) / RECORDS
    run_batches, attach = step.run_batches, adapt.attach
    if hasattr(run_batches, "__wrapped__"):
        return
    tuners: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
    recorded: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()

    @functools.wraps(attach)
    def attach_observed(model: Any, settings: Any) -> None:
        attach(model, settings)
        tuners[model] = type(settings).__name__

    @functools.wraps(run_batches)
    def run_batches_observed(train_state: Any, batches: Any, objective: Any, **arguments: Any) -> Any:
        loss = run_batches(train_state, batches, objective, **arguments)
        model, test = train_state.core, os.environ.get(TEST_VARIABLE, "").rpartition(" (")[0]
        keys = recorded.setdefault(model, set())
        key = (test, objective.loss)
        is_real = type(loss).__name__ != "FakeTensor" and os.environ.get("RANK", "0") == "0"
        if test and is_real and key not in keys:
            keys.add(key)
            trained = describe_training(train_state, objective, tuners.get(model, "Full"))
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([test, *trained]) + "\n")
        return loss

    adapt.attach, step.run_batches = attach_observed, run_batches_observed


@contextmanager
def stop_recording() -> Iterator[None]:
    """Record nothing of what is trained in this context, whose results are wrong on purpose."""
    with mock.patch.dict(os.environ, {TEST_VARIABLE: ""}):
        yield


def describe_training(train_state: Any, objective: Any, tuner: str) -> Trained:
    """The configuration of a training step."""
    from litgpt.model.registry import find_family

    config = train_state.core.config
    family = find_family(config)
    architecture = family.architectures[0] if family else "no published one"
    layout, precision = describe_layout(train_state), describe_precision(train_state)
    return Trained(describe_objective(objective), tuner, " + ".join(layout), architecture, " + ".join(precision))


def describe_objective(objective: Any) -> str:
    """The name of an objective, by the settings that its loss uses."""
    settings = inspect.getclosurevars(objective.loss).nonlocals
    if "preference" in settings:
        types = settings["preference"].types
        return types[0] if len(types) == 1 else "a sum of losses"
    if not objective.has_perplexity:
        return "a loss of the user"
    if any(name.startswith("prediction_loss") for name in objective.metrics):
        return "multi-token prediction"
    return {"ce": "next token", "dft": "next token, dynamic (dft)"}[settings["settings"].type]


def describe_layout(train_state: Any) -> list[str]:
    """The axes of a layout, by their names in a recipe where they have one."""
    from litgpt.parallel.context_attention import ATTENTIONS

    if train_state.mesh is None:
        return ["one process"]
    dims, tokens, pipeline = train_state.mesh.dims, train_state.local_tokens, train_state.pipeline
    data = {(True, True): "HSDP", (True, False): "DDP", (False, True): "FSDP2"}
    names = [data.get((dims.data_replicate > 1, dims.data_shard > 1), "")]
    if dims.tensor > 1:
        rows_per_shard = 2 * dims.context if dims.context > 1 else 1
        names += ["tensor", "sequence" * (tokens.multiple == dims.tensor * rows_per_shard)]
    if dims.context > 1:
        method = next(name for name, cls in ATTENTIONS.items() if cls is type(tokens.attention))
        names.append(f"context: {method}")
    if pipeline is not None:
        names.append(f"pipeline: {pipeline.schedule}")
    names += [name for name in ("expert", "expert_tensor") if getattr(dims, name) > 1]
    return [name for name in names if name] or ["one process"]


def describe_precision(train_state: Any) -> list[str]:
    """The data types of a model, and the formats of its products and of its quantized base, if it has them."""
    from litgpt.adapt.quantization import QUANT_FORMATS
    from litgpt.parallel.precision import PRECISIONS

    given = (train_state.precision.storage, train_state.precision.compute)
    names = [name for name, precision in PRECISIONS.items() if (precision.storage, precision.compute) == given]
    modules = list(train_state.core.modules())
    formats = {module.quant_format for module in modules if hasattr(module, "quant_format")}
    names += [f"base in {name}" for name, kind in QUANT_FORMATS.items() if kind in formats]
    return names + ["FP8"] * any(hasattr(module, "fp8_unit") for module in modules)


class PassedTests:
    """A plugin that writes the ids of the tests that passed, each when it ends."""

    def __init__(self) -> None:
        self.phases: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take note of the outcome of one phase of a test; the last one is `teardown`."""
        self.phases.setdefault(report.nodeid, []).append(report.outcome)
        if report.when == "teardown" and self.phases.pop(report.nodeid) == ["passed"] * 3:
            with (Path(os.environ[VARIABLE]) / PASSED).open("a", encoding="utf-8") as file:
                file.write(json.dumps(report.nodeid) + "\n")


def read_lines(path: Path) -> list[Any]:
    """The JSON values in a file, one a line; none without the file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def read_records(folder: Path) -> dict[str, set[Trained]]:
    """What the tests that passed have trained, by the name of the test function."""
    passed = set(read_lines(folder / PASSED))
    records: dict[str, set[Trained]] = {test.partition("[")[0]: set() for test in passed}
    for test, *values in read_lines(folder / RECORDS):
        if test in passed:
            records[test.partition("[")[0]].add(Trained(*values))
    return records
