"""Gradients are summed over ranks in the data type of `parallel.reduce_dtype`, under every data parallelism."""

from typing import Any

import pytest
import torch

from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.parallel.apply import apply_ddp, copy_full_tensor, full_tensor, parallelize
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import build_precision
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.train import LossArgs
from litgpt.train.objective import next_token
from litgpt.train.step import compute_gradients
from litgpt.train.train_state import TrainState
from tests.layouts.layouts import build_global_batch, take_micro_batches
from tests.layouts.pool import POOL
from tests.store.models import small


def compute(precision_name: str, degrees: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The gradients of one micro-batch a rank."""
    settings = ParallelArgs(**degrees)
    mesh, precision = Mesh(settings.resolve_dims(2), "cpu"), build_precision(precision_name, settings.reduce_dtype)
    with torch.device("meta"):
        model = GPT(small("Llama-3.2-1B", n_layer=1, tie_embeddings=False)).to(precision.storage)
    parallelize(model, mesh, settings, precision=precision, compile_blocks=False)
    model.to_empty(device="cpu")
    initialize(model, 1, write=copy_full_tensor)
    wrapped = apply_ddp(model, mesh, precision.reduce)
    train_state = TrainState(wrapped, [], torch.device("cpu"), precision, mesh)
    batches = take_micro_batches(build_global_batch(packed=False), mesh.rank("data"), 2, 4)
    compute_gradients(train_state, batches, next_token(LossArgs()), counts=[1.0])
    return {name: full_tensor(parameter.grad) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("layout", [{"data_shard": 2}, {"data_replicate": 2}], ids=str)
def test_sums_of_gradients_have_the_given_type(layout: dict[str, int]) -> None:
    exact = POOL.run(compute, "32-true", layout, ranks=2)[0]
    rounded = POOL.run(compute, "32-true", {**layout, "reduce_dtype": "bf16"}, ranks=2)[0]
    same = POOL.run(compute, "32-true", {**layout, "reduce_dtype": "fp32"}, ranks=2)[0]
    for name, gradient in exact.items():
        assert torch.equal(gradient, same[name])
        assert rounded[name].dtype == gradient.dtype == torch.float32
        assert torch.equal(rounded[name].bfloat16().float(), rounded[name])
        assert not torch.equal(rounded[name], gradient)
        assert (rounded[name] - gradient).norm() < 2**-7 * gradient.norm()


def test_gradients_in_bfloat16_have_the_sums_of_shards_under_ddp() -> None:
    shards, replicas = (
        POOL.run(compute, "bf16-true", layout, ranks=2)[0] for layout in ({"data_shard": 2}, {"data_replicate": 2})
    )
    for name, gradient in shards.items():
        assert gradient.dtype == torch.bfloat16 and torch.equal(gradient, replicas[name])
