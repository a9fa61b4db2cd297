"""Log-probabilities of given texts, many in one forward pass, each context computed once.

Axes: R rows of logits, V vocabulary.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from litgpt.errors import UserError
from litgpt.infer.block_cache import BlockCache, CacheBlock, Slab, count_common_tokens, round_up_size
from litgpt.infer.engine import MIN_PREFIX
from litgpt.infer.packed_step import Chunk, run_packed
from litgpt.infer.requests import check_tokens
from litgpt.model.gpt import GPT

BATCH_TOKENS = 8192
"""The maximum number of tokens whose keys and values are in memory, unless a single text has more."""
LOGIT_VALUES = 2**27
"""The maximum number of logits of a forward pass: 512 MB in float32."""


@dataclass(frozen=True)
class Continuation:
    """A text of one token or more after a context of one token or more."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass
class Likelihood:
    """How likely a continuation is.

    Attributes:
        logprob: the logarithm of its probability after its context, in nats.
        is_greedy: whether each of its tokens is the most likely one.
    """

    logprob: float = 0.0
    is_greedy: bool = True


@dataclass(eq=False)
class ScoredText:
    """A text whose keys and values are computed in one block, and the tokens that are scored after each of its tokens.

    Attributes:
        ids: the tokens to compute.
        is_block: whether they attend to each other, also to later ones.
        targets: by position in `ids`, (next token, number of its continuation) pairs.
    """

    ids: tuple[int, ...]
    is_block: bool = False
    targets: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))


def compute_likelihoods(
    model: GPT, continuations: Sequence[Continuation], *, max_contexts: int | None = None
) -> Iterator[tuple[int, Likelihood]]:
    """Yield the number and the likelihood of each continuation, in an order that computes common contexts once.

    A context with continuation that is longer than the model's context is cut at its start.

    Args:
        max_contexts: the maximum number of different contexts in a forward pass; None for as many as fit.

    Raises:
        UserError: if a continuation has no token, or is longer than the model's context, or logits are not finite, or
            the model is a reward model.
    """
    if model.config.output == "score":
        raise UserError(f"{model.config.name}: a reward model has no probabilities of texts; use a language model")
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, item in enumerate(continuations):
        check_continuation(model, item)
        whole = (item.context + item.tokens)[-(model.config.block_size + 1) :]
        groups[whole[: len(whole) - len(item.tokens)]].append(number)
    contexts = sorted(groups)  # neighbours have a common prefix
    while contexts:
        batch = take_batch(contexts, groups, continuations, max_contexts or len(contexts))
        del contexts[: len(batch)]
        yield from score_batch(model, {context: groups[context] for context in batch}, continuations)


def check_continuation(model: GPT, item: Continuation) -> None:
    """Check that a model can score a continuation.

    Raises:
        UserError: if it or its context is empty, has an unknown token, or the continuation is too long.
    """
    limit = model.config.block_size
    if not item.context or not 1 <= len(item.tokens) <= limit:
        raise UserError(
            f"continuation: {len(item.tokens)} tokens after {len(item.context)}; needs a context of 1 token or more, "
            f"and 1 to {limit} tokens, the model's context"
        )
    ids = item.context + item.tokens
    check_tokens("continuation", (min(ids), max(ids)), model.config.padded_vocab_size or 0)


def take_batch(
    contexts: Sequence[tuple[int, ...]],
    groups: dict[tuple[int, ...], list[int]],
    continuations: Sequence[Continuation],
    max_contexts: int,
) -> Sequence[tuple[int, ...]]:
    """The first contexts whose texts have at most `BATCH_TOKENS` tokens, one or more."""
    tokens = 0
    for count, context in enumerate(contexts[:max_contexts]):
        tokens += len(context)
        tokens += sum(len(context) + size - 1 for n in groups[context] if (size := len(continuations[n].tokens)) > 1)
        if tokens > BATCH_TOKENS and count:
            return contexts[:count]
    return contexts[:max_contexts]


def build_block_cache(texts: Sequence[Sequence[int]]) -> BlockCache:
    """A cache with memory for these texts and no more."""
    sizes = Counter(round_up_size(len(ids)) for ids in texts)
    cache = BlockCache(sum(size * count for size, count in sizes.items()))
    cache.slabs = [Slab(size, count) for size, count in sizes.items()]
    return cache


@torch.inference_mode()
def score_batch(
    model: GPT, groups: dict[tuple[int, ...], list[int]], continuations: Sequence[Continuation]
) -> Iterator[tuple[int, Likelihood]]:
    """Yield the likelihoods of the continuations of some contexts, in lexical order."""
    has_blocks = model.config.has_prompt_blocks
    firsts = {context: ScoredText(context, has_blocks) for context in groups}
    rests: dict[tuple[tuple[int, ...], tuple[int, ...]], ScoredText] = {}
    likelihoods = {number: Likelihood() for numbers in groups.values() for number in numbers}
    for context, numbers in groups.items():
        for number in numbers:
            tokens = continuations[number].tokens
            firsts[context].targets[len(context) - 1].append((tokens[0], number))
            if len(tokens) > 1:
                # continuations that differ in the last token have the others in common
                text = rests.setdefault((context, tokens[:-1]), ScoredText(context + tokens[:-1]))
                for place, token in enumerate(tokens[1:]):
                    text.targets[len(context) + place].append((token, number))
    common = () if has_blocks else find_common_prefix(list(groups))
    cache = build_block_cache([common, *firsts, *(text.ids for text in rests.values())])
    prefix = allocate(cache, common)
    run_texts(model, cache, [(prefix, ScoredText(common))], likelihoods)
    blocks = {context: allocate(cache, context, prefix) for context in firsts}
    run_texts(model, cache, [(blocks[context], text) for context, text in firsts.items()], likelihoods)
    others = [(allocate(cache, text.ids, blocks[context]), text) for (context, _), text in rests.items()]
    run_texts(model, cache, others, likelihoods)
    yield from likelihoods.items()


def find_common_prefix(contexts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all contexts, in lexical order, begin with; empty if it is not worth a pass of its own."""
    first, last = contexts[0], contexts[-1]
    common = min(count_common_tokens(list(first), list(last)), len(first) - 1)
    return first[:common] if common >= MIN_PREFIX and len(contexts) > 1 else ()


def allocate(cache: BlockCache, ids: tuple[int, ...], source: CacheBlock | None = None) -> CacheBlock:
    """A block for a text, with the keys and values of another one that it begins with."""
    block = cache.allocate(len(ids))
    assert block is not None
    if source is not None and source.ids:
        cache.copy_prefix(source, block, len(source.ids))
    return block


def run_texts(
    model: GPT,
    cache: BlockCache,
    texts: Sequence[tuple[CacheBlock, ScoredText]],
    likelihoods: dict[int, Likelihood],
) -> None:
    """Compute the missing tokens of texts, and add the log-probabilities of their targets.

    Raises:
        UserError: if logits are not finite.
    """
    max_rows = max(1, LOGIT_VALUES // (model.config.padded_vocab_size or 1))
    missing = [(block, text) for block, text in texts if len(text.ids) > len(block.ids)]
    while missing:
        chunks: list[Chunk] = []
        rows, tokens = max_rows, BATCH_TOKENS
        for block, text in missing:
            start = len(block.ids)
            first = next((place for place in range(start, len(text.ids)) if place in text.targets), len(text.ids))
            size = min(len(text.ids) - start, tokens, first - start + rows)
            if text.is_block and not chunks:
                size = len(text.ids)
            if size < (len(text.ids) if text.is_block else 1):
                break
            logits, numbers = max(0, start + size - first), [0] * size if text.is_block else None
            chunks.append(Chunk(block, text.ids[start : start + size], logits, blocks=numbers))
            rows, tokens = rows - logits, tokens - size
        outputs = run_packed(model, chunks, cache.slabs)
        targets: list[tuple[int, int, int]] = []  # row, token, number of the continuation
        row = 0
        for (block, text), chunk in zip(missing, chunks, strict=False):
            for place in range(len(block.ids) - chunk.logits, len(block.ids)):
                targets += [(row, token, number) for token, number in text.targets[place]]
                row += 1
        if targets:
            add_likelihoods(torch.cat(outputs), targets, likelihoods)
        missing = [(block, text) for block, text in missing if len(text.ids) > len(block.ids)]


def add_likelihoods(
    logits_RV: torch.Tensor, targets: Sequence[tuple[int, int, int]], likelihoods: dict[int, Likelihood]
) -> None:
    """Add the log-probabilities of (row, token, number of the continuation) targets to those of the continuations."""
    upcast_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    indices = torch.tensor([target[:2] for target in targets], device=logits_RV.device)
    logprobs = upcast_RV[indices[:, 0], indices[:, 1]] - upcast_RV.logsumexp(-1)[indices[:, 0]]
    if not bool(logprobs.isfinite().all()):
        raise UserError("the model's logits are not finite; use float32, or check the weights")
    greedy = upcast_RV.argmax(-1)[indices[:, 0]] == indices[:, 1]
    for (_, _, number), logprob, is_greedy in zip(targets, logprobs.tolist(), greedy.tolist(), strict=True):
        likelihoods[number].logprob += logprob
        likelihoods[number].is_greedy &= is_greedy
