"""Streams: every sample once an epoch, the same for any ranks and workers, exact continuation, document numbers."""

import itertools
import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.data.stream.batches import TrainStream, ValStream
from litgpt.data.stream.sampler import FeistelPermutation
from litgpt.data.stream.windows import BlendedWindows, Windows
from litgpt.errors import UserError
from litgpt.recipe.data import BatchShape


class Numbers:
    """Tokens 0, 1, 2, ... with documents that begin at given places."""

    def __init__(self, total: int, starts: tuple[int, ...] = (0,)) -> None:
        self.total, self.fingerprint = total, f"numbers-{total}"
        self.starts = np.array(starts)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self.total
        return np.arange(start, stop)

    def find_document_starts(self, start: int, stop: int) -> np.ndarray:
        return self.starts[(self.starts >= start) & (self.starts < stop)]


def windows(samples: int, length: int = 3, seed: int = 42, tail: int = 0) -> Windows:
    return Windows(Numbers(samples * length + 1 + tail), length, seed)


def samples_of(batches: list[Batch], length: int = 3) -> list[int]:
    return [int(row[0]) // length for batch in batches for row in batch.ids]


def take(stream: TrainStream, count: int) -> list[Batch]:
    return list(itertools.islice(stream, count))


def test_windows_without_a_seed_are_in_the_order_of_the_text() -> None:
    stream = TrainStream(Windows(Numbers(31), 3, None), BatchShape(2, 2, 3))
    assert samples_of(take(stream, 10)) == [*range(10), *range(10)]


@settings(max_examples=300, deadline=None)
@given(count=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**6))
def test_permutation_is_one(count: int, seed: int, epoch: int) -> None:
    assert sorted(map(FeistelPermutation(count, seed, epoch), range(count))) == list(range(count))


def test_permutation_mixes() -> None:
    """Neighbours end up anywhere: rank correlation with the index, and between epochs, as of random orders."""
    count = 20_000
    orders = np.array(
        [list(map(FeistelPermutation(count, seed, epoch), range(count))) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    )
    correlations = np.abs(np.corrcoef(np.vstack([orders, np.arange(count)])) - np.eye(4))
    assert correlations.max() < 5 / count**0.5
    # the share of each tenth of the data in each tenth of the epoch is near a hundredth
    table = np.histogram2d(np.arange(count), orders[0], bins=10)[0] / count
    assert np.abs(table - 0.01).max() < 0.0025


@settings(max_examples=200, deadline=None)
@given(
    samples=st.integers(1, 60),
    ranks=st.integers(1, 4),
    micro=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    tail=st.integers(0, 2),
)
def test_every_sample_once_an_epoch(samples: int, ranks: int, micro: int, accumulation: int, tail: int) -> None:
    size = micro * ranks * accumulation
    steps = -(-3 * samples // size)
    read = []
    streams = [
        iter(TrainStream(windows(samples, tail=tail), BatchShape(micro, size, 3, rank, ranks))) for rank in range(ranks)
    ]
    for _ in range(steps * accumulation):
        for stream in streams:
            read += samples_of([next(stream)])
    alone = TrainStream(windows(samples, tail=tail), BatchShape(1, size, 3))
    order = samples_of(take(alone, len(read)))
    for start in range(0, len(read), size):  # the same global batches as one process with micro batches of one
        assert sorted(read[start : start + size]) == sorted(order[start : start + size])
    for epoch in range(3):
        assert sorted(order[epoch * samples : (epoch + 1) * samples]) == list(range(samples))
    assert alone.epoch == alone.position / samples == len(read) / samples


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_workers(workers: int) -> None:
    shape = BatchShape(2, 4, 3, 1, 2)
    rows = Windows(Numbers(100, (0, 10, 11, 50)), 3, 1, document_mask=True)
    plain, parallel = TrainStream(rows, shape), TrainStream(rows, shape, workers=workers)
    before = torch.get_rng_state()
    for one, other in zip(take(plain, 40), take(parallel, 40), strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.labels, other.labels)
        assert one.documents is not None and other.documents is not None and torch.equal(one.documents, other.documents)
    assert plain.state_dict() == parallel.state_dict()  # consumed batches, not those read ahead
    assert torch.equal(before, torch.get_rng_state())  # dropout must not depend on how the data is read
    parallel.close()


@settings(max_examples=100, deadline=None)
@given(
    samples=st.integers(1, 50),
    stop=st.integers(0, 60),
    cuts=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2])),
)
def test_continues_exactly_under_other_ranks(samples: int, stop: int, cuts: tuple[int, int]) -> None:
    whole = take(TrainStream(windows(samples), BatchShape(4, 8, 3)), 2 * (stop + 20))
    first = TrainStream(windows(samples), BatchShape(4, 8, 3))
    read = samples_of(take(first, 2 * stop))
    state = json.loads(json.dumps(first.state_dict()))
    ranks, micro = cuts
    streams = [TrainStream(windows(samples), BatchShape(micro, 8, 3, rank, ranks)) for rank in range(ranks)]
    for stream in streams:
        stream.load_state_dict(state)
    iterators = [iter(stream) for stream in streams]
    for _ in range(20 * 8 // (ranks * micro)):
        for iterator in iterators:
            read += samples_of([next(iterator)])
    assert read == samples_of(whole)


def test_resumed_with_workers_midway() -> None:
    shape = BatchShape(2, 2, 3)
    whole = samples_of(take(TrainStream(windows(17), shape), 30))
    first = TrainStream(windows(17), shape, workers=2)
    read = samples_of(take(first, 11))
    first.close()
    second = TrainStream(windows(17), shape, workers=1)
    second.load_state_dict(first.state_dict())
    read += samples_of(take(second, 19))
    second.close()
    assert read == whole


def test_closing_is_silent_while_a_traceback_refers_to_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C leaves through `next`, whose frames the traceback keeps until the process exits."""
    reported: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", reported.append)
    others = set(multiprocessing.active_children())
    stream = TrainStream(windows(17), BatchShape(2, 2, 3), workers=1)
    take(stream, 2)
    assert set(multiprocessing.active_children()) - others
    referred = stream.prefetched
    stream.close()
    assert not set(multiprocessing.active_children()) - others
    del referred
    assert not reported


def test_far_position_is_quick_and_state_small() -> None:
    rows = Windows(Numbers(2048 * 5_000_000_000 + 1), 2048, 42)
    stream = TrainStream(rows, BatchShape(4, 4, 2048))
    start = time.perf_counter()
    stream.load_state_dict({"position": 10**9, "fingerprint": rows.fingerprint})
    next(iter(stream))
    assert time.perf_counter() - start < 0.5  # 1 ms alone on a core
    assert len(json.dumps(stream.state_dict())) <= 100


@pytest.mark.parametrize("other", [windows(11), windows(10, seed=1), Windows(Numbers(31), 2, 42)])
def test_other_data_is_refused(other: Windows) -> None:
    state = TrainStream(windows(10), BatchShape(1, 1, 3)).state_dict()
    with pytest.raises(UserError, match="another data set"):
        TrainStream(other, BatchShape(1, 1, 3)).load_state_dict(state)
    for broken in ({}, {"position": -1}, {"position": "3"}, {"position": True}):
        with pytest.raises(UserError, match="not the state of a data stream"):
            TrainStream(other, BatchShape(1, 1, 3)).load_state_dict(broken)


def test_every_token_is_a_label_once() -> None:
    rows = windows(9, length=7, tail=4)
    labels = torch.cat([batch.labels.flatten() for batch in take(TrainStream(rows, BatchShape(1, 1, 7)), 9)])
    assert sorted(labels.tolist()) == list(range(1, 9 * 7 + 1))
    assert rows.tail == 4


def test_text_shorter_than_a_window() -> None:
    with pytest.raises(UserError, match=r"train\.max_seq_length: 8 needs 9 tokens.* only 8; .* to 7 or less"):
        Windows(Numbers(8), 8, 1)
    assert Windows(Numbers(8), 7, 1).count == 1


@settings(max_examples=100, deadline=None)
@given(starts=st.sets(st.integers(1, 99), max_size=30), length=st.integers(1, 20))
def test_document_numbers(starts: set[int], length: int) -> None:
    places = (0, *sorted(starts))
    rows = Windows(Numbers(100, places), length, 3, document_mask=True)
    of_token = np.cumsum([place in places for place in range(100)])
    for batch in take(TrainStream(rows, BatchShape(2, 2, length)), rows.count):
        assert batch.documents is not None and batch.documents.dtype == torch.int32
        for ids, numbers in zip(batch.ids.numpy(), batch.documents.numpy(), strict=True):
            assert numbers[0] == 0
            assert np.array_equal(numbers, of_token[ids] - of_token[ids[0]])


@settings(max_examples=150, deadline=None)
@given(samples=st.integers(1, 40), ranks=st.integers(1, 5), micro=st.integers(1, 6))
def test_validation_is_equally_long_on_all_ranks(samples: int, ranks: int, micro: int) -> None:
    passes = []
    for rank in range(ranks):
        stream = ValStream(windows(samples), BatchShape(micro, micro * ranks, 3, rank, ranks))
        passes.append(list(stream))
        assert len(passes[-1]) == len(stream)
        again = list(stream)  # a second pass is the same
        assert all(torch.equal(one.labels, two.labels) for one, two in zip(passes[-1], again, strict=True))
    assert len({len(batches) for batches in passes}) == 1
    labels = torch.cat([batch.labels.flatten() for batches in passes for batch in batches])
    assert sorted(labels[labels != IGNORE].tolist()) == list(range(1, samples * 3 + 1))
    assert all(batch.ids.shape == (micro, 3) for batches in passes for batch in batches)
    assert sum(batch.targets for batches in passes for batch in batches) == samples * 3


def test_mix_keeps_its_share_and_every_sample() -> None:
    first, second = windows(70), Windows(Numbers(3 * 30 + 1), 3, 7)
    mix = BlendedWindows(first, second, 0.693584)
    drawn = [mix.locate(index) for index in range(10_000)]
    for count in (1, 10, 333, 10_000):
        taken = sum(rows is first for rows, _ in drawn[:count])
        assert abs(taken - 0.693584 * count) < 1
    for rows in (first, second):  # each source in its own order, none left out
        assert [place for source, place in drawn if source is rows] == list(range(sum(s is rows for s, _ in drawn)))
    source, place = mix.locate(10**15)
    assert source.read_window(place)[0].shape == (4,)


def test_shape_is_checked() -> None:
    with pytest.raises(UserError, match=r"global_batch_size: 6 .* 4 x 1 .*; use 4"):
        BatchShape(4, 6, 8)
    with pytest.raises(UserError, match="micro_batch_size: 0"):
        BatchShape(0, 6, 8)


def test_workers_outlive_signals_to_the_group_and_end_with_the_parent() -> None:
    """Signals to the whole group do not end the batches; leaving without close() does not hang."""
    import os
    import subprocess
    import sys

    program = """
import os, signal, itertools
from tests.data.stream.test_batches import windows
from litgpt.data.stream.batches import TrainStream
from litgpt.recipe.data import BatchShape
seen = []
batches = iter(TrainStream(windows(50), BatchShape(1, 1, 3), workers=2))
next(batches)
for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):  # workers have no handlers of the parent
    signal.signal(name, lambda number, frame: seen.append(number))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
    os.killpg(0, number)
    list(itertools.islice(batches, 60))
assert len(seen) == 4, seen
print("done", flush=True)
"""
    root = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        timeout=100,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
