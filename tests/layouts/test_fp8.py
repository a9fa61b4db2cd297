"""Products in FP8 on every layout: the losses of one process, and the same scales on all ranks."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from litgpt.data.stream.batch import Batch
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.parallel.apply import apply_ddp, copy_full_tensor, parallelize
from litgpt.parallel.fp8 import apply_fp8
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.fp8 import FP8Args
from litgpt.recipe.optimizer import AdamW
from litgpt.recipe.parallel import ParallelArgs, ParallelDims
from litgpt.recipe.recompute import RecomputeArgs
from litgpt.recipe.train import LossArgs
from litgpt.train.objective import next_token
from litgpt.train.optimizer import build_optimizers
from litgpt.train.step import train_step
from litgpt.train.train_state import TrainState
from tests.layouts.layouts import take_micro_batches
from tests.layouts.pool import POOL
from tests.store.models import small

pytest.importorskip("torchao")
WIDTHS = {"n_embd": 64, "n_head": 4, "n_query_groups": 4, "head_size": 16, "n_layer": 4}
SHAPES = {
    "dense": small("Llama-3.2-1B", **WIDTHS, intermediate_size=128, tie_embeddings=False),
    "experts": small("Qwen3-30B-A3B", **WIDTHS, n_expert=4, n_expert_per_token=2, moe_intermediate_size=64),
}
TENSORWISE, DELAYED = FP8Args(recipe="tensorwise"), FP8Args(recipe="delayed")
GATHERED = FP8Args(recipe="tensorwise", param_gather=True)
FULL = {"recompute": RecomputeArgs(granularity="full")}


@dataclass(frozen=True)
class Case:
    """Settings of FP8 in a layout, with further arguments of `parallelize`, and how far its losses may differ.

    Where ranks or micro-batches of a product differ from one process, so do the scales of the first step.
    """

    shape: str
    fp8: FP8Args
    parallel: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-5

    def __str__(self) -> str:
        gather = " gathered" * self.fp8.param_gather
        return f"{self.shape} {self.fp8.recipe}{gather} {self.parallel or ''} {' '.join(self.more)}".strip()


CASES = [
    Case("dense", GATHERED, {"data_shard": 2}),
    Case("dense", DELAYED, {"data_shard": 2}, FULL),
    Case("dense", DELAYED, {"pipeline": 2}),
    Case("experts", DELAYED, {"expert": 2}, tolerance=0.02),
]
FURTHER_CASES = [
    Case("dense", TENSORWISE, {"data_shard": 2}),
    Case("experts", GATHERED, {"data_shard": 2}, tolerance=0.02),
    Case("dense", FP8Args(recipe="mxfp8"), {"data_replicate": 2}),
    Case("dense", TENSORWISE, {"pipeline": 2, "pipeline_schedule": "zbv"}),
    Case("dense", FP8Args(recipe="rowwise"), {"tensor": 2}, tolerance=0.02),
    Case("dense", DELAYED, {"context": 2}, tolerance=0.02),
    Case("experts", FP8Args(recipe="rowwise"), {"expert_tensor": 2}, tolerance=0.02),
]


def run(case: Case, ranks: int) -> tuple[list[float], list[float]]:
    """The losses of three steps, and the scales that follow, on one rank."""
    settings, precision = ParallelArgs(**case.parallel), PRECISIONS["32-true"]
    mesh = Mesh(settings.resolve_dims(ranks), "cpu") if ranks > 1 else None
    with torch.device("meta"):
        model = GPT(SHAPES[case.shape])
    history = apply_fp8(model, case.fp8, mesh.dims if mesh else ParallelDims(), torch.device("cpu"))
    model.amax_history = history  # type: ignore[assignment]
    more = {"compile_blocks": False, **case.more}
    parallelize(model, mesh, settings, precision=precision, **more)
    model.to_empty(device="cpu")
    initialize(model, 3, write=copy_full_tensor)
    optimizers = build_optimizers(AdamW(lr=1e-3), model)
    train_state = TrainState(apply_ddp(model, mesh), optimizers, torch.device("cpu"), precision, mesh)
    ids = torch.randint(0, 50, (8, 33), generator=torch.Generator().manual_seed(1))
    rank, data_ranks = (mesh.rank("data"), mesh.dims.data_ranks) if mesh else (0, 1)
    batches = take_micro_batches(Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), rank, data_ranks, 2)
    losses = [train_step(train_state, batches, next_token(LossArgs()), max_norm=1.0).loss for _ in range(3)]
    return losses, [] if history is None else history.scale_M3.flatten().tolist()


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in FURTHER_CASES)], ids=str
)
def test_losses_are_those_of_one_process(case: Case) -> None:
    losses, scales = run(Case(case.shape, case.fp8), 1)
    exact, _ = run(Case(case.shape, FP8Args()), 1)
    assert max(abs(a - b) for a, b in zip(losses, exact, strict=True)) > 1e-4
    results = POOL.run(run, case, 2, ranks=2)
    assert results[0] == results[1]
    assert results[0][0] == pytest.approx(losses, abs=case.tolerance)
    assert all(results[0][1]) and results[0][1] == pytest.approx(scales, rel=0.2 if case.tolerance > 1e-5 else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [TENSORWISE, DELAYED, FP8Args(recipe="mxfp8")], ids=lambda args: args.recipe)
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_blocks_compute_the_same(shape: str, settings: FP8Args) -> None:
    losses, _ = run(Case(shape, settings), 1)
    assert run(Case(shape, settings, more={"compile_blocks": True}), 1)[0] == pytest.approx(losses, abs=0.02)
