"""Evaluate a model in training: validation loss and generated samples."""

import itertools
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from litgpt.data.stream.batch import Batch
from litgpt.model.generation import generate_tokens
from litgpt.model.gpt import compute_logits
from litgpt.parallel.apply import reshard_parameters
from litgpt.parallel.reduce import all_reduce_sum
from litgpt.parallel.token_sharding import LocalTokens
from litgpt.train.objective import Objective
from litgpt.train.step import TrainState, evaluate, run_model


@contextmanager
def eval_mode(train_state: TrainState) -> Iterator[None]:
    """No dropout, no gradients, the run's precision."""
    train_state.core.eval()
    try:
        with torch.no_grad(), train_state.precision.autocast(train_state.device, sharded=train_state.sharded):
            yield
    finally:
        reshard_parameters(train_state.core)
        train_state.core.train()


def validation_loss(
    train_state: TrainState, batches: Iterable[Batch], objective: Objective, *, max_iters: int
) -> float:
    """Mean loss in nats over what the objective counts, in the first `max_iters` micro-batches of every data rank.

    NaN if they have no target.
    """
    loss, count = torch.zeros((), dtype=torch.float64), 0.0
    with eval_mode(train_state):
        for batch in itertools.islice(batches, max_iters):
            local = train_state.local_batch(objective.weigh(batch.to(train_state.device)))
            output = evaluate(train_state, local, partial(objective, local=local))
            loss = loss if output is None else loss + output[0].double().to(loss.device)
            count += objective.count(batch)
    summed_loss, counted = all_reduce_sum(
        [loss.item() * train_state.counts_loss, count * train_state.counts_batch], train_state.device
    )
    return summed_loss / counted if counted else float("nan")


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
) -> list[int]:
    """The tokens that the model generates after a prompt, each sampled from the `top_k` most likely ones.

    The run's own random state does not change. All ranks call this together.

    Args:
        window: the number of previous tokens that the model reads.
        stop_tokens: the first of them is the last token of the sample.
    """
    generator = torch.Generator().manual_seed(seed)

    def next_token(ids: list[int]) -> int:
        inputs = torch.tensor([ids[-window:]], device=train_state.device)
        local = train_state.local_batch(Batch(inputs, inputs))
        head = partial(gather_last_logits, tokens=inputs.shape[1], sharding=train_state.local_tokens)
        logits = evaluate(train_state, local, partial(run_model, local=local, head=head))
        token = 0
        if logits is not None:
            values, tokens = logits.float().cpu().topk(min(top_k, logits.shape[-1]))
            token = int(tokens[torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)])
        return token if train_state.pipeline is None else train_state.pipeline.broadcast_from_last(token)

    with eval_mode(train_state):
        return list(generate_tokens(next_token, prompt, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens))


def gather_last_logits(
    hidden_BPD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    *,
    tokens: int,
    sharding: LocalTokens | None,
) -> Tensor:
    """(V,) logits of the token after this many, the same on all ranks that share them."""
    hidden_BTD = hidden_BPD if sharding is None else sharding.gather(hidden_BPD)
    logits = compute_logits(hidden_BTD[0, tokens - 1], weight_VD, bias_V, softcap)
    return logits if sharding is None or sharding.vocabulary is None else sharding.vocabulary.gather_logits(logits)
