"""Writing on: the same tokens with and without a cache, and as transformers; stop tokens, stop strings, limits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from litgpt.errors import UserError
from litgpt.infer.generate import generate as generate_tokens
from litgpt.infer.generate import truncate_at_stop
from litgpt.infer.kept_engine import KeptEngine
from litgpt.infer.load import open_model
from litgpt.infer.requests import Request
from litgpt.infer.sampling import SampledRow, Sampling, sample_rows
from litgpt.model import kv_cache as cache_module
from litgpt.model.gpt import GPT
from litgpt.model.kv_cache import KeyValueCache
from tests.model.test_attention import KINDS, small

GREEDY = Sampling(temperature=0)
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
EXPERTS = {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 16}
KINDS_HERE = KINDS | {"latent": {"latent_attention": LATENT, "n_query_groups": 4}, "experts": EXPERTS}
PROMPT = [5, 9, 33, 2, 17, 40, 8]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches grow several times in a short text."""
    monkeypatch.setattr(cache_module, "GROWTH_STEP", 4)


def generate(model: GPT, prompt: list[int], *, cache_size: int | None = None, **settings: Any) -> Iterator[int]:
    return generate_tokens(KeptEngine(cache_size), model, Request(tuple(prompt), **settings))


@torch.no_grad()
def without_cache(model: GPT, sampling: Sampling) -> tuple[list[int], list[Tensor]]:
    ids, scores, numbers = list(PROMPT), [], torch.Generator().manual_seed(3)
    for _ in range(14):
        scores.append(model(torch.tensor([ids]))[:, -1])
        ids.append(int(sample_rows(scores[-1], [SampledRow(sampling, PROMPT, [], numbers)])))
    return ids[len(PROMPT) :], scores


@pytest.mark.parametrize("kind", KINDS_HERE)
@torch.no_grad()
def test_cached_generation_equals_uncached(kind: str) -> None:
    model = small(**KINDS_HERE[kind])
    for sampling in (GREEDY, Sampling(temperature=5.0)):
        expected, scores = without_cache(model, sampling)
        for size in (None, 20) if sampling is GREEDY else (None,):
            tokens = generate(model, PROMPT, max_new_tokens=14, sampling=sampling, seed=3, cache_size=size)
            assert list(tokens) == expected
    assert len(set(expected)) > 6  # a varied text, as the last is
    cache, read = KeyValueCache(4), torch.tensor([PROMPT])
    for token, logits in zip(expected, scores, strict=True):
        torch.testing.assert_close(model(read, cache=cache)[:, -1], logits, atol=1e-5, rtol=1e-5)
        read = torch.tensor([[token]])
    assert cache.length == 20 and cache.layers[0].keys.buffer is not None
    assert cache.layers[0].keys.buffer.shape[2] == 20


SIZES = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 80}
IDS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
REFERENCES: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2},
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 6},
    "Gemma2": {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 6, "attn_logit_softcapping": 5.0},
    "Gemma3Text": {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 6},
    "GPT2": {"n_embd": 48, "n_layer": 2, "n_head": 3},
    "GptOss": {
        **{"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 6, "intermediate_size": 32},
        **{"num_local_experts": 4, "num_experts_per_tok": 2},
    },
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_greedy_text_equals_transformers(kind: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{kind}Config")(
        **{
            **(SIZES if kind != "GPT2" else {"vocab_size": 96}),
            **IDS,
            "max_position_embeddings": 64,
            **REFERENCES[kind],
        }
    )
    config._attn_implementation = "eager"
    name = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    reference = getattr(transformers, name)(config).eval()
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=numbers) * 0.1)
    reference.save_pretrained(tmp_path)
    model = open_model(tmp_path, device=torch.device("cpu"))
    expected = reference.generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False)[0, len(PROMPT) :].tolist()
    assert list(generate(model, PROMPT, max_new_tokens=30, sampling=GREEDY)) == expected


def test_a_seed_gives_the_same_tokens_again() -> None:
    model, sampling = small(), Sampling(temperature=1.5, top_k=40, top_p=0.95)

    def write(seed: int) -> list[int]:
        return list(generate(model, PROMPT, max_new_tokens=20, sampling=sampling, seed=seed))

    assert write(7) == write(7) != write(8)


def test_a_stop_token_ends_the_text_and_is_not_yielded() -> None:
    model = small()
    whole = list(generate(model, PROMPT, max_new_tokens=20, sampling=GREEDY))
    stop = whole[6]
    place = whole.index(stop)
    tokens = list(generate(model, PROMPT, max_new_tokens=20, sampling=GREEDY, stop_tokens=[95, stop]))
    assert tokens == whole[:place]


def test_gradients_are_off_only_inside() -> None:
    tokens = generate(small(), PROMPT, max_new_tokens=3, sampling=GREEDY)
    next(tokens)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("prompt", "tokens", "size", "message"),
    [
        ([], 5, None, "prompt: has no tokens"),
        ([*range(60), 1, 2, 3, 4], 1, None, "prompt: 64 tokens exceed the model's context of 64"),
        ([0, 9999], 1, None, "prompt: has token 9999, but the model has"),
        (PROMPT, 58, None, "max_new_tokens: 58 after a prompt of 7 .* set 1 to 57"),
        (PROMPT, 0, None, "max_new_tokens: 0"),
        (PROMPT, 10, 12, "fixed_kv_cache_size: 12 is less than 16 tokens"),
    ],
)
def test_texts_that_exceed_the_context_are_refused(
    prompt: list[int], tokens: int, size: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        list(generate(small(), prompt, max_new_tokens=tokens, sampling=GREEDY, cache_size=size))


def test_text_may_fill_the_context() -> None:
    assert len(list(generate(small(), PROMPT, max_new_tokens=57, sampling=GREEDY))) == 57


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_one_line(value: float) -> None:
    model = small()
    with torch.no_grad():
        model.norm.weight[0] = value
    with pytest.raises(UserError, match="precision: 32-true"):
        list(generate(model, PROMPT, max_new_tokens=3, sampling=GREEDY))


LETTERS = st.text("ab\u2581", max_size=30)


@settings(max_examples=300, deadline=None)
@given(LETTERS, st.lists(st.text("ab\u2581", min_size=1, max_size=4), max_size=3), st.data())
def test_no_part_of_a_stop_string_is_yielded(text: str, stops: list[str], data: st.DataObject) -> None:
    """However the text is cut in pieces, what is shown is what comes before the first stop string to be complete."""
    pieces, rest = [], text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(rest[:size])
        rest = rest[size:]
    read = 0

    def counted() -> Iterator[str]:
        nonlocal read
        for piece in pieces:
            read += 1
            yield piece

    shown = list(truncate_at_stop(counted(), stops))
    assert "" not in shown
    assert not any(stop in "".join(shown) for stop in stops)
    ends = [text.find(stop) for stop in stops if stop in text]
    if not ends:
        assert "".join(shown) == text and read == len(pieces)
    else:
        assert text.startswith("".join(shown)) and len("".join(shown)) >= min(ends)
        after = text[len("".join(shown)) :]
        assert any(after.startswith(stop) for stop in stops)


def test_text_is_yielded_once_it_cannot_be_a_stop_string() -> None:
    pieces = truncate_at_stop(iter(["a <", "en", "d", "less> b <end", "> c"]), ["<end>"])
    assert list(pieces) == ["a ", "<endless> b "]
    assert next(truncate_at_stop(iter(["a b", "never read"]), [])) == "a b"
