"""Rows with images and without, read from files, on layouts that split a model that sees: as in one process."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from litgpt.data import Conversations
from litgpt.data.tokenizer import Tokenizer
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.parallel.apply import apply_ddp, full_tensor, parallelize
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import PRECISIONS
from litgpt.parallel.reduce import all_reduce_sum
from litgpt.recipe.data import BatchShape
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.train import LossArgs
from litgpt.store.load_model import load_model
from litgpt.train.evaluate import compute_validation_metrics
from litgpt.train.objective import next_token
from litgpt.train.step import add_gradients
from litgpt.train.train_state import TrainState
from tests.layouts.pool import POOL
from tests.processes import join_ranks, run_litgpt, start_ranks
from tests.vision_model import write_color_rows, write_vision_model

ROWS = 8
LAYOUTS: list[dict[str, Any]] = [{"tensor": 2}, {"pipeline": 2}, {"context": 2}, {"data_shard": 2}]
Result = tuple[list[float], dict[str, Tensor]]


def compute(folder: Path, layout: dict[str, Any]) -> Result:
    """The loss and the validation loss of this layout in float64, and the gradients of this rank's parameters."""
    mesh = Mesh(ParallelArgs(**layout).resolve_dims(2), "cpu") if layout else None
    rank, ranks = (mesh.rank("data"), mesh.dims.data_ranks) if mesh else (0, 1)
    data = Conversations(str(folder / "rows.jsonl"), val_fraction=0.0, num_workers=0, cache_dir=folder / "cache")
    data.connect(Tokenizer(folder / "model"), 2, 256)
    data.prepare_data()
    shape = BatchShape(micro_batch_size=2, global_batch_size=ROWS, max_seq_length=256, rank=rank, ranks=ranks, seed=0)
    stream = iter(data.train_stream(shape))
    batches = [next(stream) for _ in range(ROWS // 2 // ranks)]
    model, precision = GPT.on_meta(Config.from_checkpoint(folder / "model")).double(), PRECISIONS["64-true"]
    parallelize(model, mesh, ParallelArgs(**layout), precision=precision, compile_blocks=False)
    load_model(model.to_empty(device="cpu"), folder / "model")
    state, objective = (
        TrainState(apply_ddp(model, mesh), [], torch.device("cpu"), precision, mesh),
        next_token(LossArgs()),
    )
    loss = add_gradients(state, batches, objective).loss.item() * state.counts_loss
    gradients = {name: full_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    validation = compute_validation_metrics(state, batches, objective, max_iters=None)["val_loss"]
    return [*all_reduce_sum([loss], state.device), validation], gradients


def compute_all(folder: Path) -> list[Result]:
    """The results of all layouts."""
    return [compute(folder, layout) for layout in LAYOUTS]


@pytest.mark.parametrize(
    "kind",
    ["qwen2_vl"]
    + [
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in ("llava", "gemma3", "paligemma", "qwen3_vl", "llava_onevision", "llava_next", "llama4")
    ],
)
def test_rows_train_as_in_one_process(kind: str, tmp_path: Path) -> None:
    write_vision_model(tmp_path / "model", kind)
    write_color_rows(tmp_path)
    losses, gradients = compute(tmp_path, {})
    assert any(name.startswith("vision.blocks") for name in gradients)
    for layout, results in zip(LAYOUTS, zip(*POOL.run(compute_all, tmp_path, ranks=2), strict=True), strict=True):
        assert {name for _, grads in results for name in grads} == gradients.keys(), layout
        for other_losses, others in results:
            assert other_losses == pytest.approx(losses, abs=1e-9), layout
            for name, gradient in others.items():
                torch.testing.assert_close(gradient, gradients[name], atol=1e-9, rtol=1e-7, msg=f"{layout} {name}")


FLAGS = [
    *("--data", "Conversations", "--data.num_workers", "0", "--data.val_fraction", "0.2", "--precision", "32-true"),
    *("--train.max_steps", "20", "--train.save_interval", "10", "--train.global_batch_size", "4"),
    *("--train.micro_batch_size", "2", "--train.lr_warmup_steps", "0", "--optimizer.lr", "1e-2"),
    *("--eval.interval", "10", "--eval.max_new_tokens", "4", "--train.max_seq_length", "200"),
    *("--freeze.aligner", "false", "--devices", "2"),
]


@pytest.mark.slow
def test_resumed_run_equals_one_without_pause(tmp_path: Path) -> None:
    write_vision_model(tmp_path / "model", "qwen2_vl")
    write_color_rows(tmp_path)
    words = ["finetune_full", str(tmp_path / "model"), *FLAGS, "--parallel.tensor", "2"]
    words += ["--data.sources", str(tmp_path / "rows.jsonl"), "--data.cache_dir", str(tmp_path / "cache")]

    def run(name: str, *flags: str) -> dict[str, Tensor]:
        out = tmp_path / name
        processes = start_ranks(run_litgpt, *words, "--out_dir", str(out), *flags, folder=tmp_path, ranks=2)
        assert join_ranks(processes) == [0, 0], (tmp_path / "rank-0.log").read_text()
        return load_file(out / "final" / "model.safetensors")

    whole = run("whole")
    shutil.copytree(tmp_path / "whole" / "step-00000010", tmp_path / "half" / "step-00000010")
    half = run("half", "--resume", "true")
    assert all(torch.equal(tensor, half[name]) for name, tensor in whole.items())
    before = load_file(tmp_path / "model" / "model.safetensors")
    changed = {name for name, tensor in whole.items() if not torch.equal(tensor, before[name])}
    assert {name for name in before if name.startswith("visual.") and ".merger." not in name}.isdisjoint(changed)
    assert any(".merger." in name for name in changed)
