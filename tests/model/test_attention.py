"""Who sees whom: masks against their definitions, scores against plain arithmetic, cached keys against a whole pass."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.attention import KVCacheLayer, attend, attend_segments
from litgpt.model.attention_inputs import AttentionInputs, Segment, build_attention_inputs, build_cached_masks
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize

SHAPE: dict[str, Any] = {
    "block_size": 64,
    "n_layer": 4,
    "n_embd": 32,
    "n_head": 4,
    "n_query_groups": 2,
    "padded_vocab_size": 64,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "intermediate_size": 48,
    "parallel_residual": False,
    "bias": False,
    "rotary_percentage": 1.0,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "interleaved": {"rope_interleave": True, "rotary_percentage": 0.5},
    "sliding": {"sliding_window_size": 5},
    "alternating": {"sliding_window_size": 5, "sliding_window_indices": [1, 0, 1, 0]},
    "chunked": {"sliding_window_size": 6, "window_type": "chunked", "rope_layers": [1, 1, 1, 0]},
    "two ropes": {"sliding_window_size": 5, "rope_local_base_freq": 50.0, "rope_indices": [1, 0, 1, 0]},
    "capped": {"attention_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window_size": 7},
    "sinks": {"attention_sinks": True, "sliding_window_indices": [0, 1, 0, 1], "sliding_window_size": 5},
    "learned": {"position_embedding": "learned"},
    "tempered": {"query_temperature": {"floor_scale": 4, "scale": 0.5, "first_position": 1}},
    "yarn": {"rope_adjustments": {"factor": 4.0, "beta_fast": 32, "beta_slow": 1, "original_max_seq_len": 8}},
}


@dataclass
class ListedKeys(KVCacheLayer):
    """The keys and values of one layer, joined token by token."""

    chunks: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.chunks.append((k, v))
        keys, values = zip(*self.chunks, strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


@dataclass
class Listed:
    """The simplest cache that keeps its promise."""

    layers: list[ListedKeys]
    length: int = 0

    def advance(self, tokens: int) -> None:
        self.length += tokens


def small(**values: Any) -> GPT:
    model = GPT(Config(**{**SHAPE, **values}))
    initialize(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def ids(rows: int, tokens: int) -> Tensor:
    return torch.randint(0, 64, (rows, tokens), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tokens_in_pieces_over_a_cache_equal_all_at_once(kind: str) -> None:
    model, text = small(**KINDS[kind]), ids(2, 23)
    cache = Listed([ListedKeys() for _ in model.blocks])
    parts = [model(piece, cache=cache) for piece in text.split([9, 1, 4, 1, 1, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(text), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sliding", "chunked"])
def test_masks_of_keys_that_are_in_place_of_earlier_ones(kind: str) -> None:
    config, starts, kept = Config(**{**SHAPE, **KINDS[kind]}), (3, 20), 14
    settings: dict[str, Any] = {"kinds": ["local"], "tokens": 4, "device": torch.device("cpu")}
    masks = build_cached_masks(config, starts=starts, kept=kept, **settings)["local"]
    assert isinstance(masks, Tensor) and masks.shape == (2, 1, 4, kept)
    for start, mask in zip(starts, masks, strict=True):
        whole = build_cached_masks(config, starts=[start], **settings)["local"]
        assert isinstance(whole, Tensor)
        for expected, row in zip(whole[0, 0].tolist(), mask[0].tolist(), strict=True):
            assert sorted(key % kept for key, allowed in enumerate(expected) if allowed) == [
                key for key, allowed in enumerate(row) if allowed
            ]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_documents_in_one_row_equal_documents_alone(kind: str) -> None:
    model, text = small(**KINDS[kind]), ids(1, 21)
    lengths = [8, 2, 11]
    documents = torch.tensor([[number for number, length in enumerate(lengths) for _ in range(length)]])
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(text, documents_BT=documents, positions_BT=positions)
    alone = torch.cat([model(part) for part in text.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(packed, model(text, positions_BT=positions), atol=1e-3)


@pytest.mark.parametrize("kind", ["sliding", "chunked"])
def test_a_window_lets_through_what_its_definition_says(kind: str) -> None:
    config = Config(**{**SHAPE, **KINDS[kind]})
    seen = build_attention_inputs(config, torch.arange(20)).masks["local"]
    window = config.sliding_window_size
    assert seen is not None and window is not None
    for query in range(20):
        near = query - window + 1 if kind == "sliding" else query // window * window
        assert seen[0, 0, query].nonzero().flatten().tolist() == list(range(max(0, near), query + 1))


IMAGES = [0, -1, 1, 1, 1, 1, -1, 1, 2, 2, 2, -1]
"""The image of each token, -1 for text."""


def find_visible(blocks: list[int], documents: list[int], window: int | None) -> list[list[bool]]:
    """Which key each query attends to, by definition."""
    return [
        [
            documents[query] == documents[key]
            and (key <= query or blocks[query] == blocks[key] >= 0)
            and (window is None or query - key < window)
            for key in range(len(blocks))
        ]
        for query in range(len(blocks))
    ]


def test_tokens_of_an_image_attend_to_each_other() -> None:
    config, tokens = Config(**{**SHAPE, **KINDS["alternating"]}), len(IMAGES)
    windows = {"local": config.sliding_window_size, "global": None}
    blocks, documents = torch.tensor([IMAGES]), [0] * 7 + [1] * 5
    whole = build_attention_inputs(config, torch.arange(tokens), blocks_BT=blocks).masks
    rows = torch.tensor([documents, documents])
    packed = build_attention_inputs(config, torch.arange(tokens), rows, blocks_BT=blocks.expand(2, -1)).masks
    segments = build_attention_inputs(config, torch.arange(tokens), rows[:1], blocks_BT=blocks).segments
    assert segments is not None and [segment.tokens for segment in segments] == [7, 5]
    for kind in whole:
        assert whole[kind][0, 0].tolist() == find_visible(IMAGES, [0] * tokens, windows[kind])
        expected = torch.tensor(find_visible(IMAGES, documents, windows[kind]))
        assert torch.equal(packed[kind], expected.expand(2, 1, -1, -1))
        assert torch.equal(torch.block_diag(*(segment.masks[kind][0, 0] for segment in segments)).bool(), expected)
        numbers = blocks[:, 7:11].expand(2, -1)
        cached = build_cached_masks(config, [kind], [7, 1], 4, blocks.device, blocks_NT=numbers)
        last = torch.tensor(find_visible(IMAGES[:11], [0] * 11, windows[kind]))[7:]
        assert torch.equal(cached[kind][0, 0], last)


def test_no_mask_is_made_where_none_is_needed() -> None:
    config = Config(**{**SHAPE, **KINDS["alternating"]})
    short = build_attention_inputs(config, torch.arange(5))
    assert short.masks == {"global": None, "local": None} and short.causal
    step = build_attention_inputs(config, torch.tensor([4]), cached=4)
    assert step.masks == {"global": None, "local": None} and not step.causal
    later = build_attention_inputs(config, torch.tensor([9]), cached=9)
    assert later.masks["global"] is None and later.masks["local"] is not None


@pytest.mark.parametrize(("softcap", "sunk"), [(None, False), (1.5, False), (None, True), (1.5, True)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_softmax_of_its_scores(softcap: float | None, sunk: bool, masked: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    q = torch.randn(2, 4, 6, 8, generator=draw, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 6, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    sinks = torch.randn(4, generator=draw, dtype=torch.float64) if sunk else None
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    if masked:
        allowed &= torch.ones(6, 6, dtype=torch.bool).triu(-2)
    mask = allowed[None, None] if masked else None
    actual = attend(q, k, v, mask=mask, causal=True, scale=0.3, softcap=softcap, sinks=sinks)
    for head in range(4):
        scores = q[:, head] @ k[:, head // 2].mT * 0.3
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        weights = scores.exp() * allowed
        total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks[head].exp())
        torch.testing.assert_close(actual[:, head], weights / total @ v[:, head // 2], atol=1e-12, rtol=1e-10)


def test_positions_beside_a_cache_that_holds_tokens_are_refused() -> None:
    model = small()
    cache = Listed([ListedKeys() for _ in model.blocks])
    model(ids(1, 4), cache=cache)
    with pytest.raises(UserError, match="positions_BT"):
        model(ids(1, 1), cache=cache, positions_BT=torch.zeros(1, 1, dtype=torch.long))


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_gradients_in_bfloat16_are_those_of_float32_but_for_rounding(heads: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = [(2, count, 70, 16) for count in (heads[0], heads[1], heads[1], heads[0])]
    *inputs, output_grad = (torch.randn(size, generator=generator).bfloat16() for size in sizes)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        y = attend(*leaves, mask=None, causal=True, scale=0.25)
        results.append([y, *torch.autograd.grad(y, leaves, output_grad.to(dtype))])
    for exact, narrow in zip(*results, strict=True):
        assert narrow.dtype == torch.bfloat16
        assert (narrow.float() - exact).norm() < 0.003 * exact.norm()  # 0.005 where the backward pass is narrow too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_documents_in_one_row_are_those_of_documents_alone(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, heads, 70, 16) for heads in (6, 2, 2, 6)]
    *leaves, output_grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    q, k, v = (x.requires_grad_() for x in leaves)
    sizes = [20, 1, 49]
    inputs = AttentionInputs(
        torch.arange(70), None, {}, {}, segments=tuple(Segment(n, {"global": None}) for n in sizes)
    )
    together = attend_segments(inputs, q, k, v, window="global", scale=0.25)
    documents = zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)
    alone = torch.cat([attend(*document, mask=None, causal=True, scale=0.25) for document in documents], dim=2)
    assert together.transpose(1, 2).is_contiguous()  # so that the next layer keeps no copy
    assert torch.equal(together, alone)
    gradients = [torch.autograd.grad(output, (q, k, v), output_grad, retain_graph=True) for output in (together, alone)]
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
