"""The reference in runs of `litgpt align`: equal to the policy at first, unchanged at the end, resumed to the bit."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from litgpt import adapt
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.recipe.tuner import LoRA
from litgpt.store.adapters.folder import save_adapter_folder
from litgpt.store.checkpoint_load import open_checkpoint
from litgpt.store.load_model import iter_tensors
from litgpt.train import reference_pass
from tests.commands import resume_worker
from tests.commands.test_finetune import recipe_of, write_base
from tests.processes import join_ranks, start_ranks
from tests.runs import read_losses

SETTINGS = {"r": 4, "alpha": 8.0, "dropout": 0.5, "target_modules": ["q", "down"], "bias": "all"}
DATA = {"sources": ["pairs.json"], "prompt_style": "default", "num_workers": 0, "val_fraction": 0.1}
TUNED = {"tuner": {"class_path": "LoRA", "init_args": SETTINGS}}
FULL = {"tuner": {"class_path": "Full"}}
ADAPTER = {"initial_adapter_dir": "adapter"}
PACKED = {"data": {"class_path": "Preferences", "init_args": {**DATA, "packing": {"enabled": True}}}}
PADDED = {"data": {"class_path": "Preferences", "init_args": {**DATA, "padding": True}}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with biases, and an adapter of it beside it."""
    folder = tmp_path_factory.mktemp("base")
    base = write_base(folder, bias=True)
    model, settings = GPT.on_meta(Config.from_checkpoint(base)), LoRA(**SETTINGS)
    adapt.attach(model, settings)
    draw = torch.Generator().manual_seed(5)
    shapes = {name: parameter.shape for name, parameter in adapt.get_adapter_parameters(model).items()}
    values = {name: 0.05 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    save_adapter_folder(folder / "adapter", values, config=model.config, settings=settings, base=str(base))
    return base


def prepare(folder: Path, base: Path, ranks: int = 1, **changes: Any) -> Path:
    """A folder with pairs and the recipe of a run of a few steps on them."""
    folder.mkdir(parents=True)
    rows = [
        {
            "prompt": f"How many are {number} things?",
            "chosen": "There are many. " * (number % 3 + 1),
            "rejected": "None, " * (number % 4 + 1),
        }
        for number in range(60)
    ]
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "adapter").symlink_to(base.parent / "adapter")
    data = {"class_path": "Preferences", "init_args": DATA}
    few = {
        "train__max_steps": 4,
        "train__save_interval": 2,
        "train__global_batch_size": 4,
        "eval__max_new_tokens": None,
    }
    recipe_of(folder, base, devices=ranks, **{"data": data, **few, **changes})
    return folder


def align(folders: list[Path]) -> int:
    """Run the recipe in each folder; log-probabilities that are computed ahead are saved after every third batch."""
    reference_pass.SAVE_INTERVAL = 3
    return resume_worker.run_all(folders, "align")


def run_all(folders: list[Path], folder: Path, ranks: int = 1) -> None:
    codes = join_ranks(start_ranks(align, folders, folder=folder, ranks=ranks), timeout=300)
    assert codes == [0] * ranks, "".join(path.read_text() for path in sorted(folder.glob("rank-*.log")))


def read_rows(folder: Path) -> list[dict[str, float]]:
    """The rows of the newest log, without empty values."""
    path = sorted((folder / "out" / "logs" / "csv").glob("version_*"), key=lambda path: int(path.name.split("_")[1]))[
        -1
    ]
    with (path / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def read_reference(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of the reference in a checkpoint."""
    files = open_checkpoint(checkpoint)
    return {
        name.removeprefix("reference."): files.read(name) for name in files.tensors if name.startswith("reference.")
    }


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "full": (1, FULL),
    "LoRA with dropout and biases": (1, {**TUNED, "model_config": {"dropout": 0.3}}),
    "QLoRA": (1, {**TUNED, "quantize": "bnb.nf4"}),
    "adapter": (1, ADAPTER),
    "reference adapter": (1, {**ADAPTER, "preference": {"reference": "adapter"}}),
    "in host memory": (1, {**FULL, "preference": {"reference_offload": True}}),
    "packed": (1, {**TUNED, **PACKED}),
    "padded": (1, {**TUNED, **PADDED}),
    "accumulation": (1, {**TUNED, "train__micro_batch_size": 1}),
    "moving": (1, {**TUNED, "preference": {"sync_ref_model": True, "ref_model_sync_steps": 2}}),
    "ahead": (1, {**ADAPTER, "preference": {"precompute_ref_log_probs": True}}),
    "KTO": (1, {**TUNED, "preference": {"loss_type": "kto"}}),
    "2 shards": (2, ADAPTER),
    "2 replicas": (2, {**FULL, **PACKED, "parallel": {"data_replicate": 2, "data_shard": 1}}),
    "2 stages": (2, {**TUNED, "parallel": {"pipeline": 2}}),
    "2 shards, ahead": (2, {**ADAPTER, "preference": {"precompute_ref_log_probs": True}}),
    "2 stages, ahead": (2, {**ADAPTER, "parallel": {"pipeline": 2}, "preference": {"precompute_ref_log_probs": True}}),
}


@pytest.fixture(scope="module")
def outputs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each run."""
    folder = tmp_path_factory.mktemp("runs")
    folders = {name: prepare(folder / name, base, ranks, **settings) for name, (ranks, settings) in CASES.items()}
    for ranks in (1, 2):
        run_all([folders[name] for name in CASES if CASES[name][0] == ranks], folder, ranks)
    return folders


@pytest.mark.slow
def test_the_policy_is_its_reference_at_first(outputs: dict[str, Path]) -> None:
    for name, folder in outputs.items():
        first, *later = read_rows(folder)
        assert first["loss"] == pytest.approx(0.5 if name == "KTO" else math.log(2), abs=1e-6), name
        rewards = [value for key, value in first.items() if key.startswith("rewards/") and "accuracies" not in key]
        assert len(rewards) >= 2 and max(map(abs, rewards)) < 1e-6, name
        assert max(abs(row["rewards/chosen"]) for row in later if "rewards/chosen" in row) > 1e-3, name


@pytest.mark.slow
def test_the_reference_is_the_same_after_the_run(outputs: dict[str, Path], base: Path) -> None:
    first = dict(iter_tensors(base, Config.from_checkpoint(base)))
    for name, folder in outputs.items():
        early, late = (read_reference(folder / "out" / f"step-0000000{step}") for step in (2, 4))
        assert (not early) == ("ahead" in name) and early.keys() == late.keys()
        same = [torch.equal(early[key], late[key]) for key in early]
        assert all(same) if name != "moving" else not all(same), name
        if name in ("full", "in host memory", "2 replicas"):
            assert late.keys() == first.keys() and all(torch.equal(late[key], first[key]) for key in first), name


@pytest.mark.slow
@pytest.mark.parametrize(("ahead", "online"), [("ahead", "adapter"), ("2 shards, ahead", "2 shards")])
def test_stored_log_probabilities_are_those_of_the_reference(outputs: dict[str, Path], ahead: str, online: str) -> None:
    ahead_rows, online_rows = read_rows(outputs[ahead]), read_rows(outputs[online])
    names = [
        name for name in ahead_rows[-1] | ahead_rows[0] if name.split("/")[0] in ("rewards", "val_rewards", "loss")
    ]
    assert len(names) >= 9
    for row, expected in zip(ahead_rows, online_rows, strict=True):
        assert [row.get(name) for name in names] == pytest.approx([expected.get(name) for name in names], abs=1e-6)


REFERENCES: dict[str, dict[str, Any]] = {
    "stored": {},
    "moving": {"sync_ref_model": True, "ref_model_sync_steps": 5},
    "ahead": {"precompute_ref_log_probs": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_is_resumed_to_the_bit(base: Path, tmp_path: Path, ranks: int) -> None:
    settings = {**TUNED, **PACKED, "train__max_steps": 20, "train__save_interval": 10, "train__global_batch_size": 2}
    settings |= {"train__micro_batch_size": 1}
    for name, preference in REFERENCES.items():
        for folder in (tmp_path / name, tmp_path / f"{name}-resumed"):
            prepare(folder, base, ranks, **settings, preference=preference)
    folders = [tmp_path / name for name in REFERENCES]
    codes = join_ranks(start_ranks(resume_worker.worker, folders, "align", folder=tmp_path, ranks=ranks), timeout=300)
    assert codes == [0] * ranks, "".join(path.read_text() for path in sorted(tmp_path.glob("rank-*.log")))
    losses = {}
    for folder in folders:
        resumed = folder.with_name(f"{folder.name}-resumed")
        losses[folder.name], rest = read_losses(folder), read_losses(resumed)
        assert len(losses[folder.name]) == 20
        assert {step: loss for step, loss in rest.items() if step > 10} == {
            step: loss for step, loss in losses[folder.name].items() if step > 10
        }
        for name in ("final/model.safetensors", "adapter/adapter_model.safetensors"):
            actual, expected = load_file(resumed / "out" / name), load_file(folder / "out" / name)
            assert all(torch.equal(actual[key], expected[key]) for key in expected), (folder, name)
        actual, expected = (read_reference(path / "out" / "step-00000020") for path in (resumed, folder))
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert losses["stored"] == pytest.approx(losses["ahead"], abs=1e-6)
    assert losses["stored"][20] != pytest.approx(losses["moving"][20], abs=1e-4)


@pytest.mark.slow
def test_stored_log_probabilities_are_used_again_unless_something_changed(base: Path, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "run", base, **ADAPTER, preference={"precompute_ref_log_probs": True})

    def run(name: str) -> tuple[list[dict[str, float]], str]:
        run_all([folder], folder)
        rows, log = read_rows(folder), (folder / "rank-0.log").read_text()
        (folder / "rank-0.log").unlink()
        (folder / "out").rename(folder / name)
        return rows, log

    def get_rewards(rows: list[dict[str, float]]) -> list[Any]:
        return [row.get("rewards/margins") for row in rows]

    first, log = run("first")
    assert "log-probabilities of the reference: 44 computed, 0 read" in log
    again, log = run("again")
    assert "0 computed, 44 read" in log and get_rewards(again) == get_rewards(first)
    (scores,) = (folder / "data" / "preferences" / "reference").glob("*/scores.safetensors")
    content = bytearray(scores.read_bytes())
    content[-3] ^= 1
    scores.write_bytes(content)
    mended, log = run("mended")
    assert "computed again" in log and "44 computed, 0 read" in log and get_rewards(mended) == get_rewards(first)
    recipe = json.loads((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(
        json.dumps(recipe | {"preference": {**recipe["preference"], "reference": str(base)}})
    )
    other, log = run("other reference")
    assert "44 computed, 0 read" in log and get_rewards(other) != get_rewards(first)
