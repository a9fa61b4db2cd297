"""The key-value cache of generation, with which each token is processed once.

Axes: B batch, K key-value heads, T new tokens, U all tokens, S head size.
"""

from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.attention import KVCacheLayer

GROWTH_STEP = 256
"""Number of tokens by which a cache without a capacity grows; copying then takes less than 1 % of the time."""


class GrowingTensor:
    """A tensor (B, K, U, S) that is appended to along U, in preallocated memory."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.buffer: Tensor | None = None

    def append(self, new_BKTS: Tensor, length: int) -> Tensor:
        """Write new tokens after the first `length` tokens, and return a view (B, K, U, S) of all."""
        end = length + new_BKTS.shape[2]
        if self.buffer is None or self.buffer.shape[2] < end:
            self._grow(new_BKTS, length, end)
        assert self.buffer is not None
        self.buffer[:, :, length:end] = new_BKTS
        return self.buffer[:, :, :end]

    def _grow(self, like: Tensor, length: int, end: int) -> None:
        size = self.capacity or -(-end // GROWTH_STEP) * GROWTH_STEP
        larger = like.new_empty(*like.shape[:2], size, like.shape[3])
        if self.buffer is not None:
            larger[:, :, :length] = self.buffer[:, :, :length]
        self.buffer = larger


class LayerKeyValues(KVCacheLayer):
    """The keys and values of one layer; with a sliding window, all are stored and attention masks the older ones."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys, self.values = GrowingTensor(capacity), GrowingTensor(capacity)

    def append(self, k_BKTS: Tensor, v_BKTS: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens, and return those of all tokens, (B, K, U, S).

        Raises:
            UserError: if they exceed the capacity.
        """
        length, self.length = self.length, self.length + k_BKTS.shape[2]
        if self.capacity is not None and self.length > self.capacity:
            raise UserError(f"fixed_kv_cache_size: {self.capacity} is less than {self.length} tokens; set a larger one")
        return self.keys.append(k_BKTS, length), self.values.append(v_BKTS, length)


class KeyValueCache:
    """The keys and values of all layers; for a model that runs without gradients.

    Args:
        layers: the number of the model's layers.
        capacity: the number of tokens to allocate memory for; None to grow as necessary.
    """

    def __init__(self, layers: int, capacity: int | None = None) -> None:
        self.length = 0
        self.layers = [LayerKeyValues(capacity) for _ in range(layers)]

    def advance(self, tokens: int) -> None:
        """Count tokens that every layer has appended."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens of every layer; the next ones are written in place of the others."""
        self.length = length
        for layer in self.layers:
            layer.length = min(layer.length, length)
