"""`--dry_run` of the commands that train: the plan of the run on this machine, and nothing else."""

import resource
from pathlib import Path

import pytest

from litgpt.cli import main
from litgpt.commands import plan
from litgpt.plan import own_machine
from litgpt.plan.own_machine import find_own_machine, measure_host_memory
from litgpt.plan.savings import Saving
from litgpt.recipe.build import build_recipe
from litgpt.recipe.gpu import build_gpu, find_gpu
from litgpt.recipe.pretrain import Pretrain
from tests.runs import write_recipe, write_text


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and its text, in which commands run."""
    write_text(tmp_path)
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_that_fits_is_planned_and_not_started(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    assert main(["pretrain", "--config", "recipe.yaml", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Memory of rank 0, with rows of 32 tokens\nParameters")
    assert "\nFits " in out and "GiB of host memory" in out
    assert sorted(folder.rglob("*")) == before


@pytest.mark.usefixtures("folder")
def test_a_run_that_does_not_fit_says_what_would(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_machine, "measure_host_memory", lambda: 2**30)  # the allowance alone is more
    errors = []
    for savings in ([], [Saving("recompute.granularity", "full", 1.5, 0.6)]):
        monkeypatch.setattr(plan, "list_savings", lambda *_, savings=savings: savings)
        assert main(["pretrain", "--config", "recipe.yaml", "--dry_run"]) == 1
        errors.append(capsys.readouterr().err.splitlines()[-1])
    start = "litgpt: error: dry_run: rank 0 needs 1.00 GiB more than the 1 GiB of host memory; "
    assert errors[0] == f"{start}use more devices, or a smaller train.max_seq_length"
    assert errors[1] == f"{start}set recompute.granularity: full, with which it needs 1.50 GiB"


@pytest.mark.usefixtures("folder")
def test_the_files_of_a_run_are_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--config", "recipe.yaml", "--dry_run", "--data.train_data_path", "none"]) == 1
    assert "data.train_data_path: none" in capsys.readouterr().err


def test_it_is_a_switch_and_no_key(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--config", "recipe.yaml", "--dry_run=maybe"]) == 2
    assert "dry_run: 'maybe' is not valid; use true or false" in capsys.readouterr().err
    write_recipe(folder, dry_run=True)
    assert main(["pretrain", "--config", "recipe.yaml"]) == 2
    assert "dry_run is not a key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "memory", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.3, "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", 79.2, "H100-80GB"),
        ("NVIDIA H200", 139.8, "H200"),
        ("NVIDIA GeForce RTX 3090", 23.7, "RTX-3090"),
    ],
)
def test_a_device_is_found_in_the_table(device: str, memory: float, name: str) -> None:
    assert find_gpu(device, memory) == build_gpu(name)  # type: ignore[arg-type]
    assert find_gpu(device, memory / 2) is None or "A100" in device


@pytest.mark.parametrize("device", ["NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA GeForce GTX 1080", "NVIDIA A10"])
def test_a_device_that_the_table_does_not_have(device: str) -> None:
    assert find_gpu(device, 22.0) is None


def test_host_memory_is_limited_and_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure_host_memory()
    (tmp_path / "memory.max").write_text("1073741824\n")
    monkeypatch.setattr(own_machine, "CGROUP_LIMIT", tmp_path / "memory.max")
    assert measure_host_memory() == 2**30 < whole
    recipe = build_recipe(Pretrain, {"model_name": "tiny", "out_dir": "out", "devices": 4, "num_nodes": 2})
    machine = find_own_machine(recipe)
    assert (machine.gpu_label, machine.available_memory) == ("host memory for each of 4 processes", 0.25)
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (2**29, 2**29))
    assert measure_host_memory() == 2**29
