"""What a loss is a mean over: tokens, micro-batches or samples, however the global batch is cut."""

import pytest
import torch
from torch import Tensor

from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.train import LossArgs
from litgpt.train.objective import Objective, next_token
from litgpt.train.step import compute_gradients
from litgpt.train.train_state import TrainState

LENGTHS = (6, 1, 4, 3)


def model() -> GPT:
    shape = Config(n_layer=1, n_embd=16, n_head=2, padded_vocab_size=32, block_size=8)
    made = GPT(shape).double()
    initialize(made, 0)
    return made


def samples() -> list[tuple[Tensor, Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(4)
    found = []
    for number, length in enumerate(LENGTHS):
        text = torch.randint(0, 32, (length + 2,), generator=draw)
        labels = text[1:].clone()
        labels[: number % 2] = IGNORE
        found.append((text[:-1], labels, torch.rand(length + 1, generator=draw)))
    return found


def alone(weighted: bool) -> list[Batch]:
    return [
        Batch(ids[None], labels[None], weights=weights[None] if weighted else None)
        for ids, labels, weights in samples()
    ]


def in_one_row(weighted: bool) -> list[Batch]:
    ids, labels, weights = (torch.cat(parts)[None] for parts in zip(*samples(), strict=True))
    sizes = [length + 1 for length in LENGTHS]
    documents = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(torch.tensor(sizes))[None]
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    return [Batch(ids, labels, documents, positions, weights if weighted else None)]


def gradient(batches: list[Batch], objective: Objective) -> tuple[Tensor, float]:
    train_state = TrainState(model(), [], torch.device("cpu"), PRECISIONS["64-true"])
    loss, _ = compute_gradients(train_state, batches, objective, counts=objective.count_batches(batches))
    return torch.cat([parameter.grad.flatten() for parameter in train_state.parameters()]), loss


def expected(normalize: str, weighted: bool) -> float:
    """The mean as its definition says, sample by sample."""
    means, sums, targets = [], [], []
    for batch in alone(weighted):
        scores = model()(batch.ids)[0]
        losses = torch.nn.functional.cross_entropy(scores, batch.labels[0], ignore_index=IGNORE, reduction="none")
        losses = losses if batch.weights is None else losses * batch.weights[0]
        sums.append(losses.sum().item())
        targets.append(batch.targets)
        means.append(sums[-1] / targets[-1])
    return sum(sums) / sum(targets) if normalize == "token" else sum(means) / len(means)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("normalize", ["token", "sample"])
def test_a_mean_over_tokens_or_samples_does_not_depend_on_the_cut(normalize: str, weighted: bool) -> None:
    objective = next_token(LossArgs(normalize=normalize, chunk_rows=3))
    apart, apart_loss = gradient(alone(weighted), objective)
    packed, packed_loss = gradient(in_one_row(weighted), objective)
    torch.testing.assert_close(packed, apart, rtol=1e-6, atol=1e-9)
    assert packed_loss == pytest.approx(apart_loss, rel=1e-6)
    assert apart_loss == pytest.approx(expected(normalize, weighted), rel=1e-6)


def test_a_mean_over_micro_batches_weighs_them_alike() -> None:
    objective = next_token(LossArgs(normalize="microbatch"))
    _, apart = gradient(alone(False), objective)
    assert apart == pytest.approx(expected("sample", False), rel=1e-6)  # one sample in each
    _, packed = gradient(in_one_row(False), objective)
    assert packed == pytest.approx(expected("token", False), rel=1e-6)  # all in one


def test_samples_without_targets_are_not_counted() -> None:
    objective = next_token(LossArgs(normalize="sample"))
    batch = in_one_row(False)[0]
    batch.labels[batch.documents == 2] = IGNORE
    assert objective.count(batch) == (3,)


@pytest.mark.parametrize("impl", ["chunked", "plain"])
@pytest.mark.parametrize("normalize", ["token", "sample"])
def test_losses_are_told_by_channel_without_factors(impl: str, normalize: str) -> None:
    chunks = {"chunk_rows": 3} if impl == "chunked" else {}
    objective = next_token(LossArgs(normalize=normalize, impl=impl, **chunks), channels=["a", "b", "c"])
    batch = in_one_row(True)[0]
    assert batch.documents is not None
    batch.channels = batch.documents % 2
    by_channel = torch.zeros(2, 3, dtype=torch.float64)
    train_state = TrainState(model(), [], torch.device("cpu"), PRECISIONS["64-true"])
    compute_gradients(train_state, [batch, batch], objective, counts=[1], metric_sums=by_channel)
    scores = model()(batch.ids, positions_BT=batch.positions, documents_BT=batch.documents)[0]
    losses = torch.nn.functional.cross_entropy(scores, batch.labels[0], ignore_index=IGNORE, reduction="none")
    for channel in range(2):
        mine = batch.channels[0] == channel
        assert by_channel[0, channel].item() == pytest.approx(2 * losses[mine].sum().item(), rel=1e-5)
        assert by_channel[1, channel] == 2 * (batch.labels[0][mine] != IGNORE).sum()
    assert not by_channel[:, 2].any()
