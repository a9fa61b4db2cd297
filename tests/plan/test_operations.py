"""The work that is recorded of a step is what its tensors, its layers and its layout amount to."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from litgpt.model.flops import compute_training_flops
from litgpt.parallel.collective_calls import Collective
from litgpt.parallel.fake_group import fake_mesh
from litgpt.plan.fake_tensors import fake_tensors
from litgpt.plan.memory import plan_step_memory
from litgpt.plan.operations import Chain, Operation, OperationRecorder
from litgpt.recipe.parallel import ParallelDims
from tests.plan.test_memory import EXPERTS, PRETRAIN, TOKENS, TRAIN, Case, build_case


def record(run, *, fused: bool = True) -> list[Operation]:
    recorder = OperationRecorder(fused=fused)
    with recorder:
        run()
    return recorder.operations


def record_step(case: Case, dims: ParallelDims | None = None) -> OperationRecorder:
    recipe, spec = build_case(case)
    recorder = OperationRecorder(fused=True)
    with fake_mesh(dims or ParallelDims(), 0) as mesh:
        plan_step_memory(recipe, spec, mesh, length=TOKENS, steps=10, micro_batches=2, operations=recorder)
    return recorder


@pytest.mark.parametrize(("fused", "passes"), [(True, 2), (False, 6)])
def test_a_fused_chain_reads_its_input_and_writes_its_result(fused: bool, passes: int):
    x = torch.ones(64, 32)
    kept: list[Tensor] = []
    operations = record(lambda: kept.append((x * 2 + 1).relu()), fused=fused)
    assert sum(operation.bytes for operation in operations) == passes * x.numel() * 4
    assert {operation.kind for operation in operations} == {"memory"}


def test_a_chain_writes_what_is_used_after_it():
    x, weight = torch.ones(64, 32), torch.ones(32, 8)
    kept: list[Tensor] = []

    def run():
        half = x * 0.5
        kept.append(half)
        kept.append((half + 1) @ weight)

    chain, product = record(run)
    assert chain.bytes == 3 * x.numel() * 4  # x, its half, and the operand
    assert product.flops == 2 * 64 * 32 * 8 and product.bytes == 4 * (64 * 32 + 32 * 8 + 64 * 8)


def test_a_tensor_at_the_address_of_a_freed_one_is_read_too():
    chain = Chain()
    first = torch.ones(64, 32)
    chain.add([first], [], [])
    address = first.untyped_storage()._cdata
    del first
    others: list[Tensor] = []
    while not others or others[-1].untyped_storage()._cdata != address:
        assert len(others) < 10_000
        others.append(torch.ones(64, 32))
    chain.add(others[-1:], [], [])
    assert chain.count_traffic() == 2 * 64 * 32 * 4


def test_products_in_fp8_are_as_many():
    recorders = [
        record_step(Case("pretrain", PRETRAIN | {"fp8": {"recipe": recipe}})) for recipe in (None, "tensorwise")
    ]
    plain, fp8 = ([o for o in recorder.operations if o.kind == "matmul"] for recorder in recorders)
    assert sum(o.flops for o in fp8) == sum(o.flops for o in plain)
    in_fp8 = sum(o.flops for o in fp8 if o.dtype in (torch.float8_e4m3fn, torch.float8_e5m2))
    shape = build_case(Case("pretrain", PRETRAIN))[1].config
    head = 3 * 2 * 4 * TOKENS * shape.n_embd * shape.padded_vocab_size
    assert in_fp8 == sum(o.flops for o in plain) - head


def test_causal_attention_has_half_of_the_products():
    q = torch.ones(2, 4, 64, 16, requires_grad=True)
    whole, causal = (
        [o.flops for o in record(lambda c=c: F.scaled_dot_product_attention(q, q, q, is_causal=c).sum().backward())]
        for c in (False, True)
    )
    products = 2 * 2 * 4 * 64 * 64 * 16 * 2
    assert [flops for flops in whole if flops] == [products, 2.5 * products]
    assert [flops for flops in causal if flops] == [products / 2, 2.5 * products / 2]


def test_lookups_read_only_their_rows():
    table, ids = torch.ones(1000, 8), torch.tensor([1, 2])
    (lookup,) = record(lambda: F.embedding(ids, table))
    assert lookup.bytes == 2 * 2 * 8 * 4


@pytest.mark.parametrize(
    "config", [PRETRAIN["model_config"], pytest.param(EXPERTS, marks=pytest.mark.slow)], ids=["dense", "experts"]
)
def test_flops_of_a_step_are_those_of_the_model(config):
    case = Case("pretrain", PRETRAIN | {"precision": "bf16-mixed", "model_config": config})
    recorder = record_step(case)
    _, spec = build_case(case)
    counted = sum(operation.flops for operation in recorder.operations)
    # the backward pass of attention computes the scores again: five products, where the model has four
    counted -= sum(o.flops for o in recorder.operations if o.kind == "attention" and "backward" in o.name) / 5
    tokens = recorder.micro_batches * TRAIN["micro_batch_size"] * TOKENS
    expected = compute_training_flops(spec.config, tokens=tokens, sequence_length=TOKENS)
    assert counted == pytest.approx(expected, rel=1e-3)


def test_parameters_are_gathered_twice_and_reduced_once_for_each_micro_batch():
    settings = {"precision": "bf16-mixed", "devices": 2, "train": TRAIN | {"global_batch_size": 8}}
    case = Case("pretrain", PRETRAIN | settings)
    recorder = record_step(case, ParallelDims(data_shard=2))
    _, spec = build_case(case)
    parameters = sum(parameter.numel() for parameter in spec.build_whole_model().parameters())
    sent = {kind: 0 for kind in ("all_gather", "reduce_scatter")}
    for operation in recorder.operations:
        if operation.overlaps:
            assert operation.collective.ranks == (0, 1)
            sent[operation.collective.kind] += operation.collective.bytes
    assert recorder.micro_batches == 2
    layers = sum(p.numel() for p in spec.build_whole_model().blocks.parameters())
    # in bfloat16; embedding and head stay gathered between forward and backward
    assert sent["all_gather"] == pytest.approx(2 * 2 * (parameters + layers), rel=0.02)
    assert sent["reduce_scatter"] == pytest.approx(2 * 4 * parameters, rel=0.02)


@pytest.mark.slow
def test_collectives_of_layers_are_waited_for():
    case = Case("pretrain", PRETRAIN | {"precision": "bf16-mixed", "devices": 2, "parallel": {"tensor": 2}})
    recorder = record_step(case, ParallelDims(tensor=2))
    waited = [o.collective for o in recorder.operations if o.phase == "forward" and o.number == 1 and o.collective]
    hidden = TRAIN["micro_batch_size"] * TOKENS * 64 * 2
    assert not any(o.overlaps for o in recorder.operations)
    assert waited.count(Collective("all_gather", hidden, (0, 1))) >= 6  # of the inputs of 3 x 2 sub-layers
    assert waited.count(Collective("reduce_scatter", hidden, (0, 1))) >= 6


def test_what_the_host_makes_is_no_work():
    with fake_tensors():
        assert record(lambda: torch.empty(8).view(2, 4).t()) == []
