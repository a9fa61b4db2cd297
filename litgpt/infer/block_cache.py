"""A cache of keys and values in blocks of a few sizes, which all texts share.

A text has one block, and moves to a larger one when it is full. Blocks of a size are neighbours in memory, so that one
call of attention reads those of many texts without a copy. Blocks of finished texts are kept as long as no other text
needs the memory: a text that begins as they do copies the keys and values of the common prefix.

Layers with sliding-window attention keep the last R tokens of a text: token t is written in place of token t - R. Of a
text with more than R tokens, another one can then continue only the end, whose window is not overwritten.

Axes: N blocks, K key-value heads, T tokens, U tokens of a block, S head size.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from litgpt.model.config import Config

FIRST_SIZE = 64  # tokens; the sizes are 64, 96, 128, 192, 256, 384, ...
SLAB_BLOCKS, SLAB_TOKENS = 16, 16384
"""The number of blocks that are allocated at once, at most."""


def round_up_size(tokens: int) -> int:
    """The smallest size of a block that holds this many tokens."""
    size = FIRST_SIZE
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def count_common_tokens(first: list[int], second: list[int]) -> int:
    """The length of the common prefix of two lists."""
    shorter = min(len(first), len(second))
    return bisect.bisect_left(range(1, shorter + 1), True, key=lambda size: first[:size] != second[:size])


@dataclass(frozen=True)
class WindowLayers:
    """The layers with sliding-window attention.

    Attributes:
        window: the number of tokens that a token attends to, itself included.
        kept: the number of tokens of a text that are in memory at most.
    """

    layers: frozenset[int]
    window: int
    kept: int


def find_window_layers(config: Config, pass_tokens: int) -> WindowLayers | None:
    """The layers of a model with sliding-window attention; None without any.

    Args:
        pass_tokens: the maximum number of tokens of a text in a forward pass, or of those that are taken back after it.
    """
    layers = frozenset(layer for layer in range(config.n_layer) if config.is_local(layer))
    window = config.sliding_window_size
    return WindowLayers(layers, window, window + pass_tokens) if window is not None and layers else None


class Slab:
    """Blocks of one size, neighbours in memory, which is allocated when a layer writes for the first time."""

    def __init__(self, size: int, blocks: int, windows: WindowLayers | None = None) -> None:
        self.size, self.blocks, self.windows = size, blocks, windows
        self.window_size = size if windows is None else min(size, windows.kept)
        self.free = list(range(blocks))  # ascending
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def get_layer(self, layer: int, k_BKTS: Tensor, v_BKTS: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (N, K, U, S), for heads as those of the given ones."""
        if layer not in self.layers:  # zeros: masked ones take part in products, and must be finite
            size = self.window_size if self.windows is not None and layer in self.windows.layers else self.size
            self.layers[layer] = tuple(x.new_zeros(self.blocks, x.shape[1], size, x.shape[3]) for x in (k_BKTS, v_BKTS))  # type: ignore[assignment]
        return self.layers[layer]


@dataclass(eq=False)
class CacheBlock:
    """The memory of one text.

    Attributes:
        ids: the tokens whose keys and values it holds; at places of images, the numbers of `PromptImages.list_keys`.
        written: the number of tokens whose keys and values were written, also of those taken back since.
    """

    slab: Slab
    index: int
    ids: list[int] = field(default_factory=list)
    written: int = 0

    def extend(self, ids: Sequence[int]) -> None:
        """Add tokens whose keys and values have been written."""
        self.ids.extend(ids)
        self.written = max(self.written, len(self.ids))


class BlockCache:
    """Blocks for at most `max_tokens` tokens in all, of which `slab_blocks` or less are allocated at once.

    Args:
        windows: layers that keep the last tokens of a text only; None if all keep all tokens.
    """

    def __init__(self, max_tokens: int, slab_blocks: int = SLAB_BLOCKS, *, windows: WindowLayers | None = None) -> None:
        self.max_tokens, self.slab_blocks, self.windows = max_tokens, slab_blocks, windows
        self.slabs: list[Slab] = []
        self.blocks: list[CacheBlock] = []
        self.kept: list[CacheBlock] = []  # of finished texts, the one not used for the longest time first

    @property
    def allocated_tokens(self) -> int:
        """The number of tokens for which memory is allocated."""
        return sum(slab.size * slab.blocks for slab in self.slabs)

    def allocate(self, tokens: int, source: CacheBlock | None = None) -> CacheBlock | None:
        """A block for a text of this many tokens; None if there is no memory, even without those kept.

        Args:
            source: a kept block that stays, because its prefix is to be copied.
        """
        size = min(round_up_size(tokens), self.max_tokens)
        while (slab := self._find_slab(size)) is None:
            unneeded = next((block for block in self.kept if block is not source), None)
            if unneeded is None:
                return None
            self.free(unneeded)
        block = CacheBlock(slab, slab.free.pop(0))
        self.blocks.append(block)
        return block

    def _find_slab(self, size: int) -> Slab | None:
        """A slab with a free block of this size, a new one if necessary."""
        if (slab := next((slab for slab in self.slabs if slab.size == size and slab.free), None)) is not None:
            return slab
        if self.allocated_tokens + size > self.max_tokens:
            self.slabs = [slab for slab in self.slabs if len(slab.free) < slab.blocks]
        count = min(self.slab_blocks, max(1, SLAB_TOKENS // size), (self.max_tokens - self.allocated_tokens) // size)
        if count < 1:
            return None
        self.slabs.append(Slab(size, count, self.windows))
        return self.slabs[-1]

    def free(self, block: CacheBlock) -> None:
        """Make the memory of a block available to other texts."""
        bisect.insort(block.slab.free, block.index)
        self.blocks.remove(block)
        if block in self.kept:
            self.kept.remove(block)

    def keep(self, block: CacheBlock) -> None:
        """Keep the block of a finished text until its memory is needed."""
        self.kept.append(block)

    def find_prefix(self, ids: list[int]) -> tuple[CacheBlock | None, int]:
        """The block with the longest common prefix that can be continued, and its length, less than all tokens."""
        # the logits of the last token are needed, so it is computed again
        lengths = [min(count_common_tokens(block.ids, ids), len(ids) - 1) for block in self.blocks]
        lengths = [
            length if self._has_window(block, length) else 0 for block, length in zip(self.blocks, lengths, strict=True)
        ]
        longest = max(lengths, default=0)
        return (self.blocks[lengths.index(longest)] if longest else None), longest

    def _has_window(self, block: CacheBlock, tokens: int) -> bool:
        """Whether all that the token after these attends to is in memory."""
        if self.windows is None or block.written <= self.windows.kept:
            return True
        return tokens + 1 - self.windows.window >= block.written - self.windows.kept

    def copy_prefix(self, source: CacheBlock, target: CacheBlock, tokens: int) -> None:
        """Copy keys and values of the first tokens of one text to another, of those that `find_prefix` allows."""
        for layer, tensors in source.slab.layers.items():
            copies = target.slab.get_layer(layer, *tensors)
            for from_NKUS, to_NKUS in zip(tensors, copies, strict=True):
                size = min(tokens, from_NKUS.shape[2], to_NKUS.shape[2])
                to_NKUS[target.index, :, :size] = from_NKUS[source.index, :, :size]
        target.ids = source.ids[:tokens]
        is_linear = self.windows is None or source.written <= self.windows.kept
        target.written = tokens if is_linear else source.written  # later tokens than these were copied too
        if source in self.kept:  # recently used
            self.kept.remove(source)
            self.kept.append(source)

    def move(self, block: CacheBlock, tokens: int) -> bool:
        """Move a text to a block for this many tokens; False if there is no memory."""
        target = self.allocate(tokens)
        if target is None:
            return False
        self.copy_prefix(block, target, len(block.ids))
        bisect.insort(block.slab.free, block.index)
        self.blocks.remove(target)
        block.slab, block.index = target.slab, target.index
        return True
