"""The engine: prefixes are computed once, texts join, leave and are preempted, memory is bounded, errors say what."""

import copy
import random
from collections.abc import Sequence

import pytest
import torch

from litgpt.errors import UserError
from litgpt.infer import engine as engine_module
from litgpt.infer.block_cache import BlockCache, count_common_tokens, round_up_size
from litgpt.infer.engine import Engine
from litgpt.infer.requests import Request
from litgpt.infer.sampling import Sampling
from tests.model.test_attention import KINDS, small

PROMPT = tuple(range(5, 45))
GREEDY = Sampling(temperature=0)


def list_ids(sequences: Sequence[engine_module.Sequence]) -> list[list[int]]:
    return [[token.token for token in sequence.tokens] for sequence in sequences]


def test_a_common_prefix_is_computed_once(processed: list[int]) -> None:
    engine = Engine(small())
    engine.run([Request((*PROMPT, number), 1, GREEDY) for number in range(4)])
    assert sum(processed) == 41 + 3  # the first prompt, and the last token of the others
    engine.run([Request((*PROMPT, 1, 2, 3), 1, GREEDY)])
    assert processed[-1] == 2  # `*PROMPT, 1` is known


WINDOWS = ("sliding", "alternating", "chunked", "sinks")


@pytest.mark.parametrize("kind", WINDOWS)
def test_layers_with_a_window_keep_the_last_tokens_only(kind: str) -> None:
    model, requests = small(**KINDS[kind]).double(), [Request(PROMPT[number:], 24, GREEDY) for number in (0, 3, 30)]
    expected = list_ids(Engine(model).run(requests))  # which keeps 512 tokens more than the window
    engine = Engine(model, prefill_chunk=8)
    assert list_ids(engine.run(requests)) == expected
    kept = (KINDS[kind]["sliding_window_size"] or 0) + 8
    sizes = {
        (model.config.is_local(layer), slab.size, keys.shape[2])
        for slab in engine.cache.slabs
        for layer, (keys, _) in slab.layers.items()
    }
    assert sizes == {(is_local, 64, kept if is_local else 64) for is_local, _, _ in sizes} and (True, 64, kept) in sizes


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_prefix_is_shared_as_long_as_its_window_is_in_memory(kind: str, processed: list[int]) -> None:
    model = small(**KINDS[kind]).double()
    window, others = model.config.sliding_window_size or 0, (50, 51, 52)
    end, middle = ((*PROMPT[:length], *others) for length in (36, 20))
    expected = list_ids(Engine(model).run([Request(ids, 12, GREEDY) for ids in (PROMPT, end, middle)]))
    engine = Engine(model, prefill_chunk=16)  # layers with a window keep `window + 16` tokens
    texts = [engine.run([Request(PROMPT, 12, GREEDY)])]
    del processed[:]
    texts += [engine.run([Request(end, 12, GREEDY)])]
    assert processed[0] == len(others)  # the window before token 36 is among the last of 51 tokens
    del processed[:]
    texts += [engine.run([Request(middle, 12, GREEDY)])]
    assert sum(processed) == len(middle) + 11 and window < 20  # that before token 20 is not
    assert [list_ids(text)[0] for text in texts] == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_with_drafts_shared_prefixes_and_little_memory(kind: str) -> None:
    model, numbers = small(**KINDS[kind]).double(), random.Random(kind)
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3)))
    for _ in range(3):
        starts = [PROMPT[: numbers.randint(1, 40)] for _ in range(8)]
        prompts = [(*start, *numbers.choices(range(50, 60), k=numbers.randint(1, 8))) for start in starts]
        requests = [Request(prompt, numbers.randint(1, 16), GREEDY) for prompt in prompts]
        expected = [list_ids(Engine(model).run([request]))[0] for request in requests]
        settings = {
            "prefill_chunk": numbers.choice((1, 3, 5, 16)),
            "cache_tokens": numbers.choice((64, 160, 1024)),
            "max_sequences": numbers.choice((2, 8)),
        }
        engine = Engine(model, draft=draft, speculative_k=numbers.randint(1, 6), **settings)
        assert list_ids(engine.run(requests)) == expected
        assert list_ids(engine.run(requests[::-1])) == expected[::-1]
        assert list_ids(Engine(model, **settings).run(requests)) == expected


def test_prompts_are_processed_in_chunks_beside_the_texts_of_others(processed: list[int]) -> None:
    engine = Engine(small(), prefill_chunk=16)
    first = engine.submit(Request(PROMPT[:4], 12, GREEDY))
    engine.step()
    engine.submit(Request(PROMPT[::-1], 4, GREEDY))
    for _ in range(3):
        engine.step()
    assert processed == [4, 1 + 16, 1 + 16, 1 + 8]
    assert len(first.tokens) == 4


def test_a_seed_gives_the_same_text_whatever_else_is_generated() -> None:
    model, sampling = small(), Sampling(temperature=1.5, top_k=40, top_p=0.95)
    alone = Engine(model).run([Request(PROMPT, 12, sampling, seed=7)])
    others = [Request(PROMPT[number:], 10, sampling, seed=number) for number in range(1, 5)]
    *_, together = Engine(model).run([*others, Request(PROMPT, 12, sampling, seed=7)])
    assert list_ids([together]) == list_ids(alone)
    assert list_ids(Engine(model).run([Request(PROMPT, 12, sampling, seed=8)])) != list_ids(alone)


def test_why_a_text_ended() -> None:
    model = small()
    [whole] = Engine(model).run([Request(PROMPT, 12, GREEDY)])
    assert whole.finish_reason == whole.tokens[-1].finish_reason == "length" and len(whole.tokens) == 12
    stop = whole.tokens[4].token
    [stopped] = Engine(model).run([Request(PROMPT, 12, GREEDY, stop_tokens=frozenset([stop]))])
    assert stopped.finish_reason == stopped.tokens[-1].finish_reason == "stop"
    assert stopped.tokens[-1].token == stop and len(stopped.tokens) == list_ids([whole])[0].index(stop) + 1


def test_a_cancelled_text_leaves_and_another_joins() -> None:
    engine = Engine(small(), max_sequences=2)
    first, second, third = (engine.submit(Request(PROMPT[number:], 12, GREEDY)) for number in range(3))
    engine.step()
    assert (engine.running, engine.waiting) == (2, 1) and not third.tokens
    engine.cancel(first)
    assert first.finish_reason == "cancelled" and engine.running == 1
    while engine.has_work:
        engine.step()
    assert len(third.tokens) == len(second.tokens) == 12 and len(first.tokens) < 12
    waiting = [engine.submit(Request(PROMPT, 12, GREEDY)) for _ in range(3)]
    for sequence in waiting:
        engine.cancel(sequence)
        engine.cancel(sequence)  # nothing more
    assert not engine.has_work and engine.step() == []


def test_texts_are_preempted_when_memory_ends_and_nothing_changes() -> None:
    model, requests = small(), [Request(PROMPT[number:], 20, GREEDY) for number in range(6)]
    expected = list_ids(Engine(model).run(requests))
    engine = Engine(model, cache_tokens=160)
    sequences = engine.run(requests)
    assert list_ids(sequences) == expected
    assert engine.cache.allocated_tokens <= 160
    assert len(engine.cache.blocks) == len(engine.cache.kept)  # no block is lost
    growing = [Request(PROMPT[:2], 60, GREEDY), Request(PROMPT[2:4], 60, GREEDY)]
    expected = list_ids(Engine(model).run(growing))
    engine = Engine(model, cache_tokens=64 + 64)
    sequences = [engine.submit(request) for request in growing]
    while engine.has_work:
        engine.step()
    assert list_ids(sequences) == expected


def test_the_iterator_of_one_text_cancels_it_when_closed() -> None:
    engine = Engine(small())
    tokens = engine.stream(Request(PROMPT, 12, GREEDY))
    next(tokens)
    assert engine.running == 1
    tokens.close()
    assert not engine.has_work


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 3), "prompt: has no tokens"),
        (Request((5, 10**6), 3), "prompt: has token 1000000"),
        (Request(PROMPT, 25), "max_new_tokens: 25 after a prompt of 40 tokens exceeds the model's context of 64"),
        (Request(PROMPT, 12), "cache_tokens: 50 is less than 51"),
        (Request(PROMPT, 3, Sampling(logit_bias={3: 1.0, -1: 2.0})), "logit_bias: has token -1"),
    ],
)
def test_requests_that_never_fit_are_one_line(request_: Request, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Engine(small(), cache_tokens=50).submit(request_)


def test_sizes_and_memory_of_blocks() -> None:
    assert [round_up_size(tokens) for tokens in (1, 64, 65, 97, 129, 1000)] == [64, 64, 96, 128, 192, 1024]
    assert count_common_tokens([1, 2, 3], [1, 2, 4, 5]) == 2 and count_common_tokens([], [1]) == 0
    assert count_common_tokens([7] * 100, [7] * 100) == 100
    cache = BlockCache(256)
    blocks = [cache.allocate(60) for _ in range(4)]
    assert cache.allocate(1) is None and cache.allocated_tokens == 256
    first, *others = (block for block in blocks if block is not None)
    for block in others:
        cache.keep(block)
    assert cache.allocate(65) is None  # beside the first, a slab of 64
    cache.free(first)
    assert cache.allocate(250) is not None and cache.allocated_tokens == 256


def test_keys_and_values_of_a_block_are_zero_at_first() -> None:
    cache = BlockCache(64)
    block = cache.allocate(64)
    assert block is not None
    keys, values = block.slab.get_layer(0, torch.full((1, 2, 1, 4), torch.nan), torch.full((1, 2, 1, 3), torch.nan))
    assert keys.shape == (1, 2, 64, 4) and values.shape == (1, 2, 64, 3) and not keys.any() and not values.any()
