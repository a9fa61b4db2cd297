"""Latent attention against its definition, head by head, and what all attention must keep to."""

from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.adapt import attach
from litgpt.errors import UserError
from litgpt.model.attention import KVCacheLayer
from litgpt.model.attention_inputs import build_attention_inputs
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.model.latent import LatentAttention
from litgpt.recipe.tuner import LoRA

SIZES: dict[str, Any] = {
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
YARN = {
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_seq_len": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
SHAPE: dict[str, Any] = {
    "n_layer": 2, "n_embd": 32, "n_head": 4, "padded_vocab_size": 64, "block_size": 64, "intermediate_size": 48,
    "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "bias": False, "parallel_residual": False,
    "latent_attention": SIZES,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "both-small": {},
    "whole-queries": {"latent_attention": {**SIZES, "q_lora_rank": None}},
    "interleaved": {"rope_interleave": True},
    "biased": {"attn_bias": True, "attn_out_bias": True},
    "yarn": {"rope_adjustments": YARN},
    "own-epsilon": {"latent_attention": {**SIZES, "norm_eps": 0.1}},
    "window": {"sliding_window_size": 5},
}


def drawn(module: Any) -> Any:
    """The module with every parameter random."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return module


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x: Tensor, config: Config, position: int) -> Tensor:
    """One vector rotated: each pair as a complex number, multiplied by one."""
    angles = build_attention_inputs(config, torch.tensor([position])).angles["global"]
    cos, sin = (part.flatten() for part in angles)
    partner = x.view(-1, 2).flip(-1).flatten() if config.rope_interleave else x.roll(len(x) // 2)
    return x * cos + partner * sin


def by_definition(layer: LatentAttention, config: Config, x_TD: Tensor) -> Tensor:
    """DeepSeek-V2, equations 37 to 47, for one row, a token and a head at a time."""
    sizes, eps = config.latent_attention, config.latent_attention["norm_eps"]
    plain, value = sizes["qk_nope_head_dim"], sizes["v_head_dim"]
    if sizes["q_lora_rank"] is None:
        q = layer.q(x_TD)
    else:
        q = layer.q_up(normed(layer.q_down(x_TD), layer.norm_q.weight, eps))
    down = layer.kv_down(x_TD)
    kv = layer.kv_up(normed(down[:, : sizes["kv_lora_rank"]], layer.norm_kv.weight, eps))
    q, kv = q.unflatten(-1, (4, -1)), kv.unflatten(-1, (4, plain + value))
    places = torch.stack([turned(row, config, at) for at, row in enumerate(down[:, sizes["kv_lora_rank"] :])])
    scale = (plain + sizes["qk_rope_head_dim"]) ** -0.5
    if config.rope_adjustments:
        scale *= (0.1 * 0.9 * torch.tensor(4.0).log().item() + 1) ** 2
    rows = []
    for at in range(len(x_TD)):
        first = max(0, at + 1 - (config.sliding_window_size or 64))
        heads = []
        for head in range(4):
            query = torch.cat([q[at, head, :plain], turned(q[at, head, plain:], config, at)])
            keys = torch.cat([kv[first : at + 1, head, :plain], places[first : at + 1]], dim=-1)
            heads.append(((keys @ query) * scale).softmax(0) @ kv[first : at + 1, head, plain:])
        rows.append(torch.cat(heads))
    return layer.out(torch.stack(rows))


@pytest.mark.parametrize("name", SHAPES)
def test_definition(name: str) -> None:
    config = Config(**{**SHAPE, **SHAPES[name]})
    layer = drawn(LatentAttention(config, 0)).double()
    x = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    inputs = build_attention_inputs(config, torch.arange(12))
    actual = layer(x, inputs)
    torch.testing.assert_close(actual[0], by_definition(layer, config, x[0]), atol=1e-6, rtol=1e-6)


def small(**changes: Any) -> GPT:
    model = GPT(Config(**{**SHAPE, **changes}))
    initialize(model, 3)
    return model.eval()


def ids(rows: int = 2, tokens: int = 24) -> Tensor:
    return torch.randint(0, 64, (rows, tokens), generator=torch.Generator().manual_seed(5))


class Layer(KVCacheLayer):
    """Keys and values kept as a cache must."""

    def __init__(self) -> None:
        self.held: list[tuple[Tensor, Tensor]] = []

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.held.append((k, v))
        return torch.cat([k for k, _ in self.held], 2), torch.cat([v for _, v in self.held], 2)


class Kept:
    """A cache of two layers."""

    def __init__(self) -> None:
        self.length, self.layers = 0, [Layer(), Layer()]

    def advance(self, tokens: int) -> None:
        self.length += tokens


@pytest.mark.parametrize("name", SHAPES)
def test_a_cache_changes_nothing(name: str) -> None:
    model, cache = small(**SHAPES[name]), Kept()
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in ids().split([9, 1, 1, 13], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids()), atol=1e-5, rtol=1e-5)


def test_the_cache_has_the_latent_vector_and_the_rotated_key_of_each_token() -> None:
    model, cache, adapted, heads = small(), Kept(), small(), Kept()
    attach(adapted, LoRA(r=2, target_modules=["kv_up"]))
    with torch.no_grad():
        model(ids(), cache=cache)
        adapted(ids(), cache=heads)
    sizes = [[tuple(x.shape[1::2]) for x in layer.held[0]] for layer in (*cache.layers, *heads.layers)]
    assert sizes == [[(1, 16 + 8), (1, 0)]] * 2 + [[(4, 12 + 8), (4, 10)]] * 2


@pytest.mark.parametrize(
    ("tokens", "cached", "absorbed"), [(1, 7, True), (8, 48, True), (30, 48, False), (9, 9, False)]
)
def test_keys_are_expanded_or_absorbed_with_the_same_result(
    tokens: int, cached: int, absorbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = drawn(LatentAttention(Config(**SHAPE), 0)).double()
    generator = torch.Generator().manual_seed(5)
    q, latents = (torch.randn(3, *size, generator=generator).double() for size in ((4, tokens, 20), (1, cached, 24)))
    mask = torch.ones(3, 1, tokens, cached, dtype=torch.bool).tril(cached - tokens)
    mask[1, ..., :5] = tokens == cached  # the texts have masks of their own
    calls = []
    attend_absorbed = layer._attend_absorbed
    monkeypatch.setattr(layer, "_attend_absorbed", lambda *args, **kw: calls.append(1) or attend_absorbed(*args, **kw))
    actual = layer.attend_latents(q, latents, latents[..., :0], mask=mask, causal=False, scale=0.3)
    assert bool(calls) == absorbed
    k, v = layer._expand(latents[:, 0, :, :16], latents[..., 16:])
    expected = ((q @ k.mT) * 0.3).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", SHAPES)
def test_documents_are_separate_sequences(name: str) -> None:
    model = small(**SHAPES[name])
    documents = torch.tensor([[0] * 10 + [1] * 14])
    positions = torch.tensor([[*range(10), *range(14)]])
    together = model(ids(1), documents_BT=documents, positions_BT=positions)
    apart = torch.cat([model(ids(1)[:, :10]), model(ids(1)[:, 10:])], dim=1)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_half_of_the_heads_run_alone() -> None:
    config = Config(**SHAPE)
    layer, part = drawn(LatentAttention(config, 0)), drawn(LatentAttention(Config(**{**SHAPE, "n_head": 2}), 0))
    expected, inputs = None, build_attention_inputs(config, torch.arange(12))
    x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(5))
    for half in range(2):
        for name, parameter in part.named_parameters():
            whole = dict(layer.named_parameters())[name]
            dim = next((d for d in range(whole.dim()) if whole.shape[d] != parameter.shape[d]), None)
            parameter.data = whole if dim is None else whole.chunk(2, dim)[half]
        expected = part(x, inputs) if expected is None else expected + part(x, inputs)
    torch.testing.assert_close(layer(x, inputs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"norm_eps": 0}, "norm_eps: 0 is not an epsilon"),
        ({"norm_eps": "small"}, "norm_eps: 'small' is not an epsilon"),
        ({"v_head_dim": None}, "v_head_dim: None is not a size"),
        ({"rank": 3}, "are not its keys"),
    ],
)
def test_sizes_that_no_model_has_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(**{**SHAPE, "latent_attention": {**SIZES, **sizes}})
