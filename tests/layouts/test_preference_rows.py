"""Pairs of answers and rated answers about images, read from files, on layouts of two ranks: as in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.parallel.apply import apply_ddp, full_tensor, parallelize
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import PRECISIONS
from litgpt.parallel.reduce import all_reduce_sum
from litgpt.recipe.data import BatchShape
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.preference import PreferenceArgs
from litgpt.recipe.train import LossArgs
from litgpt.store.load_model import load_model
from litgpt.train.evaluate import compute_validation_metrics
from litgpt.train.kto import rated_answers
from litgpt.train.preference import paired_answers
from litgpt.train.reference import Reference, copy_values
from litgpt.train.step import add_gradients
from litgpt.train.train_state import TrainState
from tests.layouts.pool import POOL
from tests.train.test_vision_preferences import open_data, write_answers

ROWS = 12
LAYOUTS: list[dict[str, Any]] = [
    {"data_shard": 2},
    {"data_replicate": 2},
    {"tensor": 2},
    {"context": 2},
    {"pipeline": 2},
]
OBJECTIVES = {
    "pairs": lambda: paired_answers(PreferenceArgs(ld_alpha=0.5, rpo_alpha=0.5), LossArgs(chunk_rows=16)),
    "rated": lambda: rated_answers(PreferenceArgs(loss_type="kto"), LossArgs(chunk_rows=16)),
}
Result = tuple[list[float], dict[str, Tensor]]


def compute(folder: Path, kind: str, rows: str, layout: dict[str, Any]) -> Result:
    """The loss of this layout in float64, of pairs also their validation, and the gradients of this rank."""
    mesh = Mesh(ParallelArgs(**layout).resolve_dims(2), "cpu") if layout else None
    rank, ranks = (mesh.rank("data"), mesh.dims.data_ranks) if mesh else (0, 1)
    data = open_data(folder, kind, rows)
    shape = BatchShape(micro_batch_size=2, global_batch_size=ROWS, max_seq_length=256, rank=rank, ranks=ranks, seed=0)
    stream = iter(data.train_stream(shape))
    batches = [next(stream) for _ in range(ROWS // 2 // ranks)]
    model, precision = GPT.on_meta(Config.from_checkpoint(folder / kind)).double(), PRECISIONS["64-true"]
    parallelize(model, mesh, ParallelArgs(**layout), precision=precision, compile_blocks=False)
    load_model(model.to_empty(device="cpu"), folder / kind)
    values = {name: value * 0.9 for name, value in copy_values(model, dict(model.named_parameters())).items()}
    state = TrainState(apply_ddp(model, mesh), [], torch.device("cpu"), precision, mesh, reference=Reference(values))
    objective = OBJECTIVES[rows]()
    loss = add_gradients(state, batches, objective).loss.item() * state.counts_loss
    gradients = {name: full_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    if rows == "rated":  # their validation compares those of all ranks at a time, so that it depends on the number
        return all_reduce_sum([loss], state.device), gradients
    metrics = compute_validation_metrics(state, batches, objective, max_iters=None)
    return [*all_reduce_sum([loss], state.device), *metrics.values()], gradients


def compute_all(folder: Path, kind: str, rows: str) -> list[Result]:
    """The results of all layouts."""
    return [compute(folder, kind, rows, layout) for layout in LAYOUTS]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rows"), [("qwen2_vl", "pairs"), ("llava", "rated")])
def test_answers_about_images_train_as_in_one_process(kind: str, rows: str, tmp_path: Path) -> None:
    losses, gradients = compute(write_answers(tmp_path), kind, rows, {})
    assert any(name.startswith("vision.blocks") for name in gradients)
    results = POOL.run(compute_all, tmp_path, kind, rows, ranks=2)
    for layout, ranks in zip(LAYOUTS, zip(*results, strict=True), strict=True):
        assert {name for _, grads in ranks for name in grads} == gradients.keys(), layout
        for other_losses, others in ranks:
            assert other_losses == pytest.approx(losses, abs=1e-9, nan_ok=True), layout
            for name, gradient in others.items():
                torch.testing.assert_close(gradient, gradients[name], atol=1e-9, rtol=1e-7, msg=f"{layout} {name}")
