"""Whole runs from the command line, each with another setting: they end well and learn."""

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.convert_frame import FRAME_COMPILE_COUNTER

from litgpt.train.run_lock import lock_run
from tests.processes import join_ranks, run_litgpt, start_ranks
from tests.runs import read_losses, write_recipe, write_text

SETTINGS: dict[str, dict[str, Any]] = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "16-mixed": {"precision": "16-mixed"},
    "plain loss": {"loss": {"impl": "plain"}},
    "document mask": {"data__init_args__document_mask": True},
    "muon": {"optimizer": {"class_path": "Muon", "init_args": {"lr": 1e-2}}},
    "moments in fp8": {
        "precision": "bf16-true",
        "optimizer": {
            "class_path": "PrecisionAwareAdamW",
            "init_args": {"lr": 1e-2, "exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp8", "main_params_dtype": "fp32"},
        },
    },
    "sgd": {"optimizer": {"class_path": "SGD", "init_args": {"lr": 0.5, "momentum": 0.9}}},
    "torch class": {"optimizer": {"class_path": "torch.optim.Adagrad", "init_args": {"lr": 3e-2}}},
    "tied": {"train__tie_embeddings": True},
    "wsd": {"train__lr_decay_style": "wsd", "train__wsd_decay_steps": 4},
    "epochs": {"train__max_steps": None, "train__epochs": 1},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {"parallel": {"data_replicate": 2}}),
    "fsdp": (2, {"parallel": {"data_shard": 2}}),
    "fsdp in bf16": (2, {"parallel": {"data_shard": 2, "reshard_after_forward": False}, "precision": "bf16-mixed"}),
    "fsdp in fp16 with muon": (
        2,
        {"precision": "16-mixed", "optimizer": {"class_path": "Muon", "init_args": {"lr": 1e-2}}},
    ),
    "stages without bubble in bf16": (
        2,
        {
            "parallel": {"pipeline": 2, "pipeline_schedule": "zbv"},
            "precision": "bf16-mixed",
            "model_config__n_layer": 4,
            "train__tie_embeddings": True,
        },
    ),
    "hsdp": (4, {"parallel": {"data_replicate": 2, "data_shard": 2}}),
}


HEADER = ["litgpt pre", "Data", "Start", "Model", "Device", "Samples", "Steps"]


def trained(folder: Path, ranks: int = 1, **changes: Any) -> dict[int, float]:
    """The losses of a run that must end well."""
    write_text(folder)
    write_recipe(folder, devices=ranks, **{"eval__sample_prompt": "word1", "eval__sample_tokens": 4, **changes})
    codes = join_ranks(start_ranks(run_litgpt, "pretrain", "--config", "recipe.yaml", folder=folder, ranks=ranks))
    first, *others = [path.read_text() for path in sorted(folder.glob("rank-*.log"))]
    assert codes == [0] * ranks, "".join([first, *others])
    assert not re.search("Warning|deprecated|[Dd]istributed|MEMBER", first), first
    assert not any(others), others  # the first rank alone prints
    header = [line for line in first[: first.index("\nstep 1")].splitlines() if line[:10].strip() in HEADER]
    assert [line[:10].strip() for line in header] == HEADER, first
    assert max(map(len, header)) <= 80, first
    assert ("Layout" in first) == (ranks > 1)
    assert ", sample:\nword1" in first
    return read_losses(folder)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_with_this_setting_learns(name: str, tmp_path: Path) -> None:
    got = trained(tmp_path, **SETTINGS[name])
    assert got[max(got)] < got[1] - 0.3


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_laid_out_so_learns(name: str, tmp_path: Path) -> None:
    ranks, changes = LAYOUTS[name]
    got = trained(tmp_path, ranks, **changes)
    assert got[max(got)] < got[1] - 0.3


def test_layouts_have_the_losses_of_one_process(tmp_path: Path) -> None:
    alone = trained(tmp_path / "alone")
    for name, (ranks, changes) in {"ddp": LAYOUTS["ddp"], "fsdp": LAYOUTS["fsdp"]}.items():
        assert trained(tmp_path / name, ranks, **changes) == pytest.approx(alone, abs=1e-5)


def test_training_goes_on_from_a_finished_model(tmp_path: Path) -> None:
    first = trained(tmp_path / "first")
    final = tmp_path / "first" / "out" / "final"
    log = (tmp_path / "first" / "rank-0.log").read_text()
    assert "litgpt pretrain toy: output in out\n" in log
    assert "Model     toy: 14,672 parameters, all trained\nDevice    1 x CPU, 32-true\n" in log
    assert "\nStart     random weights, seed 42\n" in log
    assert "\nData      TextFiles text\n" in log
    assert "\nSamples   387 of 32 tokens, 12,384 tokens in all\n" in log
    assert "\n          validation: 128 (24.9% of all)\n" in log
    assert "Steps     12 of 8 samples, 256 tokens = 0.25 epochs, warm-up 2 steps\n" in log
    second = trained(tmp_path / "second", initial_checkpoint_dir=str(final), optimizer__init_args__lr=1e-3)
    log = (tmp_path / "second" / "rank-0.log").read_text()
    assert re.search(rf"\nStart     weights of\s+{final}\n", log), log
    assert second[1] < first[1] - 0.3
    assert second[1] == pytest.approx(first[12], abs=0.3)


def test_a_second_run_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, train__log_interval=100)
    before = read_losses(tmp_path)
    assert before.keys() == {12}  # the last step is always logged
    assert join_ranks(start_ranks(run_litgpt, "pretrain", "--config", "recipe.yaml", folder=tmp_path)) == [1]
    assert "holds a run already" in (tmp_path / "rank-0.log").read_text()
    assert read_losses(tmp_path) == before


def test_a_run_in_a_folder_that_another_process_uses_is_refused(tmp_path: Path) -> None:
    write_text(tmp_path)
    write_recipe(tmp_path, devices=2)
    with lock_run(tmp_path / "out", print):
        ranks = start_ranks(run_litgpt, "pretrain", "--config", "recipe.yaml", folder=tmp_path, ranks=2)
        assert join_ranks(ranks) == [1, 1]
        assert "out_dir: out is in use by a run; wait for its end" in (tmp_path / "rank-0.log").read_text()
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_the_time_limit_saves_publishes_and_says_so(tmp_path: Path) -> None:
    got = trained(tmp_path, train__max_steps=None, train__max_time=0.5)
    assert got
    assert "train.max_time: 0.5 s have passed" in (tmp_path / "rank-0.log").read_text()
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()


def test_tokens_that_the_model_has_no_row_for_are_refused_in_one_line(tmp_path: Path) -> None:
    write_text(tmp_path)
    write_recipe(tmp_path, model_config__padded_vocab_size=64)
    assert join_ranks(start_ranks(run_litgpt, "pretrain", "--config", "recipe.yaml", folder=tmp_path)) == [1]
    assert "258 tokens, but the model has 64 rows" in (tmp_path / "rank-0.log").read_text()


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path: Path) -> None:
    eager = trained(tmp_path / "eager")
    assert trained(tmp_path / "compiled", compile=True) == pytest.approx(eager, abs=1e-4)


def run_and_count_compilations(*argv: str) -> int:
    """Run a command line of `litgpt`, and write how often each of its frames was compiled."""
    code = run_litgpt(*argv)
    Path("compilations.json").write_text(json.dumps([*FRAME_COMPILE_COUNTER.values()]), encoding="utf-8")
    return code


@pytest.mark.slow
@pytest.mark.parametrize("document_mask", [False, True])
def test_a_run_compiles_its_blocks_anew_at_most_twice(tmp_path: Path, *, document_mask: bool) -> None:
    write_text(tmp_path)
    write_recipe(tmp_path, compile=True, model_config__n_layer=4, data__init_args__document_mask=document_mask)
    command = ("pretrain", "--config", "recipe.yaml")
    codes = join_ranks(start_ranks(run_and_count_compilations, *command, folder=tmp_path))
    assert codes == [0], (tmp_path / "rank-0.log").read_text()
    counts = json.loads((tmp_path / "compilations.json").read_text())
    assert counts
    assert sum(count - 1 for count in counts) <= 2


SPLIT: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor and pipeline": (4, {"parallel": {"tensor": 2, "pipeline": 2}}),
    "context and recompute": (2, {"parallel": {"context": 2}, "recompute": {"granularity": "full"}}),
}


@pytest.fixture(scope="module")
def real_text(tmp_path_factory: pytest.TempPathFactory, python_docs: Path) -> tuple[Path, Any]:
    """A run of one process on Python's own documentation, and what it came to."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, outcome(folder, python_docs)


def outcome(folder: Path, text: Path, ranks: int = 1, **changes: Any) -> tuple[dict[int, float], list[float], str]:
    """Training losses, validation losses and the text that the model wrote, on real text."""
    data = {"class_path": "PythonDocs", "init_args": {"data_path": str(text)}}
    got = trained(folder, ranks, data=data, eval__interval=6, **changes)
    validation = [float(row["val_loss"]) for row in read_metrics(folder, "val_loss")]
    return got, validation, (folder / "out" / "samples.jsonl").read_text()


def read_metrics(folder: Path, column: str) -> list[dict[str, str]]:
    """The rows of the log of a run that have a value in this column."""
    with (folder / "out" / "logs" / "csv" / "version_0" / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row[column]]


@pytest.mark.parametrize("name", SPLIT)
def test_split_models_end_where_one_process_does(
    name: str, tmp_path: Path, real_text: tuple[Path, Any], python_docs: Path
) -> None:
    folder, (training, validation, samples) = real_text
    ranks, changes = SPLIT[name]
    got = outcome(tmp_path, python_docs, ranks, **changes)
    assert got[0] == pytest.approx(training, abs=1e-4)
    assert len(validation) == 2 and got[1] == pytest.approx(validation, abs=1e-4)
    assert got[2] == samples
    (*_, last) = read_metrics(tmp_path, "loss")
    assert float(last["flops_per_sec"]) == pytest.approx(ranks * float(last["device/flops_per_sec"]))
    finals = (load_file(one / "out" / "final" / "model.safetensors") for one in (folder, tmp_path))
    for name, (alone, split) in paired(*finals).items():
        assert torch.allclose(alone, split, atol=1e-4), name


def paired(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two mappings have under the same names, which must be all of both."""
    assert one.keys() == other.keys()
    return {name: (one[name], other[name]) for name in one}


def test_a_row_that_one_rank_alone_finds_bad_stops_all_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path
    write_text(folder)
    (folder / "own_letters.py").write_text(ONE_BAD_RANK)
    write_recipe(folder, devices=2, data="own_letters.Letters", tokenizer=None, train__save_interval=1)
    codes = join_ranks(start_ranks(with_own_module, folder=folder, ranks=2), timeout=60)
    assert codes == [1, 1]
    assert "letter 4 is no letter" in (folder / "rank-1.log").read_text()
    assert (folder / "out" / "step-00000003").is_dir()


def with_own_module() -> int:
    """Run the recipe, with the modules that lie beside it."""
    sys.path.insert(0, ".")
    return run_litgpt("pretrain", "--config", "recipe.yaml")


ONE_BAD_RANK = """
from collections.abc import Iterator

import torch

from litgpt.data.stream.batch import Batch
from litgpt.data.stream.loader import DataModule
from litgpt.errors import UserError


class Stream:
    position, epoch, samples_per_epoch, channels = 0, 0.0, None, ()

    def __init__(self, rank):
        self.rank = rank

    def __iter__(self) -> Iterator[Batch]:
        for number in range(100):
            if self.rank == 1 and number // 2 == 3:
                raise UserError("data: letter 4 is no letter")
            rows = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(number))
            yield Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def state_dict(self):
        return {}

    def report(self):
        return {}

    def close(self):
        pass


class Letters(DataModule):
    def train_dataloader(self):
        return None

    def train_stream(self, shape):
        return Stream(shape.rank)
"""
