"""Causal attention of training on a CPU against plain arithmetic in float64, uncompiled and compiled."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from litgpt.model import causal_products
from litgpt.model.attention import attend
from litgpt.model.cpu_attention import BY_PRODUCTS

SCALE = 0.3
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 0.003}


def make_inputs(heads: int, groups: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output; heads of a token are next to each other, as in a model."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, tokens, count, 8) for count in (heads, groups, groups, heads)]
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def attend_exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by its definition."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    is_later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return (q @ k.mT * SCALE).masked_fill(is_later, -torch.inf).softmax(-1) @ v


def train(function: object, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output of attention, and the gradients of queries, keys and values."""
    *leaves, grad = inputs
    leaves = [x.detach().requires_grad_() for x in leaves]
    output = function(*leaves)  # type: ignore[operator]
    return [output, *torch.autograd.grad(output, leaves, grad)]


def attend_plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the package."""
    return attend(q, k, v, mask=None, causal=True, scale=SCALE)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (6, 2)])
@pytest.mark.parametrize("tokens", [BY_PRODUCTS.start, 390])
def test_products_are_attention(
    tokens: int, heads: int, groups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        causal_products, "BLOCK_SCORES", 2 * heads * causal_products.BLOCK_QUERIES * tokens
    )  # two of three rows
    q, *others = make_inputs(heads, groups, tokens, dtype)
    for factor in (1, 60):  # scores of later keys that are too large for exp
        inputs = [q * factor, *others]
        exact = train(attend_exactly, [x.double() for x in inputs])
        actual = train(attend_plainly, inputs)
        assert actual[0].transpose(1, 2).is_contiguous()  # so that the next layer keeps no copy
        for x, expected in zip(actual, exact, strict=True):
            assert x.dtype == dtype
            assert (x - expected).norm() < TOLERANCES[dtype] * factor * expected.norm()


def test_autocast_does_not_narrow_the_products() -> None:
    inputs = make_inputs(2, 1, BY_PRODUCTS.start, torch.bfloat16)
    expected = train(attend_plainly, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = train(attend_plainly, inputs)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_one_graph_for_all_numbers_of_tokens(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend_plainly, backend=counter, fullgraph=True)
    for tokens in (BY_PRODUCTS.start - 1, *BY_PRODUCTS[::128], BY_PRODUCTS.stop):
        inputs = make_inputs(2, 1, tokens, dtype)
        for actual, expected in zip(train(compiled, inputs), train(attend_plainly, inputs), strict=True):
            torch.testing.assert_close(actual, expected)
            assert actual.stride() == expected.stride()
    assert counter.frame_count <= 2  # for the first number, and for all


@pytest.mark.parametrize("tokens", [8, BY_PRODUCTS.start])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("is_contiguous", [False, True])
def test_the_operation_is_what_it_is_declared_to_be(is_contiguous: bool, dtype: torch.dtype, tokens: int) -> None:
    inputs = [x.contiguous() if is_contiguous else x for x in make_inputs(4, 2, tokens, dtype)]
    q, k, v, grad = (x.requires_grad_() for x in inputs)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.litgpt.causal_attention.default, (q, k, v, SCALE), test_utils=tests)
    outputs = torch.ops.litgpt.causal_attention(q, k, v, SCALE)
    saved = [x.detach() for x in (grad, q, k, v, *outputs)]
    backward = torch.ops.litgpt.causal_attention_backward.default
    torch.library.opcheck(backward, (*saved, SCALE), test_utils=("test_schema", "test_faketensor"))
    results = [*outputs, *backward(*saved, SCALE)]
    assert all(x.transpose(1, 2).is_contiguous() for x in results)  # as graphs are compiled for


def test_second_derivatives_are_refused() -> None:
    *leaves, grad = make_inputs(4, 2, BY_PRODUCTS.start)
    q, k, v = (x.requires_grad_() for x in leaves)
    (first,) = torch.autograd.grad(attend_plainly(q, k, v), q, grad, create_graph=True)
    with pytest.raises(NotImplementedError, match="use attention: math"):
        first.sum().backward()
