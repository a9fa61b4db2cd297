"""Samples of one length, cut from token streams; sample number i is a function of (seed, i)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from litgpt.data.stream.batch import BatchArrays
from litgpt.data.stream.fingerprint import compute_fingerprint
from litgpt.data.stream.sampler import FeistelPermutation
from litgpt.errors import UserError

Window = tuple[np.ndarray, np.ndarray | None]
"""One sample: (T+1,) tokens, and (T,) document numbers or None."""


class TokenReader(Protocol):
    """One long text as tokens on disk. Readers are pickled without their data."""

    total: int
    fingerprint: str

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read tokens start .. stop-1."""

    def find_document_starts(self, start: int, stop: int) -> np.ndarray:
        """Find the first tokens of documents among start .. stop-1."""


class SampleDataset(Protocol):
    """Numbered samples without end: number `count` is the first of the second epoch."""

    count: int
    token_count: int
    fingerprint: str
    channels: Sequence[str]

    def micro_batch(self, first: int, size: int) -> BatchArrays:
        """Collate samples `first` .. `first + size - 1`."""


class WindowDataset(ABC):
    """Base of datasets of windows of one length, whose micro batches are stacked."""

    channels: Sequence[str] = ()

    @abstractmethod
    def locate(self, index: int) -> "tuple[Windows, int]":
        """Return the windows that sample `index` over all epochs comes from, and its index among them."""

    def micro_batch(self, first: int, size: int) -> BatchArrays:
        """Stack samples to (B, T+1) `tokens`, and (B, T) `documents` if they are numbered."""
        samples = [windows.read_window(index) for windows, index in map(self.locate, range(first, first + size))]
        documents = [numbers for _, numbers in samples if numbers is not None]
        arrays = {"tokens": np.stack([tokens for tokens, _ in samples])}
        return arrays | ({"documents": np.stack(documents)} if documents else {})


class Windows(WindowDataset):
    """Windows of T+1 tokens cut from one text at a stride of T, in a new order every epoch.

    Every token but the first is a label exactly once per epoch, except for the `tail` tokens at the end that do not
    fill a window.

    Args:
        tokens: the text.
        length: T, the maximum sequence length of the model.
        seed: seed of the order; None for that of the text.
        document_mask: number the documents in each window.

    Raises:
        UserError: if the text is shorter than one window.
    """

    def __init__(self, tokens: TokenReader, length: int, seed: int | None, document_mask: bool = False) -> None:
        self.count = (tokens.total - 1) // length
        if self.count < 1:
            raise UserError(
                f"train.max_seq_length: {length} needs {length + 1} tokens of text, but there are only {tokens.total}; "
                f"add more text or set train.max_seq_length to {max(1, tokens.total - 1)} or less"
            )
        self.token_count = self.count * length
        self.tail = tokens.total - 1 - self.count * length
        self.fingerprint = compute_fingerprint(tokens.fingerprint, length, seed)
        self.tokens = tokens
        self._length, self._seed, self._document_mask = length, seed, document_mask
        self._permutation = (0, FeistelPermutation(self.count, seed or 0, 0))

    def locate(self, index: int) -> "tuple[Windows, int]":
        """Return itself and `index`."""
        return self, index

    def read_window(self, index: int) -> Window:
        """Read sample number `index` over all epochs."""
        start = self._find_start(index)
        window = self.tokens.read(start, start + self._length + 1)
        return window, self._number_documents(start) if self._document_mask else None

    def number_documents(self, index: int) -> np.ndarray:
        """(T,) int32: number of the document that each token of sample `index` belongs to, from 0."""
        return self._number_documents(self._find_start(index))

    def _find_start(self, index: int) -> int:
        epoch, offset = divmod(index, self.count)
        if self._seed is None:
            return offset * self._length
        if self._permutation[0] != epoch:
            self._permutation = (epoch, FeistelPermutation(self.count, self._seed, epoch))
        return self._permutation[1](offset) * self._length

    def _number_documents(self, start: int) -> np.ndarray:
        is_start = np.zeros(self._length, dtype=np.int32)
        # the document of the first token is number 0, whether it starts here or earlier
        is_start[self.tokens.find_document_starts(start + 1, start + self._length) - start] = 1
        return is_start.cumsum(dtype=np.int32)


class BlendedWindows(WindowDataset):
    """Two window datasets, interleaved so that the first n samples hold floor(n * share) of the first dataset.

    Args:
        share: fraction of the samples that come from `first`, between 0 and 1.
    """

    def __init__(self, first: Windows, second: Windows, share: float) -> None:
        self.count = first.count + second.count
        self.token_count = first.token_count + second.token_count
        self.fingerprint = compute_fingerprint(first.fingerprint, second.fingerprint, share)
        self.first, self.second = first, second
        self._millionths = round(share * 1_000_000)  # integers stay exact at every position

    def locate(self, index: int) -> tuple[Windows, int]:
        """Return the windows that sample `index` over all epochs comes from, and its index among them."""
        from_first = index * self._millionths // 1_000_000
        if (index + 1) * self._millionths // 1_000_000 > from_first:
            return self.first, from_first
        return self.second, index - from_first
