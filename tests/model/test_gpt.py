"""The decoder: layouts that must not matter, options that must."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from litgpt.model.attention_inputs import build_attention_inputs
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import draw_init_value, initialize
from litgpt.model.layers import SwiGLU

LLAMA = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 48, "bias": False}
SHAPES: dict[str, dict[str, Any]] = {
    "neox": {},
    "neox-serial": {"parallel_residual": False},
    "shared-norm": {"shared_attention_norm": True},
    "llama": {**LLAMA, "n_query_groups": 2, "parallel_residual": False, "rotary_percentage": 1.0},
    "head-norms": {**LLAMA, "n_query_groups": 1, "norm_qk": True, "attn_bias": True},
    "gemma": {**LLAMA, "norm_class_name": "OffsetRMSNorm", "mlp_class_name": "GemmaMLP", "scale_embeddings": True},
    "tied": {"tie_embeddings": True},
    "head-bias": {"lm_head_bias": True, "attention_scores_scalar": 12},
}


def small(**changes: Any) -> GPT:
    """A model of two blocks with seeded weights."""
    size = {"n_layer": 2, "n_embd": 32, "n_head": 4, "padded_vocab_size": 64, "block_size": 64, "head_size": 16}
    model = GPT(Config(**{**size, **changes}))
    initialize(model, 3)
    return model


def ids(rows: int = 2, tokens: int = 24) -> torch.Tensor:
    return torch.randint(0, 64, (rows, tokens), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", SHAPES)
def test_documents_are_separate_sequences(name: str) -> None:
    model = small(**SHAPES[name])
    tokens = ids(2, 24)
    documents = torch.tensor([[0] * 10 + [1] * 14, [4] * 24])
    positions = torch.tensor([[*range(10), *range(14)], [*range(24)]])
    together = model(tokens, documents_BT=documents, positions_BT=positions)
    apart = torch.cat([model(tokens[:1, :10]), model(tokens[:1, 10:])], dim=1)
    torch.testing.assert_close(together[:1], apart, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1:], model(tokens[1:]), atol=1e-5, rtol=1e-5)


def test_positions_are_relative_within_a_document() -> None:
    model = small(**SHAPES["llama"])
    torch.testing.assert_close(model(ids(), positions_BT=torch.arange(24).repeat(2, 1) + 7), model(ids()))


def test_later_tokens_change_nothing_before_them() -> None:
    model = small()
    other = ids()
    other[:, 12:] = 0
    torch.testing.assert_close(model(ids())[:, :12], model(other)[:, :12])
    assert not torch.allclose(model(ids())[:, 12:], model(other)[:, 12:])


@pytest.mark.parametrize("name", SHAPES)
def test_blocks_compile_without_breaks(name: str) -> None:
    model = small(**SHAPES[name])
    documents = torch.zeros(2, 24, dtype=torch.int32)
    expected = model(ids()), model(ids(), documents_BT=documents)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(ids()), expected[0])
    torch.testing.assert_close(model(ids(), documents_BT=documents), expected[1])


@pytest.mark.parametrize("name", SHAPES)
def test_meta_build_gives_the_same_model(name: str) -> None:
    with torch.device("meta"):
        model = GPT(small(**SHAPES[name]).config)
    model.to_empty(device="cpu")
    initialize(model, 3)
    torch.testing.assert_close(model(ids()), small(**SHAPES[name])(ids()), atol=0, rtol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_float64_gradients_of_rows_add_up_to_the_batch(name: str) -> None:
    model = small(**SHAPES[name]).double()
    whole = torch.autograd.grad(model(ids(4)).logsumexp(-1).sum(), list(model.parameters()))
    parts = [torch.autograd.grad(model(row[None]).logsumexp(-1).sum(), list(model.parameters())) for row in ids(4)]
    for expected, *actual in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(actual), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", SHAPES)
def test_half_precision_stays_close(name: str) -> None:
    model = small(**SHAPES[name])
    exact = model(ids())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(ids())
    pure = model.bfloat16()(ids())
    assert mixed.dtype == pure.dtype == torch.bfloat16
    scale = exact.std()
    assert (mixed - exact).abs().mean() < 0.02 * scale and (pure - exact).abs().mean() < 0.03 * scale


def test_dropout_acts_in_training_only() -> None:
    model = small(dropout=0.5)
    torch.manual_seed(0)
    assert not torch.equal(model(ids()), model(ids()))
    torch.testing.assert_close(model.eval()(ids()), small().eval()(ids()), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["neox", "tied", "head-bias"])
def test_head_gets_what_makes_the_logits(name: str) -> None:
    model = small(**SHAPES[name])
    hidden, weight, bias, _ = model(ids(), head=lambda *parts: parts)
    assert hidden.shape == (2, 24, 32) and weight.shape == (64, 32)
    torch.testing.assert_close(torch.nn.functional.linear(hidden, weight, bias), model(ids()))


def test_tied_head_is_one_parameter_that_both_ends_train() -> None:
    model = small(tie_embeddings=True)
    assert "head.weight" not in model.state_dict() and model.output_weight is model.embedding.weight
    unused = torch.full((1, 4), 63)
    (gradient,) = torch.autograd.grad(model(unused).logsumexp(-1).sum(), [model.embedding.weight])
    assert gradient[:63].abs().sum() > 0


def test_a_part_of_the_heads_runs_alone() -> None:
    model = small(**SHAPES["llama"])
    attention = model.blocks[0].attention
    x, inputs = torch.randn(1, 8, 32), build_attention_inputs(model.config, torch.arange(8))
    whole = attention(x, inputs)
    parts = []
    for half in range(2):  # one of the two groups: half the queries, keys and values, and the columns they feed
        part = copy.deepcopy(attention)
        for layer in (part.q, part.k, part.v):
            layer.weight = torch.nn.Parameter(layer.weight.chunk(2)[half])
        part.out.weight = torch.nn.Parameter(part.out.weight.chunk(2, dim=1)[half])
        parts.append(part(x, inputs))
    torch.testing.assert_close(sum(parts), whole)


def test_first_values_depend_on_seed_and_name_alone() -> None:
    config = small().config
    model = small()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, draw_init_value(config, name, parameter.shape, 3)), name
    weights = [p for name, p in model.named_parameters() if name.endswith(("q.weight", "k.weight"))]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])
    deeper = small(n_layer=4)
    assert torch.equal(deeper.blocks[1].attention.q.weight, model.blocks[1].attention.q.weight)
    other_seed = draw_init_value(config, "head.weight", (64, 32), 4)
    assert not torch.equal(other_seed, model.head.weight)


def test_first_values_have_the_deviations_asked_for() -> None:
    model = small(n_embd=256, n_head=4, head_size=64, **{**LLAMA, "intermediate_size": 512})
    block = model.blocks[0]
    for weight, expected in [
        (model.embedding.weight, (2 / (5 * 256)) ** 0.5),
        (block.mlp.up.weight, (2 / (5 * 256)) ** 0.5),
        (block.mlp.down.weight, 1 / (256**0.5 * 2)),
        (block.attention.out.weight, 1 / (256**0.5 * 2)),
    ]:
        assert abs(weight.std().item() / expected - 1) < 0.02 and abs(weight.mean().item()) < 0.1 * expected
    neox = small(n_embd=256, head_size=64).blocks[0]
    assert abs(neox.mlp.down.weight.std().item() / (2 / (5 * 256)) ** 0.5 - 1) < 0.02
    assert neox.mlp.down.bias.abs().sum() == 0 and torch.equal(neox.norm_1.weight, torch.ones(256))
    assert small(**SHAPES["gemma"]).norm.weight.abs().sum() == 0


def test_swiglu_keeps_its_inputs_alone_and_has_the_gradient_of_the_formula() -> None:
    gate, up, output_grad = torch.randn(3, 4, 5, dtype=torch.float64)
    inputs, saved = (gate.requires_grad_(), up.requires_grad_()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        y = SwiGLU.apply(gate, up)
    plain = F.silu(gate) * up
    assert torch.equal(y, plain)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in inputs}
    grads = (torch.autograd.grad(output, inputs, output_grad) for output in (y, plain))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
