"""Expert and context parallelism: every gradient is that of one process."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate

from litgpt.data.stream.batch import Batch
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.moe import Experts, MoE
from litgpt.parallel import collectives, context_attention, expert, ring_attention
from litgpt.parallel.apply import copy_full_tensor, full_tensor, parallelize
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.recompute import RecomputeArgs
from litgpt.recipe.train import LossArgs
from litgpt.train.evaluate import compute_validation_metrics, sample_continuation
from litgpt.train.local_batch import build_local_batch
from litgpt.train.objective import next_token
from litgpt.train.train_state import TrainState
from tests.layouts.layouts import (
    SHAPES,
    Case,
    Facts,
    build_global_batch,
    build_model,
    collect_facts,
    draw_values,
    find_deviations,
    measure_mutation,
    take_micro_batches,
)
from tests.layouts.pool import POOL

GATHER, HEADS, RING = ({"context_method": method} for method in ("all-gather", "ulysses", "ring"))
CASES = [
    # experts
    Case("shared experts", 2, {"expert": 2}, packed=True, more={"recompute": RecomputeArgs("full")}),
    Case("shared experts", 4, {"expert": 4, "expert_dispatch": "all-gather"}),
    Case("sinks", 2, {"expert_tensor": 2}, tuner="lora"),
    Case("chunked", 4, {"expert": 2}),  # an expert's rows are sharded
    # context
    Case("dense", 2, {"context": 2}, packed=True),
    Case("chunked", 2, {"context": 2} | GATHER, packed=True),
    Case("chunked", 2, {"context": 2} | HEADS),
    Case("sinks", 2, {"context": 2} | HEADS, packed=True),
    Case("gemma", 4, {"context": 2, "data_shard": 2}, packed=True),
    Case("dense", 2, {"context": 2} | RING),
    Case("one head", 4, {"context": 4} | RING, micro=1),
    Case("tied", 4, {"context": 2, "pipeline": 2} | RING, tuner="lora"),
]
SLOW = [
    Case("shared experts", 2, {"expert": 2}, packed=True),
    Case("shared experts", 2, {"expert": 2}, more={"recompute": RecomputeArgs("selective", modules=["moe", "norms"])}),
    Case("moe", 4, {"expert": 2, "pipeline": 2, "pipeline_schedule": "zbv"}, micro=1),
    Case("shared experts", 4, {"expert": 2, "tensor": 2}, tuner="lora"),
    Case("sinks", 4, {"expert": 2, "expert_tensor": 2}),
    Case("latent", 4, {"tensor": 2, "expert": 4}),
    Case("one head", 4, {"context": 4} | HEADS, packed=True, micro=1),
    Case("dense", 4, {"context": 2, "data_replicate": 2}),
    Case("shared experts", 4, {"expert": 2, "data_replicate": 2}),
    Case("sinks", 4, {"context": 4, "expert": 2} | GATHER),
    Case("learned", 4, {"context": 2, "tensor": 2} | HEADS),
    Case("learned", 4, {"context": 2, "tensor": 2} | RING),
    Case("latent", 4, {"context": 2, "tensor": 2}, packed=True),
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_layout_trains_as_one_process(case: Case) -> None:
    assert find_deviations(case) == {}


def without_grads_of_other_queries(case: Case) -> Facts:
    """Keys and values get the gradient of this rank's queries only."""
    context_attention.all_gather = collectives.all_gather_replicated
    return collect_facts(case)


def without_sums_over_widths(case: Case) -> Facts:
    """Parameters replicated over `expert_tensor` get the gradient of one rank only."""
    expert.Partial = Replicate  # type: ignore[assignment, misc]
    return collect_facts(case)


def without_rows_of_others(case: Case) -> Facts:
    """The gradient of a row that was on another rank is lost on the way back."""

    def return_own(grad_rows: Tensor, group: Any, input_splits: list[int], output_splits: list[int]) -> Tensor:
        outputs = collectives.all_to_all_no_grad(grad_rows, group, output_splits, input_splits)
        own_rank = dist.get_rank(group)
        return torch.cat([part * (rank == own_rank) for rank, part in enumerate(outputs.split(input_splits))])

    collectives._return_rows = return_own
    return collect_facts(case)


def without_grads_of_the_ring(case: Case) -> Facts:
    """The gradients of keys and values that were on other ranks are lost on the way back."""
    original = ring_attention._templated_ring_attention_backward

    def drop_remote_grads(**arguments: Any) -> tuple[Tensor, ...]:
        kernel = arguments["op"]

        def keep_first_step(**settings: Any) -> tuple[Tensor, ...]:
            query_grad, *others = kernel(**settings)
            return query_grad, *(grad if settings["is_causal"] else torch.zeros_like(grad) for grad in others)

        return original(**{**arguments, "op": keep_first_step})

    ring_attention._templated_ring_attention_backward = drop_remote_grads
    return collect_facts(case)


MUTATIONS = {
    without_grads_of_the_ring: Case("dense", 2, {"context": 2} | RING),
    without_grads_of_other_queries: Case("dense", 2, {"context": 2}),
    without_sums_over_widths: Case("sinks", 2, {"expert_tensor": 2}),
    without_rows_of_others: Case("shared experts", 2, {"expert": 2}),
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_missing_exchange_is_noticed(mutation: Callable[[Case], Facts]) -> None:
    case = MUTATIONS[mutation]
    assert measure_mutation(mutation, case)["gradient"] > 1e-3


VALIDATED = [
    *(Case("dense", 2, degrees) for degrees in ({"tensor": 2}, {"data_replicate": 2}, {"data_shard": 2})),
    Case("chunked", 2, {"context": 2} | GATHER, packed=True),
    Case("dense", 2, {"context": 2} | RING),
    pytest.param(Case("sinks", 4, {"context": 4, "expert": 2} | GATHER), marks=pytest.mark.slow),
    pytest.param(Case("learned", 4, {"context": 2, "tensor": 2} | HEADS), marks=pytest.mark.slow),
]


def evaluate_case(case: Case) -> tuple[float, list[int]]:
    """The validation loss of a model over 3 micro-batches of the global set, and what it writes."""
    mesh = Mesh(ParallelArgs(**case.parallel).resolve_dims(case.ranks), "cpu") if case.ranks > 1 else None
    model = build_model(case, mesh)
    for name, parameter in model.named_parameters():
        copy_full_tensor(parameter, draw_values(model.config, name, parameter.shape))
    train_state = TrainState(model, [], torch.device("cpu"), PRECISIONS["64-true"], mesh)
    rank, ranks = (mesh.rank("data"), mesh.dims.data_ranks) if mesh else (0, 1)
    batches = take_micro_batches(build_global_batch(packed=case.packed), rank, ranks, 2)
    loss = compute_validation_metrics(train_state, batches, next_token(LossArgs(chunk_rows=7)), max_iters=3)["val_loss"]
    return loss, sample_continuation(train_state, [3, 1, 4, 1, 5], max_new_tokens=7, window=9, seed=2, temperature=2.0)


@pytest.mark.parametrize("case", VALIDATED, ids=str)
def test_validation_and_samples_are_those_of_one_process(case: Case) -> None:
    expected, expected_text = evaluate_case(case.single_process)
    for loss, text in POOL.run(evaluate_case, case, ranks=case.ranks):
        assert abs(loss - expected) < 1e-9 and text == expected_text


ROWS = [[0, 5, 0, 2], [0, 0, 0, 0], [1, 0, 0, 0], [0, 4, 0, 0]]
"""How many rows each rank has for each of four experts: one rank has none, and one expert gets none."""


def compare_uneven_rows(settings: dict[str, Any]) -> None:
    """Rows that are distributed unevenly have the outputs and gradients of a single process."""
    mesh = Mesh(ParallelArgs(**settings).resolve_dims(4), "cpu")
    config = SHAPES["sinks"]
    torch.manual_seed(1)
    single, block = Experts(config), MoE(config)
    experts = block.experts
    experts.load_state_dict(single.state_dict())
    model = SimpleNamespace(config=config, local_blocks=[SimpleNamespace(mlp=block, experts=experts)])
    expert.apply_expert_parallel(model, mesh, ParallelArgs(**settings))  # type: ignore[arg-type]
    counts_RE = torch.tensor(ROWS)
    x, weights = torch.randn(int(counts_RE.sum()), 32), torch.rand(int(counts_RE.sum()), 1)
    owner = torch.arange(4).repeat(4).repeat_interleave(counts_RE.flatten())
    order = owner.sort(stable=True).indices
    expected = torch.empty_like(x)
    expected[order] = single(x[order], counts_RE.sum(0).cumsum(0).int(), weights[order])
    expected.square().sum().backward()
    local_rows = range(int(counts_RE[: dist.get_rank()].sum()), int(counts_RE[: dist.get_rank() + 1].sum()))
    local_x = x[local_rows.start : local_rows.stop].requires_grad_()
    ends = counts_RE[dist.get_rank()].cumsum(0).int()
    outputs = block.start_experts(local_x, ends, weights[local_rows.start : local_rows.stop])()
    torch.testing.assert_close(outputs, expected[local_rows.start : local_rows.stop], rtol=1e-4, atol=1e-5)
    outputs.square().sum().backward()
    for name, parameter in experts.named_parameters():
        expected = single.get_parameter(name).grad
        assert parameter.grad is not None and expected is not None
        grad = full_tensor(parameter.grad)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5, msg=name)
        assert grad[2].eq(0).all(), name


@pytest.mark.parametrize("dispatch", ["all-to-all", "all-gather"])
@pytest.mark.parametrize("degrees", [{"expert": 4}, {"expert": 2, "expert_tensor": 2}], ids=str)
def test_ranks_without_rows_and_experts_without_tokens(dispatch: str, degrees: dict[str, int]) -> None:
    POOL.run(compare_uneven_rows, {**degrees, "expert_dispatch": dispatch}, ranks=4)


def record_overlap() -> list[str]:
    """What one rank of a block with shared experts does, in order, in forward and in backward."""
    settings, block, events = {"expert": 2}, MoE(SHAPES["shared experts"]), []
    model = SimpleNamespace(
        config=block.router.config, local_blocks=[SimpleNamespace(mlp=block, experts=block.experts)]
    )
    mesh = Mesh(ParallelArgs(**settings).resolve_dims(2), "cpu")
    expert.apply_expert_parallel(model, mesh, ParallelArgs(**settings))  # type: ignore[arg-type]
    exchange = dist.all_to_all_single

    def record_exchange(*arguments: Any, async_op: bool = False, **more: Any) -> Any:
        work = exchange(*arguments, async_op=async_op, **more)
        if not async_op:
            return work
        events.append("start")
        return SimpleNamespace(wait=lambda: (work.wait(), events.append("wait")))

    assert block.shared is not None
    for name, module in {"shared": block.shared, "experts": block.experts}.items():
        module.register_forward_hook(lambda *_, name=name: events.append(name))
    block.shared.gate.weight.register_hook(lambda _: events.append("shared gradient"))
    block.experts.gate.register_hook(lambda _: events.append("experts gradient"))
    with patch.object(dist, "all_to_all_single", record_exchange):
        block(torch.randn(1, 9, 32, requires_grad=True)).sum().backward()
    return events


def test_shared_experts_run_while_rows_and_their_gradients_are_sent() -> None:
    exchange = ["start", "start", "wait", "wait"]
    forward, backward = ([*exchange[:2], f"shared{step}", *exchange[2:]] for step in ("", " gradient"))
    for events in POOL.run(record_overlap, ranks=2):
        assert events == [*forward, "experts", "experts gradient", *backward]


REFUSED = {
    "n_expert": ("moe", {"expert": 3}, 3),
    "set 1": ("dense", {"expert": 2}, 2),
    "width of experts": ("sinks", {"expert_tensor": 3}, 3),
    "context_method: all-gather": ("learned", {"context": 3, "context_method": "ulysses"}, 3),
}


RING_REFUSES = {
    "caps scores": [("gemma", 0)],
    "has attention sinks": [("sinks", 0)],
    "has latent attention": [("latent", 0)],
    "several documents": [("dense", 2)],
    "more tokens than a window": [("chunked", 0), ("chunked", 1)],
}


def get_refusal(shape: str, settings: dict[str, Any], ranks: int, documents: int = 0) -> str:
    """The message with which a layout is refused."""
    mesh = Mesh(ParallelArgs(**settings).resolve_dims(ranks), "cpu")
    with torch.device("meta"):
        model = GPT(SHAPES[shape])
    try:
        parallelize(model, mesh, ParallelArgs(**settings), precision=PRECISIONS["64-true"], compile_blocks=False)
        model.to_empty(device="cpu")
        ids = torch.zeros(1, 12, dtype=torch.long)
        batch = Batch(ids, ids, documents=torch.arange(12)[None] * documents // 12 if documents else None)
        local = build_local_batch(batch, model.config, getattr(model, "local_tokens", None))
        model(local.ids, inputs=local.inputs)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("message", REFUSED)
def test_unsupported_layouts_are_refused_in_one_line(message: str) -> None:
    shape, settings, ranks = REFUSED[message]
    lines = POOL.run(get_refusal, shape, settings, ranks, ranks=ranks)
    assert all(message in line and "\n" not in line for line in lines), lines


@pytest.mark.parametrize("message", RING_REFUSES)
def test_unsupported_ring_attention_is_refused(message: str) -> None:
    for shape, documents in RING_REFUSES[message]:
        lines = POOL.run(get_refusal, shape, {"context": 2} | RING, 2, documents, ranks=2)
        assert all(message in line and line.endswith("set parallel.context_method: all-gather") for line in lines), (
            lines
        )
