"""Twenty steps of each kind of run give the losses in `losses.json`.

To the bit where that file was written (its CPU model, vector instructions and torch release are in it); to 1e-6
relative on other machines, whose kernels sum in another order.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden.golden_runs import GOLDEN, RUNS, describe_machine, measure_all


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return measure_all(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_golden_ones(name: str, results: dict[str, dict[str, Any]]) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    expected = golden["runs"][name]
    assert len(expected["loss"]) == len(expected["grad_norm"]) == 20
    assert expected["loss"][-1] < expected["loss"][0]
    if golden["machine"] == describe_machine():
        assert results[name] == expected
    else:
        for key in ("loss", "grad_norm"):
            assert results[name][key] == pytest.approx(expected[key], rel=1e-6)
