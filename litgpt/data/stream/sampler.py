"""The order of samples in an epoch: a keyed permutation, which takes no memory and has random access."""

import hashlib
from dataclasses import dataclass

import numpy as np

_MASK = (1 << 64) - 1
_ROUNDS = 6


class FeistelPermutation:
    """A pseudorandom permutation of 0 .. count-1, determined by `seed` and `epoch`.

    A Feistel network over the smallest even number of bits that holds `count`; values outside the range
    are encrypted again until they are inside ("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite
    Domains, 2002), which takes fewer than four passes on average.
    """

    def __init__(self, count: int, seed: int, epoch: int | str) -> None:
        self.count = count
        self._half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
        digest = hashlib.shake_128(f"order:{seed}:{epoch}".encode()).digest(8 * _ROUNDS)
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Map the position `index` in the epoch to a sample number."""
        assert 0 <= index < self.count
        while True:
            index = self._encrypt(index)
            if index < self.count:
                return index

    def _encrypt(self, value: int) -> int:
        bits = self._half_bits
        low_bits = (1 << bits) - 1
        left, right = value >> bits, value & low_bits
        for key in self._keys:
            left, right = right, left ^ (_mix_bits(right ^ key) & low_bits)
        return left << bits | right


@dataclass(frozen=True)
class LengthGrouping:
    """How samples are grouped by length.

    Attributes:
        group: samples per group; a global batch.
        groups: number of groups that are sorted together.
    """

    group: int
    groups: int

    def __repr__(self) -> str:
        # checkpoints hold a hash of this text, so it keeps the class's first name
        return f"Grouping(group={self.group}, groups={self.groups})"


class LengthGroupedSampler:
    """A permutation of 0 .. count-1 that places samples of similar lengths next to each other.

    A shuffled order is cut into blocks of `groups` x `group` samples; each block is sorted by length, longest first,
    and cut into groups, whose order is shuffled; an incomplete group comes last.

    Args:
        lengths: (count,) tokens of each sample.
    """

    def __init__(self, lengths: np.ndarray, seed: int, epoch: int, grouping: LengthGrouping) -> None:
        self._lengths, self._grouping, self._seed, self._epoch = lengths, grouping, seed, epoch
        self._shuffled = FeistelPermutation(len(lengths), seed, epoch)
        self._block = (-1, np.zeros(0, np.int64))

    def __call__(self, index: int) -> int:
        """Map the position `index` in the epoch to a sample number."""
        block, offset = divmod(index, self._grouping.group * self._grouping.groups)
        if self._block[0] != block:
            self._block = (block, self._sort_block(block))
        return int(self._block[1][offset])

    def _sort_block(self, block: int) -> np.ndarray:
        group, size = self._grouping.group, self._grouping.group * self._grouping.groups
        positions = range(block * size, min((block + 1) * size, len(self._lengths)))
        members = np.fromiter(map(self._shuffled, positions), np.int64, len(positions))
        members = members[np.argsort(-self._lengths[members], kind="stable")]
        whole_groups = len(members) // group
        shuffled = FeistelPermutation(whole_groups, self._seed, f"{self._epoch}:{block}") if whole_groups else None
        starts = [group * index for index in map(shuffled, range(whole_groups))] if shuffled else []
        parts = [members[start : start + group] for start in starts]
        return np.concatenate([*parts, members[whole_groups * group :]])


def _mix_bits(value: int) -> int:
    """Scramble 64 bits (the finalizer of SplitMix64, Steele et al. 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
