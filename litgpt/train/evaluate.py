"""Evaluate a model during training: loss and metrics on the validation data, and generated samples."""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.data.tokenizer import Tokenizer
from litgpt.model.code_tokens import GridConstraint
from litgpt.model.generation import generate_tokens
from litgpt.model.gpt import GPT, compute_logits
from litgpt.model.kv_cache import KeyValueCache
from litgpt.parallel.apply import run_blocks_eagerly
from litgpt.parallel.exchange import forget_forward
from litgpt.parallel.reduce import all_reduce_sum
from litgpt.parallel.token_sharding import LocalTokens
from litgpt.phases import phase
from litgpt.train.console import TASK_PREFIX
from litgpt.train.local_batch import LocalBatch
from litgpt.train.objective import Objective
from litgpt.train.step import run_model
from litgpt.train.train_state import TrainState

TaskScorer = Callable[[GPT, Tokenizer], dict[str, float]]
"""Scores a model on tasks, by `task/metric`."""


@contextmanager
def eval_mode(train_state: TrainState) -> Iterator[None]:
    """Disable dropout and gradients, and use the precision of the run."""
    training = train_state.core.training
    train_state.core.eval()
    try:
        with torch.no_grad(), train_state.autocast():
            yield
    finally:
        forget_forward(train_state.core)
        train_state.core.train(training)


def compute_validation_metrics(
    train_state: TrainState,
    batches: Iterable[Batch],
    objective: Objective,
    *,
    max_iters: int | None,
    size: int | None = None,
) -> dict[str, float]:
    """Compute `val_loss`, NaN if the objective counts nothing, `val_ppl` where it is defined, and other metrics.

    Args:
        batches: this data rank's micro-batches; rank r of R has numbers r, r + R, ... of all micro-batches.
        max_iters: number of micro-batches to evaluate, over all data ranks, from the first one; None for all.
        size: number of `batches`, if known.
    """
    losses, counts = torch.zeros(objective.terms, dtype=torch.float64), [0.0] * objective.terms
    metric_sums = torch.zeros(2, len(objective.metrics), dtype=torch.float64)
    mesh = train_state.mesh
    rank, ranks = (0, 1) if mesh is None else (mesh.rank("data"), mesh.dims.data_ranks)
    rounds = None if max_iters is None else -(-max_iters // ranks)  # all ranks take part in the collectives of each
    expected = min((limit for limit in (rounds, size) if limit is not None), default=None)
    with eval_mode(train_state), phase("validating", expected) as entry:
        for number, batch in enumerate(itertools.islice(batches, rounds)):
            entry.advance()
            if max_iters is not None and number * ranks + rank >= max_iters:
                batch = batch.without_targets()
            counts = [total + count for total, count in zip(counts, objective.count(batch), strict=True)]
            batch = replace(batch, channels=None)  # which are numbered as in another stream
            (prepared,) = objective.prepare(train_state, [train_state.to_device(batch)])
            output = evaluate(train_state, train_state.local_batch(objective.weigh(prepared)), objective.loss)
            if output is not None:
                sums, metrics = output
                losses += sums.double().to(losses.device)
                metric_sums += 0.0 if metrics is None else metrics.to(metric_sums.device)
    local = [value * train_state.counts_loss for value in (*losses.tolist(), *metric_sums.flatten().tolist())]
    local += [count * train_state.counts_batch for count in counts]
    totals = all_reduce_sum(local, train_state.device)
    terms = objective.terms
    return summarize(objective, losses=totals[:terms], counts=totals[-terms:], metric_sums=totals[terms:-terms])


def compute_task_scores(train_state: TrainState, tokenizer: Tokenizer, score_tasks: TaskScorer) -> dict[str, float]:
    """The scores of the model on tasks, by names that begin with `TASK_PREFIX`; generators stay as they are."""
    devices = [train_state.device] if train_state.device.type == "cuda" else []
    with eval_mode(train_state), run_blocks_eagerly(train_state.core), torch.random.fork_rng(devices):
        scores = score_tasks(train_state.core, tokenizer)
    return {f"{TASK_PREFIX}{name}": score for name, score in scores.items()}


def list_validation_metrics(objective: Objective) -> list[str]:
    """List the names of the metrics that an evaluation may have."""
    perplexities = ["val_ppl"] if objective.has_perplexity else []
    return ["val_loss", *perplexities, *(f"val_{name}" for name in (*objective.metrics, *objective.differences))]


def summarize(
    objective: Objective, *, losses: Sequence[float], counts: Sequence[float], metric_sums: Sequence[float]
) -> dict[str, float]:
    """The validation metrics, given the sums and counts of the terms of the loss, and sums and numbers of metrics."""
    means = [loss / count for loss, count in zip(losses, counts, strict=True) if count]
    loss = sum(means) if means else math.nan
    perplexities = {"val_ppl": math.exp(loss) if loss < 700 else math.inf} if objective.has_perplexity else {}
    metrics = objective.compute_metrics(metric_sums)
    return {"val_loss": loss, **perplexities, **{f"val_{name}": value for name, value in metrics.items()}}


def evaluate(
    train_state: TrainState,
    local: LocalBatch,
    run: Callable[[Any, LocalBatch], Any],
    cache: KeyValueCache | None = None,
) -> Any:
    """Apply `run` to the model and a local batch, without gradients; None on ranks without the last stage.

    Args:
        cache: of the stages before the last one, on which `run` is not called.
    """
    pipeline = train_state.pipeline
    if pipeline is None:
        return run(train_state.core, local)
    run_other = partial(run_model, cache=cache)
    return pipeline.evaluate(local.ids.shape, lambda stage: (run if stage.last else run_other)(stage, local))


def build_cache(train_state: TrainState) -> KeyValueCache | None:
    """A key-value cache for samples; None if the tokens of a row are on several ranks, which attend to all of it."""
    tokens = train_state.local_tokens
    if tokens is not None and tokens.attention is not None:
        return None
    return KeyValueCache(train_state.core.config.n_layer)


def sample_continuation(
    train_state: TrainState,
    prompt: list[int],
    *,
    max_new_tokens: int,
    window: int,
    seed: int,
    temperature: float = 0.8,
    top_k: int = 50,
    stop_tokens: Collection[int] = (),
    constraint: GridConstraint | None = None,
    prompt_batch: Batch | None = None,
) -> list[int]:
    """Generate tokens after a prompt, each sampled from the `top_k` most likely ones. All ranks call this together.

    The random state of the run does not change. Each token is computed once, with a key-value cache, up to `window`
    tokens; beyond, and with context parallelism, the model runs over all previous tokens for each one.

    Args:
        window: maximum number of previous tokens in the input of the model.
        stop_tokens: generation stops after the first of these.
        constraint: of the tokens that may follow; None for all.
        prompt_batch: the prompt with its images, whose text may not be longer than `window`; None for one of text.
    """
    generator = torch.Generator().manual_seed(seed)
    kv_cache = build_cache(train_state)

    def next_token(ids: list[int]) -> int:
        cache = kv_cache if len(ids) <= window else None
        cached = cache.length if cache else 0
        prompt_tokens = len(prompt) - max(len(ids) - window, 0)
        batch = build_continued_batch(ids[-window:], cached, prompt_batch, prompt_tokens=prompt_tokens)
        local = train_state.local_batch(train_state.to_device(batch), cached=cached)
        head = partial(gather_last_logits, tokens=batch.ids.shape[1], sharding=train_state.local_tokens)
        logits = evaluate(train_state, local, partial(run_model, head=head, cache=cache), cache)
        if cache:
            cache.truncate(len(ids))  # without the padding of a row, and once for all stages of a pipeline
        token = 0
        if logits is not None:
            logits = logits.float().cpu()
            if constraint is not None:
                logits = logits.masked_fill(~constraint.allowed()[: len(logits)], -math.inf)
            values, tokens = logits.topk(min(top_k, logits.shape[-1]))
            token = int(tokens[torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)])
        token = token if train_state.pipeline is None else train_state.pipeline.broadcast_from_last(token)
        if constraint is not None:
            constraint.accept(token)
        return token

    tokens = []
    with eval_mode(train_state), run_blocks_eagerly(train_state.core), phase("sampling", max_new_tokens) as entry:
        for token in generate_tokens(next_token, prompt, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens):
            tokens.append(token)
            entry.advance()
    return tokens


def build_continued_batch(ids: Sequence[int], cached: int, prompt: Batch | None, *, prompt_tokens: int) -> Batch:
    """The tokens of a text that are not in the cache, (1, T), with the images of its prompt if nothing is.

    Args:
        cached: number of tokens in the cache, none of a prompt or all of it.
        prompt: the beginning of the text, with its images; None without any.
        prompt_tokens: the number of `ids` that are of the prompt; below 1 for none. Those after them are labels.
    """
    ids_1T = torch.tensor([list(ids)[cached:]])
    labels_1T = ids_1T.roll(-1, 1)
    labels_1T[:, : max(prompt_tokens - 1 - cached, 0)] = IGNORE
    labels_1T[:, -1] = IGNORE
    if prompt is None:
        return Batch(ids_1T, labels_1T)
    positions = prompt.positions
    if positions is not None and positions.dim() == 3:  # text goes on after the highest one
        later = positions.max() + 1 + torch.arange(len(ids) - positions.shape[-1])
        positions = torch.cat([positions, later.expand(1, 3, -1)], -1)[..., cached:]
    else:
        positions = None
    return Batch(ids_1T, labels_1T, positions=positions, media=None if cached else prompt.media)


def gather_last_logits(
    hidden_BPD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    *,
    tokens: int,
    sharding: LocalTokens | None,
) -> Tensor:
    """The (V,) logits after the first `tokens` tokens, equal on all ranks of the shards."""
    hidden_BTD = hidden_BPD if sharding is None else sharding.gather(hidden_BPD)
    logits = compute_logits(hidden_BTD[0, tokens - 1], weight_VD, bias_V, softcap)
    return logits if sharding is None or sharding.vocabulary is None else sharding.vocabulary.gather_logits(logits)
