"""A reference takes the place of the policy's weights in every layout, which then have the same bits as before."""

from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.parallel.apply import apply_ddp, copy_full_tensor
from litgpt.parallel.exchange import get_local_tensor
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import PRECISIONS
from litgpt.parallel.reduce import all_reduce_sum
from litgpt.recipe.optimizer import AdamW
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.train import LossArgs
from litgpt.recipe.tuner import LoRA
from litgpt.train.evaluate import evaluate
from litgpt.train.objective import next_token
from litgpt.train.optimizer import build_optimizers
from litgpt.train.reference import Reference, copy_values, hash_parameters
from litgpt.train.step import compute_gradients, run_model, train_step
from litgpt.train.train_state import TrainState
from tests.layouts import layouts
from tests.layouts.layouts import Case, build_global_batch, build_model, draw_values, take_micro_batches
from tests.layouts.pool import POOL

OBJECTIVE = next_token(LossArgs(chunk_rows=7))
layouts.TUNERS["lora with dropout"] = LoRA(r=2, dropout=0.3, bias="all", target_modules=["gate", "up", "down", "q"])
CASES = [
    Case("dense"),
    Case("dense", tuner="lora", quantize="bnb.nf4"),
    Case("dense", 2, {"data_replicate": 2}),
    *(Case("tied", 2, {"data_shard": 2, "zero": level}) for level in (1, 2, 3)),
    Case("tied", 2, {"data_shard": 2, "cpu_offload": True, "prefetch": 1}),
    Case("tied", 2, {"tensor": 2}),
    Case("tied", 2, {"pipeline": 2}),
    Case("tied", 2, {"pipeline": 2, "pipeline_schedule": "zbv"}, tuner="lora"),
    Case("dense", 2, {"context": 2}, packed=True),
    Case("shared experts", 2, {"expert": 2}),
    Case("shared experts", 2, {"expert": 2}, tuner="lora with dropout"),
]
SLOW = [
    Case("moe", 4, {"pipeline": 2, "data_shard": 2, "zero": 1}),
    Case("one head", 2, {"tensor": 2}, tuner="lora", quantize="bnb.nf4-dq"),
]


class ForwardError(Exception):
    """An error in the middle of a forward pass."""


def raise_error(*_: Any) -> None:
    """A hook of a module."""
    raise ForwardError


def compute_logits(train_state: TrainState, batches: list[Any]) -> list[Tensor]:
    """The logits of this rank's tokens; none on ranks without the last stage."""
    with torch.no_grad():
        outputs = [evaluate(train_state, train_state.local_batch(batch), run_model) for batch in batches]
    return [output for output in outputs if output is not None]


def copy_bits(train_state: TrainState) -> dict[str, Tensor]:
    """This rank's shards of all parameters."""
    return {name: get_local_tensor(tensor).clone() for name, tensor in train_state.core.named_parameters()}


def have_same_bits(one: Any, other: Any) -> bool:
    """Whether tensors, or those in lists and dictionaries, are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(have_same_bits(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(have_same_bits, one, other))
    return torch.equal(one, other)


def collect_gradients(train_state: TrainState, batches: list[Any]) -> dict[str, Tensor]:
    """This rank's shards of all gradients, with the same dropout every time."""
    torch.manual_seed(1)
    counts = [sum(batch.targets for batch in batches) * train_state.counts_batch]
    targets = all_reduce_sum(counts, train_state.device)
    compute_gradients(train_state, batches, OBJECTIVE, counts=targets)
    named = train_state.core.named_parameters()
    grads = {name: get_local_tensor(tensor.grad).clone() for name, tensor in named if tensor.grad is not None}
    train_state.zero_grad()
    return grads


def exchange_and_compare(case: Case) -> dict[str, bool]:
    """Train, compute with a reference, and compare bits; the names of the comparisons, and whether they hold."""
    mesh = Mesh(ParallelArgs(**case.parallel).resolve_dims(case.ranks), "cpu") if case.ranks > 1 else None
    model = build_model(case, mesh)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            copy_full_tensor(parameter, draw_values(model.config, name, parameter.shape))
    optimizers = build_optimizers(AdamW(lr=1e-2), model)
    train_state = TrainState(apply_ddp(model, mesh), optimizers, torch.device("cpu"), PRECISIONS["64-true"], mesh)
    rank, ranks = (mesh.rank("data"), mesh.dims.data_ranks) if mesh else (0, 1)
    batches = take_micro_batches(build_global_batch(packed=case.packed), rank, ranks, 2)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    reference = Reference(copy_values(model, trained))
    first_hash = hash_parameters(model)
    model.eval()
    first = compute_logits(train_state, batches)
    model.train()
    take_step = partial(train_step, train_state, batches, OBJECTIVE)
    take_step()
    bits, gradients, last_hash = copy_bits(train_state), collect_gradients(train_state, batches), hash_parameters(model)
    with reference.applied(model):
        is_in_training_mode = model.training
        logits, applied_hash = compute_logits(train_state, batches), hash_parameters(model)
    facts = {
        "logits are those of the initial model": have_same_bits(logits, first),
        "hash is that of the initial model": applied_hash == first_hash != last_hash,
        "bits are those of the policy": have_same_bits(copy_bits(train_state), bits),
        "dropout is off, and on again": not is_in_training_mode and model.training,
        "gradients are those of the policy": have_same_bits(collect_gradients(train_state, batches), gradients),
    }
    with suppress(ForwardError), reference.applied(model):
        hook = model.local_blocks[-1].mlp.register_forward_pre_hook(raise_error)
        if train_state.pipeline is not None:  # in which other stages would wait for a failed one
            raise ForwardError
        compute_logits(train_state, batches)
    hook.remove()
    facts["bits are those of the policy after an error"] = have_same_bits(copy_bits(train_state), bits)
    facts["gradients after an error"] = have_same_bits(collect_gradients(train_state, batches), gradients)
    return facts


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_a_reference_takes_the_place_of_the_policy(case: Case) -> None:
    for facts in POOL.run(exchange_and_compare, case, ranks=case.ranks):
        assert [name for name, holds in facts.items() if not holds] == []
