"""Packing: every sample in one row, no row too long, the same rows every time, nearly as few as can be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt.data.stream.packing import pack_samples


def slow_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing as it is defined: the longest first, each into the fullest row with room."""
    rows: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        used = [sum(lengths[other] for other in row) for row in rows]
        with_room = [place for place, size in enumerate(used) if size + lengths[sample] <= capacity]
        if with_room:
            rows[max(with_room, key=lambda place: used[place])].append(sample)
        else:
            rows.append([sample])
    return rows


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=60), capacity=st.integers(1, 50))
@pytest.mark.parametrize("strategy", ["best_fit", "sequential"])
def test_every_sample_in_one_row(strategy: str, lengths: list[int], capacity: int) -> None:
    rows = pack_samples(lengths, capacity, strategy)
    assert sorted(np.concatenate([*rows, np.zeros(0, int)]).tolist()) == list(range(len(lengths)))
    for row in rows:
        assert sum(lengths[sample] for sample in row) <= capacity or len(row) == 1
    assert all(map(np.array_equal, rows, pack_samples(np.array(lengths, np.int32), capacity, strategy)))
    if strategy == "sequential":
        assert np.concatenate([*rows, np.zeros(0, int)]).tolist() == list(range(len(lengths)))
    elif max(lengths, default=0) <= capacity:
        assert len(rows) == len(slow_best_fit(lengths, capacity))


@pytest.mark.parametrize("spread", [0.4, 0.9, 1.4])
def test_rows_are_full(spread: float) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, spread, 100_000), 4, 4096).astype(int)
    rows = pack_samples(lengths, 4096)
    assert lengths.sum() / (len(rows) * 4096) > 0.99
    in_order = pack_samples(lengths, 4096, "sequential")
    assert len(in_order) > len(rows)


def test_lengths_of_hundred_thousand() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.9, 100_000), 4, 4096).astype(int)
    assert lengths.sum() / (len(pack_samples(lengths, 4096)) * 4096) > 0.97
