"""Endless, exactly resumable micro batches: sample number i is a function of (seed, i) and of nothing else."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.data.stream.sampler import FeistelPermutation
from litgpt.data.stream.workers import PrefetchingStream, count_cpus
from litgpt.errors import UserError
from litgpt.recipe.data import BatchShape

Window = tuple[np.ndarray, np.ndarray | None]
"""One sample: (T+1,) tokens, and (T,) document numbers or None."""
Arrays = dict[str, np.ndarray]
"""A micro batch as workers hand it over: what `to_batch` makes a Batch of."""


class TokenReader(Protocol):
    """One long text as tokens, on disk. Readers are picklable without their data."""

    total: int
    fingerprint: str

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop-1."""

    def find_document_starts(self, start: int, stop: int) -> np.ndarray:
        """Where documents begin, of those that begin in start .. stop-1."""


class SampleDataset(Protocol):
    """Numbered samples without end: number `count` is the first of the second epoch."""

    count: int
    fingerprint: str
    channels: Sequence[str]

    def micro_batch(self, first: int, number: int) -> Arrays:
        """Samples `first` .. `first + number - 1`."""


class WindowDataset(SampleDataset, Protocol):
    """Samples of one length, cut from texts."""

    def row(self, index: int) -> Window:
        """Sample number `index`."""

    def document_numbers(self, index: int) -> np.ndarray:
        """(T,) int32: which document of sample number `index` each token belongs to, from 0."""


class StackedWindows:
    """What rows of one length share."""

    channels: Sequence[str] = ()

    def micro_batch(self: WindowDataset, first: int, number: int) -> Arrays:
        """Samples as (B, T+1) `tokens`, and (B, T) `documents` if they are numbered."""
        rows = [self.row(first + place) for place in range(number)]
        documents = [numbers for _, numbers in rows if numbers is not None]
        arrays = {"tokens": np.stack([tokens for tokens, _ in rows])}
        return arrays | ({"documents": np.stack(documents)} if documents else {})


class Windows(StackedWindows):
    """Samples of T+1 tokens cut from one text at a stride of T, in another order every epoch.

    Every token but the first is a label exactly once an epoch, except for the `tail` tokens at the end that fill no
    window.

    Args:
        tokens: the text.
        length: T, the tokens that the model reads.
        seed: fixes the order.
        document_mask: number the documents in each row.

    Raises:
        UserError: if the text is shorter than one window.
    """

    def __init__(self, tokens: TokenReader, length: int, seed: int, document_mask: bool = False) -> None:
        self.count = (tokens.total - 1) // length
        if self.count < 1:
            raise UserError(
                f"train.max_seq_length: {length} needs {length + 1} tokens of text, but there are only {tokens.total}; "
                f"give more text or set train.max_seq_length to {max(1, tokens.total - 1)} or less"
            )
        self.tail = tokens.total - 1 - self.count * length
        self.fingerprint = _digest(tokens.fingerprint, length, seed)
        self.tokens = tokens
        self._length, self._seed, self._document_mask = length, seed, document_mask
        self._permutation = (0, FeistelPermutation(self.count, seed, 0))

    def row(self, index: int) -> Window:
        """Sample number `index` over all epochs."""
        start = self._start(index)
        window = self.tokens.read(start, start + self._length + 1)
        return window, self._documents(start) if self._document_mask else None

    def document_numbers(self, index: int) -> np.ndarray:
        """(T,) int32: which document of sample number `index` each token belongs to, from 0."""
        return self._documents(self._start(index))

    def _start(self, index: int) -> int:
        epoch, within = divmod(index, self.count)
        if self._permutation[0] != epoch:
            self._permutation = (epoch, FeistelPermutation(self.count, self._seed, epoch))
        return self._permutation[1](within) * self._length

    def _documents(self, start: int) -> np.ndarray:
        begins = np.zeros(self._length, dtype=np.int32)
        # the first token's document is number 0, whether it begins here or earlier
        begins[self.tokens.find_document_starts(start + 1, start + self._length) - start] = 1
        return begins.cumsum(dtype=np.int32)


class BlendedWindows(StackedWindows):
    """Two sources of samples, interleaved so evenly that after n samples the first has given floor(n * share).

    Args:
        share: of samples from `first`, between 0 and 1.
    """

    def __init__(self, first: WindowDataset, second: WindowDataset, share: float) -> None:
        self.count = first.count + second.count
        self.fingerprint = _digest(first.fingerprint, second.fingerprint, share)
        self.first, self.second = first, second
        self._millionths = round(share * 1_000_000)  # whole numbers, so that no position is too large to be exact

    def row(self, index: int) -> Window:
        """Sample number `index`."""
        rows, place = self._place(index)
        return rows.row(place)

    def document_numbers(self, index: int) -> np.ndarray:
        """(T,) int32: which document of sample number `index` each token belongs to, from 0."""
        rows, place = self._place(index)
        return rows.document_numbers(place)

    def _place(self, index: int) -> tuple[WindowDataset, int]:
        taken = index * self._millionths // 1_000_000
        if (index + 1) * self._millionths // 1_000_000 > taken:
            return self.first, taken
        return self.second, index - taken


class MicroBatchDataset(Dataset[Arrays]):
    """The micro batch of one rank at any position."""

    def __init__(self, rows: SampleDataset, shape: BatchShape) -> None:
        self.rows, self.shape = rows, shape

    def __getitem__(self, position: int) -> Arrays:
        first = position + self.shape.rank * self.shape.micro_batch_size
        try:
            return self.rows.micro_batch(first, self.shape.micro_batch_size)
        except UserError as error:  # a worker's errors would reach the run with a traceback in their text
            return {"error": np.array(str(error))}


class CountedStream:
    """How far a stream has come through its samples."""

    rows: SampleDataset
    position: int

    @property
    def samples_per_epoch(self) -> int:
        """Samples in one pass over the data, over all ranks."""
        return self.rows.count

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.position / self.rows.count

    @property
    def channels(self) -> list[str]:
        """The names of the numbers in `Batch.channels`."""
        return list(self.rows.channels)


class TrainStream(CountedStream, PrefetchingStream):
    """Endless micro batches; `position` counts the samples handed out over all ranks.

    The micro batch of rank r at position p holds samples p + r*B .. p + (r+1)*B - 1, then p grows by B * ranks. A
    global batch is therefore the same set of samples for every number of ranks and every micro batch size, and a run
    may go on with other ones.

    Args:
        rows: the samples.
        shape: this rank's share of them.
        workers: processes that read ahead, at most one for each core; 0 reads in this one. The batches do not depend
            on it.
    """

    def __init__(self, rows: SampleDataset, shape: BatchShape, *, workers: int = 0) -> None:
        super().__init__()
        self.position = 0
        self.rows, self._shape, self._workers = rows, shape, min(workers, count_cpus())

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        positions = itertools.count(self.position, self._shape.samples_per_round)
        batches = MicroBatchDataset(self.rows, self._shape)
        if self._workers:
            self.start(batches, self._workers, positions)
        else:
            self.running = map(batches.__getitem__, positions)
        while self.running is not None:  # read through the attribute: `close` must drop the last reference
            arrays = next(self.running)
            self.position += self._shape.samples_per_round
            yield to_batch(arrays)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out and the fingerprint of the data; under 100 bytes of JSON."""
        return {"position": self.position, "fingerprint": self.rows.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            UserError: if the state belongs to other data, another tokenizer, sequence length or seed.
        """
        self.position = check_position(state, self.rows.fingerprint)


class ValStream(CountedStream):
    """One pass over validation samples each time it is iterated, in a fixed order, equally long on every rank.

    It is read in this process: the text is mapped into memory, and starting workers for every validation would take
    longer than reading. SampleDataset past the end have all labels ignored.
    """

    def __init__(self, rows: SampleDataset, shape: BatchShape) -> None:
        self.position = 0
        self.rows, self._shape = rows, shape

    def __len__(self) -> int:
        """Batches in a pass, on every rank."""
        return -(-self.rows.count // self._shape.samples_per_round)

    def __iter__(self) -> Iterator[Batch]:
        micro_batches, step = MicroBatchDataset(self.rows, self._shape), self._shape.samples_per_round
        for start in range(0, len(self) * step, step):
            there = self.rows.count - start - self._shape.rank * self._shape.micro_batch_size
            batch = to_batch(micro_batches[start], trained=max(0, there))
            self.position = start + step
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: every pass starts at the start."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Every pass starts at the start, so there is nothing to go on from."""

    def close(self) -> None:
        """There are no workers to stop."""


def to_batch(arrays: Arrays, *, trained: int | None = None) -> Batch:
    """The tensors of a micro batch; `tokens` (B, T+1) become ids and labels of (B, T) each.

    Args:
        trained: how many of the samples count, the first ones; the labels of the others are ignored.

    Raises:
        UserError: the one that reading them ended with.
    """
    found = dict(arrays)
    if "error" in found:
        raise UserError(str(found["error"]))
    stops = found.pop("stops", None)
    if "tokens" in found:
        ids = torch.from_numpy(found.pop("tokens").astype(np.int64))
        batch = Batch(ids=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous(), **_tensors(found))
    else:
        batch = Batch(**_tensors(found))
    if trained is not None and stops is None:
        batch.labels[trained:] = IGNORE
    elif trained is not None and stops is not None and trained < len(stops):
        batch.labels[:, int(stops[trained - 1]) if trained else 0 :] = IGNORE  # the samples lie in one row
    return batch


def _tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def check_position(state: dict[str, Any], fingerprint: str) -> int:
    """The position in a stream's state, if it was taken from the data with this fingerprint.

    Raises:
        UserError: if it was not, or is no state.
    """
    position = state.get("position")
    if not isinstance(position, int) or isinstance(position, bool) or position < 0:
        raise UserError(f"data: {str(state)[:80]} is no position in a data stream")
    if state.get("fingerprint") != fingerprint:
        raise UserError(
            f"data: the checkpoint was at sample {position} of another data set ({state.get('fingerprint')}, now "
            f"{fingerprint}): the text, the tokenizer, train.max_seq_length or data.seed changed; put it back, or "
            "start a new run with initial_checkpoint_dir"
        )
    return position


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
