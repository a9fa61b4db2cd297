"""The levels of ZeRO: how often ranks exchange what, and the same training whatever the level."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.parallel.apply import copy_full_tensor, full_tensor, parallelize
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.optimizer import AdamW
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.train import LossArgs
from litgpt.train.objective import next_token
from litgpt.train.optimizer import build_optimizers
from litgpt.train.step import compute_gradients, train_step
from litgpt.train.train_state import TrainState
from tests.layouts.layouts import build_global_batch, take_micro_batches
from tests.layouts.pool import POOL
from tests.store.models import small

SHAPE = small("Llama-3.2-1B", n_layer=4, tie_embeddings=False)
Result = tuple[dict[str, Tensor], dict[str, int]]


def train(settings: ParallelArgs) -> Result:
    """Weights after two steps of four micro-batches, and how often ranks exchanged what in one more."""
    mesh, precision = Mesh(settings.resolve_dims(2), "cpu"), PRECISIONS["64-true"]
    with torch.device("meta"):
        model = GPT(SHAPE).to(precision.storage)
    parallelize(model, mesh, settings, precision=precision, compile_blocks=False)
    model.to_empty(device="cpu")
    initialize(model, 1, write=copy_full_tensor)
    optimizers = build_optimizers(AdamW(lr=1e-2), model)
    train_state = TrainState(model, optimizers, torch.device("cpu"), precision, mesh)
    batches = take_micro_batches(build_global_batch(packed=False), mesh.rank("data"), 2, 1)
    objective = next_token(LossArgs())
    for _ in range(2):
        train_step(train_state, batches, objective, max_norm=1.0)
    weights = {name: full_tensor(parameter).detach().clone() for name, parameter in model.named_parameters()}
    with CommDebugMode() as comms:
        compute_gradients(train_state, batches, objective, counts=[1.0])
    counts = {str(kind).removeprefix("c10d."): number for kind, number in comms.get_comm_counts().items()}
    return weights, counts


def run_training(**settings: Any) -> Result:
    return POOL.run(train, ParallelArgs(**settings), ranks=2)[0]


def read_corrections(settings: dict[str, Any]) -> list[Tensor]:
    """The corrections that routers read in a forward pass under bf16-mixed, after a copy of a checkpoint's values."""
    parallel, precision = ParallelArgs(**settings), PRECISIONS["bf16-mixed"]
    mesh = Mesh(parallel.resolve_dims(2), "cpu")
    config = small("Mixtral-8x7B-v0.1", n_expert=4, n_layer=2, router_correction=True, router_softmax="before_top_k")
    with torch.device("meta"):
        model = GPT(config).to(precision.storage)
    parallelize(model, mesh, parallel, precision=precision, compile_blocks=False)
    model.to_empty(device="cpu")
    initialize(model, 1, write=copy_full_tensor)
    read: list[Tensor] = []
    for block in model.local_blocks:
        router: Any = block.mlp.router
        copy_full_tensor(router.correction, torch.arange(4) * 2.0**-12 + 1)
        router.register_forward_hook(lambda module, *_: read.append(full_tensor(module.correction).detach().clone()))
    model(torch.arange(8)[None])
    return read


@pytest.mark.parametrize("settings", [{}, {"cpu_offload": True, "zero": 1}, {"expert": 2}, {"tensor": 2}], ids=str)
def test_the_correction_of_a_router_is_read_in_float32(settings: dict[str, Any]) -> None:
    for read in POOL.run(read_corrections, settings, ranks=2):
        assert len(read) == 2
        for correction in read:
            assert correction.dtype == torch.float32 and correction.tolist() == [1 + n * 2.0**-12 for n in range(4)]


@pytest.fixture(scope="module")
def zero_3() -> Result:
    """What parameters that are freed after every use come to."""
    return run_training()


# (4 blocks + embedding, norm and head) x 4 micro-batches; the latter are not freed between forward and backward
COUNTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "3": ({"zero": 3}, 32 + 4, 16 + 4),
    "2": ({"zero": 2}, 16 + 4, 16 + 4),
    "2 by its other name": ({"reshard_after_forward": False}, 16 + 4, 16 + 4),
    "1": ({"zero": 1}, 4 + 1, 4 + 1),
    "3 gathered ahead": ({"prefetch": 2}, 32 + 4, 16 + 4),
    "3 in host memory": ({"cpu_offload": True}, 32 + 4, 16 + 4),
    "1 in host memory": ({"cpu_offload": True, "zero": 1}, 4 + 1, 4 + 1),
}


@pytest.mark.parametrize("level", COUNTS)
def test_each_level_communicates_as_often_as_needed_and_trains_the_same(level: str, zero_3: Result) -> None:
    settings, gathers, reductions = COUNTS[level]
    weights, counts = run_training(**settings)
    assert counts["_allgather_base_"] == gathers
    assert counts["_reduce_scatter_base_"] == reductions
    for name, weight in weights.items():
        torch.testing.assert_close(weight, zero_3[0][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "ranks", "message"),
    [
        ({"zero": 3, "reshard_after_forward": False}, 2, "parallel.zero: 3 contradicts reshard_after_forward: false"),
        ({"zero": 1, "reshard_after_forward": True}, 2, "parallel.zero: 1 contradicts reshard_after_forward: true"),
        ({"zero": 2, "pipeline": 2}, 2, "set 1 or 3"),
        (
            {"zero": 3, "pipeline": 2, "pipeline_schedule": "zbv"},
            2,
            "parallel.zero: 3 is not supported with parallel.pipeline_schedule",
        ),
        (
            {"reshard_after_forward": True, "pipeline": 2, "pipeline_schedule": "zbv"},
            2,
            "parallel.reshard_after_forward: true is not supported with parallel.pipeline_schedule: zbv",
        ),
        (
            {"zero": 1, "data_replicate": 2},
            2,
            "parallel.zero: 1 needs devices to shard over.*set parallel.data_replicate: 1",
        ),
        ({"cpu_offload": True}, 1, "parallel.cpu_offload: true needs devices to shard over.*devices: 2"),
    ],
)
def test_unsupported_levels_are_refused(settings: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ParallelArgs(**settings).resolve_dims(ranks)


def test_a_recipe_with_a_level_runs_on_one_device_too() -> None:
    assert ParallelArgs(zero=1).resolve_dims(1).world_size == 1
