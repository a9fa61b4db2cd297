"""A text that an engine generates."""

import torch

from litgpt.errors import UserError
from litgpt.infer.block_cache import CacheBlock, count_common_tokens
from litgpt.infer.packed_step import Chunk
from litgpt.infer.prompt_images import ImageFeatures, list_prompt_blocks, list_prompt_keys
from litgpt.infer.requests import FinishReason, GeneratedToken, Request
from litgpt.infer.sampling import SampledRow
from litgpt.model.gpt import GPT
from litgpt.model.tower_config import TowerShape


class Sequence:
    """A request and what has been generated for it.

    Args:
        shape: of the vision tower of the model; None without one.

    Attributes:
        tokens: the generated tokens.
        prompt_logprobs: of the prompt's tokens but the first, if requested.
        finish_reason: `stop`, `length` or `cancelled`; None as long as it is not finished.
        error: why it was cancelled, if its constraint could not be followed.
        ids: the tokens of prompt and text.
        keys: what identifies the keys and values of each of them: the tokens, or as of `list_prompt_keys`.
    """

    def __init__(self, request: Request, device: torch.device, *, shape: TowerShape | None = None) -> None:
        self.request = request
        self.tokens: list[GeneratedToken] = []
        self.prompt_logprobs: list[GeneratedToken] = []
        self.finish_reason: FinishReason | None = None
        self.error: UserError | None = None
        self.ids = list(request.prompt)
        self.keys = list_prompt_keys(request.prompt, request.images, shape)
        self._blocks = list_prompt_blocks(request.prompt, request.images, shape)
        self.block: CacheBlock | None = None
        self.was_preempted = False
        self._features = None if request.images is None else ImageFeatures(request.images.images)
        generator = None if request.seed is None else torch.Generator(device).manual_seed(request.seed)
        self.row = SampledRow(request.sampling, request.prompt, [], generator, request.constraint)

    @property
    def computed(self) -> int:
        """The number of tokens whose keys and values are in the cache."""
        return 0 if self.block is None else len(self.block.ids)

    def append(self, token: GeneratedToken) -> None:
        """Add a generated token."""
        self.tokens.append(token)
        self.ids.append(token.token)
        self.keys.append(token.token)
        self.row.generated.append(token.token)

    def divides_block(self, token: int) -> bool:
        """Whether the text up to a token has a part of an image or a prompt whose tokens attend to each other."""
        return 0 < token < len(self._blocks) and self._blocks[token] == self._blocks[token - 1] >= 0

    def shares_blocks(self, other: CacheBlock) -> bool:
        """Whether the common beginning with another text divides no block."""
        # the last token is computed again, but its block was computed as a whole
        return not self.divides_block(count_common_tokens(other.ids, self.keys))

    def limit_chunk(self, tokens: int, *, may_exceed: bool) -> int:
        """The most of the next tokens, up to a number, that divide no block.

        Args:
            may_exceed: return more, up to the end of the block, rather than none.
        """
        start, stop = self.computed, self.computed + tokens
        while stop > start and self.divides_block(stop):
            stop -= 1
        if stop == start and may_exceed:
            stop += tokens
            while self.divides_block(stop):
                stop += 1
        return stop - start

    def build_chunk(self, model: GPT, tokens: int, more: list[int], *, has_logprobs: bool) -> Chunk:
        """The next tokens that are not computed, and `more` after them.

        Args:
            has_logprobs: whether all of them need logits; otherwise the last one does if nothing is missing after it.
        """
        assert self.block is not None
        start, stop = self.computed, self.computed + tokens
        ids, images = [*self.ids[start:stop], *more], self.request.images
        blocks = self._blocks[start:stop]
        has_places = any(number >= 0 for number in blocks)
        return Chunk(
            self.block,
            ids,
            len(ids) if has_logprobs or more else int(stop == len(self.ids)),
            keys=[*self.keys[start:stop], *more],
            positions=None if images is None else images.find_positions(start, start + len(ids)),
            features=None if self._features is None else self._features.find(model, start, stop),
            blocks=[*blocks, *[-1] * (len(ids) - len(blocks))] if has_places else None,
        )

    def release(self) -> None:
        """Free the memory of images."""
        self._features = None
