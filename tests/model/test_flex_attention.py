"""Attention by blocks of a mask finds what attention by the whole mask does."""

from itertools import product

import pytest
import torch

from litgpt.model.attention import attend
from litgpt.model.attention_inputs import build_dense_mask
from litgpt.model.config import Config
from litgpt.model.flex_attention import build_block_mask
from tests.store.models import small

WINDOWS = [(None, "sliding"), (40, "sliding"), (40, "chunked")]
CASES = [(*case[:1], *case[1], case[2]) for case in product((False, True), WINDOWS, (range(200), range(50, 170)))]


VISION = {"width": 8, "layers": 1, "heads": 2, "mlp_size": 8, "blocks_run": 1, "patch": 4, "image_token": 1}


def shape(window_type: str, blocks: str) -> Config:
    vision = {**VISION, "prompt_blocks": True} if blocks == "prompts" else None
    return small("Mistral-7B-v0.1", window_type=window_type, sliding_window_size=40, vision=vision)


@pytest.mark.parametrize(
    ("softcap", "sinks", "named"),
    [
        *[(None, False, ""), (3.0, True, ""), (None, False, "images")],
        pytest.param(None, False, "prompts", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("packed", "window", "kind", "queries"), CASES, ids=str)
def test_blocks_see_what_the_mask_shows(
    packed: bool, window: int | None, kind: str, queries: range, sinks: bool, softcap: float | None, named: str
) -> None:
    draw = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, len(queries), 16, generator=draw)
    keys = 200 if named else queries.stop
    k, v = torch.randn(2, 2, 2, keys, 16, generator=draw)
    documents = (torch.arange(200) // torch.tensor([[70], [33]])).int() if packed else None
    places = torch.arange(200) % torch.tensor([[70], [33]]) if packed else torch.arange(200)
    settings = {"scale": 0.3, "softcap": softcap, "sinks": torch.randn(4, generator=draw) if sinks else None}
    config, numbers = shape(kind, named), torch.arange(200) // torch.tensor([[60], [45]])
    parts = {
        "keys": keys,
        "window": window,
        "blocks_BT": torch.where(numbers % 2 == 0, numbers, -1) if named else None,
    }
    mask = build_dense_mask(config, places, documents, queries, **parts)
    blocks = build_block_mask(config, places, documents, queries, **parts)
    expected = attend(q, k, v, mask=mask, causal=False, **settings)
    assert torch.allclose(attend(q, k, v, mask=blocks, causal=False, **settings), expected, atol=1e-6)
