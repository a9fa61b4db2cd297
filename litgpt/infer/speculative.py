"""Speculative decoding: a small model proposes tokens, which the large one checks in one forward pass.

A token x that the draft drew with probability q(x) is accepted with probability min(1, p(x) / q(x)); the first one that
is not accepted is drawn again from the positive part of p - q, and after the last one a token is drawn from p. The text
then has exactly the distribution of the large model (Leviathan et al. 2023, algorithm 1).

Axes: R proposed tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.infer.block_cache import BlockCache, CacheBlock, count_common_tokens, find_window_layers
from litgpt.infer.packed_step import Chunk, run_packed
from litgpt.infer.sampling import SampledRow, compute_probabilities, draw_tokens
from litgpt.model.gpt import GPT

CATCH_UP_TOKENS = 512
"""The maximum number of tokens of one text that the draft processes in a forward pass."""


@dataclass(frozen=True)
class Proposal:
    """Proposed tokens of one text, and the distribution that each was drawn from, (R, V)."""

    tokens: list[int]
    probabilities_RV: Tensor


class Draft:
    """A small model that continues texts; it has the tokens of the large one.

    Args:
        proposed_tokens: the number of tokens to propose in a step.
        max_tokens: the maximum number of tokens of all texts whose keys and values are in memory.

    Attributes:
        proposed, accepted: the numbers of tokens so far.
    """

    def __init__(self, model: GPT, *, proposed_tokens: int, max_tokens: int) -> None:
        if proposed_tokens < 1:
            raise UserError(f"speculative_k: {proposed_tokens} is less than 1; set 3, for example")
        self.model, self.proposed_tokens = model, proposed_tokens
        windows = find_window_layers(model.config, max(CATCH_UP_TOKENS, proposed_tokens + 1))
        self.cache = BlockCache(max_tokens, windows=windows)
        self.proposed = self.accepted = 0
        self._blocks: dict[int, CacheBlock] = {}

    def propose(self, texts: dict[int, tuple[list[int], SampledRow, int]]) -> dict[int, Proposal]:
        """Propose tokens for texts, by a key of each; none for a text for which there is no memory.

        Args:
            texts: the tokens of each text, how its next token is sampled, and the number of tokens it may still need.
        """
        counts = {key: min(self.proposed_tokens, room - 1) for key, (_, _, room) in texts.items()}
        counts = {key: count for key, count in counts.items() if count > 0 and self._reserve(key, *texts[key])}
        tokens: dict[int, list[int]] = {key: [] for key in counts}
        distributions: dict[int, list[Tensor]] = {key: [] for key in counts}
        for number in range(max(counts.values(), default=0)):
            keys = [key for key, count in counts.items() if count > number]
            rows = [extend_row(texts[key][1], tokens[key]) for key in keys]
            logits = self._advance([(self._blocks[key], [*texts[key][0], *tokens[key]]) for key in keys])
            probabilities = compute_probabilities(logits, rows)
            drawn = draw_tokens(probabilities.log(), [row.generator for row in rows]).tolist()
            for key, token, row in zip(keys, drawn, probabilities, strict=True):
                tokens[key].append(token)
                distributions[key].append(row)
        self.proposed += sum(counts.values())
        return {key: Proposal(tokens[key], torch.stack(distributions[key])) for key in counts}

    def _reserve(self, key: int, ids: list[int], _row: SampledRow, room: int) -> bool:
        """Whether a text has memory in the draft's cache; without the tokens that were not accepted."""
        block = self._blocks.get(key) or self.cache.allocate(min(len(ids) + room, self.model.config.block_size))
        if block is None:
            return False
        self._blocks[key] = block
        if len(ids) + self.proposed_tokens > block.slab.size:
            return False
        del block.ids[count_common_tokens(block.ids, ids[:-1]) :]
        return True

    def _advance(self, texts: Sequence[tuple[CacheBlock, list[int]]]) -> Tensor:
        """Process the tokens of each text that the draft has not, and return the logits of the last ones, (R, V)."""
        while any(len(ids) - len(block.ids) > CATCH_UP_TOKENS for block, ids in texts):
            long = [
                (block, ids[len(block.ids) :][:CATCH_UP_TOKENS])
                for block, ids in texts
                if len(ids) - len(block.ids) > CATCH_UP_TOKENS
            ]
            run_packed(self.model, [Chunk(block, ids) for block, ids in long], self.cache.slabs)
        chunks = [Chunk(block, ids[len(block.ids) :]) for block, ids in texts]
        return torch.cat(run_packed(self.model, chunks, self.cache.slabs))

    def release(self, key: int) -> None:
        """Free the memory of a text."""
        if (block := self._blocks.pop(key, None)) is not None:
            self.cache.free(block)

    def check(self, proposal: Proposal, logits_RV: Tensor, row: SampledRow) -> list[int]:
        """The tokens of the large model: those accepted, and one more.

        Args:
            logits_RV: of the large model, for each proposed token and the one after them.
            row: how the text is sampled.
        """
        rows = [extend_row(row, proposal.tokens[:number]) for number in range(len(proposal.tokens) + 1)]
        p_RV, accepted = compute_probabilities(logits_RV, rows), 0
        for token, p_V, q_V in zip(proposal.tokens, p_RV, proposal.probabilities_RV, strict=False):
            number = torch.rand((), generator=row.generator, dtype=p_V.dtype, device=p_V.device)
            if number * q_V[token] >= p_V[token]:
                rest_V = (p_V - q_V).clamp(min=0)
                next_V = rest_V if bool(rest_V.sum() > 0) else p_V  # equal up to rounding
                break
            accepted += 1
        else:
            next_V = p_RV[-1]
        self.accepted += accepted
        return [*proposal.tokens[:accepted], int(draw_tokens(next_V.log()[None], [row.generator]))]


def extend_row(row: SampledRow, tokens: list[int]) -> SampledRow:
    """A text after some more tokens."""
    return replace(row, generated=[*row.generated, *tokens])


def check_draft(draft: GPT, target: GPT) -> None:
    """Check that a draft has the tokens of the model whose texts it proposes.

    Raises:
        UserError: if their numbers of tokens differ.
    """
    rows, expected = draft.config.padded_vocab_size, target.config.padded_vocab_size
    if rows != expected:
        raise UserError(
            f"draft_model_checkpoint_dir: {draft.config.name} has {rows} tokens, but {target.config.name} has "
            f"{expected}; use a draft with the same tokenizer"
        )
