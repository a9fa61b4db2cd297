"""The keys and values of the tokens that a model has read, so that each token is computed once.

Axes: B batch, K key-value heads, T new tokens, U all tokens, S numbers of a head.
"""

from torch import Tensor

from litgpt.errors import UserError

STEP = 256
"""Tokens of room that a cache without a limit grows by; copying it that seldom costs less than 1 % of reading it."""


class GrowingTensor:
    """A tensor (B, K, U, S) that is appended to along U, in memory that was made for more."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.room: Tensor | None = None

    def append(self, new_BKTS: Tensor, length: int) -> Tensor:
        """Write the new part behind the first `length` tokens; a view of all."""
        end = length + new_BKTS.shape[2]
        if self.room is None or self.room.shape[2] < end:
            self._grow(new_BKTS, length, end)
        assert self.room is not None
        self.room[:, :, length:end] = new_BKTS
        return self.room[:, :, :end]

    def _grow(self, like: Tensor, length: int, end: int) -> None:
        size = self.capacity or -(-end // STEP) * STEP
        larger = like.new_empty(*like.shape[:2], size, like.shape[3])
        if self.room is not None:
            larger[:, :, :length] = self.room[:, :, :length]
        self.room = larger


class LayerCache:
    """The keys and values of one layer. A layer with a sliding window keeps all too, and masks what it may not see."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys, self.values = GrowingTensor(capacity), GrowingTensor(capacity)

    def append(self, k_BKTS: Tensor, v_BKTS: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of the next tokens; all keys and values, (B, K, U, S), the new ones last.

        Raises:
            UserError: if the cache has a size and is full.
        """
        length, self.length = self.length, self.length + k_BKTS.shape[2]
        if self.capacity is not None and self.length > self.capacity:
            raise UserError(f"fixed_kv_cache_size: {self.capacity} is too few for {self.length} tokens; give more")
        return self.keys.append(k_BKTS, length), self.values.append(v_BKTS, length)


class KeyValueCache:
    """The keys and values of all layers; for a model that runs without gradients.

    Args:
        layers: how many the model has.
        capacity: tokens to make room for at once; None: the room grows as it is needed.
    """

    def __init__(self, layers: int, capacity: int | None = None) -> None:
        self.length = 0
        self.layers = [LayerCache(capacity) for _ in range(layers)]

    def advance(self, tokens: int) -> None:
        """Count tokens that every layer has appended."""
        self.length += tokens
