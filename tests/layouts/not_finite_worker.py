"""A NaN in the gradient of one rank, after gradients were summed, changes nothing on any rank."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.parallel import apply
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.optimizer import AdamW
from litgpt.recipe.parallel import ParallelArgs, ParallelDims
from litgpt.recipe.train import LossArgs
from litgpt.train import step
from litgpt.train.objective import next_token
from litgpt.train.optimizer import build_optimizers
from litgpt.train.train_state import TrainState
from tests.layouts.gradient_worker import SHAPE, build_global_batch, take_micro_batches


def to_local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_state(train_state: TrainState) -> list[torch.Tensor]:
    """Copies of this rank's weights and moments."""
    moments = (value for state in train_state.optimizers[0].state.values() for value in state.values())
    return [to_local_tensor(tensor).clone() for tensor in (*train_state.parameters(), *moments)]


def worker(folder: Path, degrees: tuple[int, int]) -> None:
    """Step, step with a NaN on rank 1 only, step again."""
    dist.init_process_group("gloo")
    mesh = Mesh(ParallelDims(data_replicate=degrees[0], data_shard=degrees[1]), "cpu")
    model = GPT(SHAPE)
    apply.parallelize(model, mesh, ParallelArgs(), precision=PRECISIONS["32-true"], compile_blocks=False)
    initialize(model, 3, write=apply.copy_full_tensor)
    optimizers = build_optimizers(AdamW(lr=1e-3), model)
    device, precision = torch.device("cpu"), PRECISIONS["32-true"]
    train_state = TrainState(apply.apply_ddp(model, mesh), optimizers, device, precision, mesh)
    batches, objective = take_micro_batches(build_global_batch(), dist.get_rank(), 2, 2), next_token(LossArgs())
    assert not step.train_step(train_state, batches, objective).skipped
    before = copy_state(train_state)
    original = step.compute_gradient_norm

    def compute_with_nan(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        if dist.get_rank() == 1:
            to_local_tensor(next(p.grad for p in parameters if p.grad is not None)).view(-1)[0] = float("nan")
        return original(parameters)

    step.compute_gradient_norm = compute_with_nan
    assert step.train_step(train_state, batches, objective).skipped
    step.compute_gradient_norm = original
    assert all(torch.equal(value, old) for value, old in zip(copy_state(train_state), before, strict=True))
    assert not step.train_step(train_state, batches, objective).skipped
    assert any(not torch.equal(value, old) for value, old in zip(copy_state(train_state), before, strict=True))
    (folder / f"done-{degrees}-{dist.get_rank()}").touch()
    dist.barrier()
