"""The order of samples in an epoch: a keyed permutation that takes no memory and starts anywhere at once."""

import hashlib

_MASK = (1 << 64) - 1
_ROUNDS = 6


class Permutation:
    """A bijection of 0 .. count-1, fixed by `seed` and `epoch`.

    A Feistel network over the smallest even number of bits that holds `count`; values that fall outside are sent
    through again until they fall inside ("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite Domains,
    2002), which takes fewer than four rounds on average.
    """

    def __init__(self, count: int, seed: int, epoch: int) -> None:
        self.count = count
        self._half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
        digest = hashlib.shake_128(f"order:{seed}:{epoch}".encode()).digest(8 * _ROUNDS)
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where sample number `index` of the epoch lies in the data."""
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
            left, right = right, left ^ (_mix(right ^ key) & low_bits)
        return left << bits | right


def _mix(value: int) -> int:
    """Scramble 64 bits (the finalizer of SplitMix64, Steele et al. 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
