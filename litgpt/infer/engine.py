"""Generate many texts at once: each forward pass has the next token of every text and chunks of new prompts.

Texts join and leave between forward passes (continuous batching; Yu et al. 2022, Orca). A text for which there is no
memory is put back in the queue, and its keys and values are computed again later.

Axes: R rows of logits, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.host_allocator import keep_freed_memory
from litgpt.infer.block_cache import SLAB_BLOCKS, BlockCache, count_common_tokens, find_window_layers
from litgpt.infer.compiled_forward import CompiledForward
from litgpt.infer.onednn import ReorderedMatrix, can_reorder, read_version, reorder_linear_layers
from litgpt.infer.packed_step import Chunk, run_packed
from litgpt.infer.requests import FinishReason, GeneratedToken, Request, check_prompt, check_tokens
from litgpt.infer.sampling import sample_rows
from litgpt.infer.sequences import Sequence
from litgpt.infer.speculative import Draft, Proposal, check_draft
from litgpt.model.gpt import GPT
from litgpt.model.tower_config import TowerShape

GROWTH = 64  # tokens after the prompt for which memory is reserved at first
MIN_PREFIX = 16  # tokens; shorter common prefixes are computed again


class Engine:
    """Generates texts with one model; a single thread may call it.

    Args:
        max_sequences: the maximum number of texts at a time; others wait.
        cache_tokens: the maximum number of tokens of all texts whose keys and values are in memory; None for
            `max_sequences` texts of the model's context.
        prefill_chunk: the maximum number of prompt tokens of one forward pass.
        reorder: multiply with weights in oneDNN's layout where it has a kernel, on a CPU: faster, and equal up to
            rounding; False for exactly the products of training, and without a second copy of the weights.
        draft: a small model with the same tokens, which proposes tokens; None for no speculative decoding.
        speculative_k: the number of tokens that it proposes in a step.
        forward: the forward pass of a model that is split over ranks (`litgpt.parallel.forward`), whose logits are the
            same on all ranks, which make the same calls; None for the model's own.
        compile: compile the blocks of the model; see `CompiledForward`. Nothing else may use the model meanwhile.

    Attributes:
        draft: the proposed and accepted tokens, or None.
    """

    def __init__(
        self,
        model: GPT,
        *,
        max_sequences: int = 32,
        cache_tokens: int | None = None,
        prefill_chunk: int = 512,
        reorder: bool = True,
        draft: GPT | None = None,
        speculative_k: int = 3,
        forward: Callable[..., Tensor] | None = None,
        compile: bool = False,
    ) -> None:
        self.model, self._forward, self._compiled = model, forward, CompiledForward(model) if compile else None
        if next(model.parameters()).device.type == "cpu":
            keep_freed_memory()
        self._head = ReorderedMatrix() if reorder and forward is None and can_reorder(model.output_weight) else None
        if reorder and not compile:  # frozen weights are reordered too
            reorder_linear_layers(model)
        self._versions: list[tuple[int, int]] = []
        self.max_sequences, self.prefill_chunk = max_sequences, prefill_chunk
        self._max_tokens = cache_tokens or max_sequences * model.config.block_size
        vision = model.config.vision  # the module is on the first stage of a pipeline only
        self._shape = None if vision is None else TowerShape.from_values(vision)
        block_tokens = 0 if self._shape is None else self._shape.count_block_tokens(model.config.block_size)
        self._windows = find_window_layers(model.config, max(prefill_chunk, speculative_k + 1, block_tokens))
        self.cache = self._build_cache()
        self.draft: Draft | None = None
        if draft is not None:
            check_draft(draft, model)
            self.draft = Draft(draft, proposed_tokens=speculative_k, max_tokens=self._max_tokens)
            if reorder:
                reorder_linear_layers(draft)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def running(self) -> int:
        """The number of texts with keys and values in memory."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """The number of texts that have not begun, or are put back."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether any text is not finished."""
        return bool(self._running or self._waiting)

    def submit(self, request: Request) -> Sequence:
        """Add a request to the queue.

        Raises:
            UserError: if prompt and new tokens exceed the model's context or the cache.
        """
        check_prompt(self.model, request.prompt, request.max_new_tokens, has_images=request.images is not None)
        if request.images is not None and self._forward is not None:
            raise UserError("image: not supported with a model that is split over devices; use litgpt generate")
        if request.prompt_logprobs is not None and self.model.config.has_prompt_blocks:
            raise UserError(
                f"prompt_logprobs: {request.prompt_logprobs} is not supported with a model whose tokens of a prompt "
                "attend to later ones; set None"
            )
        if bias := request.sampling.logit_bias:
            check_tokens("logit_bias", (min(bias), max(bias)), self.model.config.padded_vocab_size or 0)
        device = next(self.model.parameters()).device
        sequence = Sequence(request, device, shape=self._shape)
        if request.cached_tokens > self.cache.max_tokens:
            raise UserError(
                f"cache_tokens: {self.cache.max_tokens} is less than {request.cached_tokens}, the tokens of prompt and "
                f"text; set {request.cached_tokens} or more"
            )
        if not self.has_work:
            self._forget_other_weights()
        self._waiting.append(sequence)
        return sequence

    def _forget_other_weights(self) -> None:
        """Empty the cache if the weights have changed since it was filled."""
        versions = [read_version(parameter) for parameter in self.model.parameters()]
        if versions != self._versions:
            if self._versions and self._compiled is not None:
                self._compiled = CompiledForward(self.model)
            self.cache, self._versions = self._build_cache(), versions

    def _build_cache(self) -> BlockCache:
        """An empty cache; blocks of few texts, and of one finished text for each, are allocated a few at a time."""
        return BlockCache(self._max_tokens, min(SLAB_BLOCKS, 2 * self.max_sequences), windows=self._windows)

    def cancel(self, sequence: Sequence) -> None:
        """End a text and free its memory."""
        if sequence.finish_reason is None:
            self._finish(sequence, "cancelled")

    def run(self, requests: Iterable[Request]) -> list[Sequence]:
        """Generate the texts of all requests, in their order.

        Raises:
            UserError: if one has an error.
        """
        sequences = [self.submit(request) for request in requests]
        while any(sequence.finish_reason is None for sequence in sequences):
            self.step()
        for sequence in sequences:
            if sequence.error is not None:
                raise sequence.error
        return sequences

    def stream(self, request: Request) -> Iterator[GeneratedToken]:
        """Yield the tokens of one text as they are generated; it is cancelled if the iterator is closed."""
        sequence = self.submit(request)
        try:
            while sequence.finish_reason is None:
                for changed, token in self.step():
                    if changed is sequence:
                        yield token
            if sequence.error is not None:
                raise sequence.error
        finally:
            self.cancel(sequence)

    @torch.inference_mode()
    def step(self) -> list[tuple[Sequence, GeneratedToken]]:
        """Run one forward pass; the tokens that it generated.

        Raises:
            UserError: if logits are not finite.
        """
        self._admit()
        proposals = self._propose()
        chunks = self._plan(proposals)
        if not chunks:
            return []
        forward = self._compiled or self._forward
        logits = run_packed(self.model, list(chunks.values()), self.cache.slabs, head=self._head, forward=forward)
        rows: list[tuple[Sequence, Tensor]] = []
        changes: list[tuple[Sequence, GeneratedToken]] = []
        for (sequence, chunk), chunk_logits in zip(chunks.items(), logits, strict=True):
            if sequence.request.prompt_logprobs is not None and not sequence.tokens:
                self._record_prompt(sequence, chunk, chunk_logits)
            if sequence.computed > len(sequence.ids):
                changes += self._check_proposal(sequence, proposals[sequence], chunk_logits)
            elif sequence.computed == len(sequence.ids) and self._follows_constraint(sequence):
                rows.append((sequence, chunk_logits[-1]))
        return changes + self._sample(rows) if rows else changes

    def _admit(self) -> None:
        """Start waiting texts for which there is memory, in their order."""
        delayed: list[Sequence] = []
        while self._waiting and len(self._running) < self.max_sequences:
            sequence = self._waiting.popleft()
            if self._waits_for_prefix(sequence):
                delayed.append(sequence)
            elif not self._start(sequence):
                self._waiting.appendleft(sequence)
                break
            else:
                self._running.append(sequence)
        self._waiting.extendleft(reversed(delayed))

    def _waits_for_prefix(self, sequence: Sequence) -> bool:
        """Whether another text is about to compute a prefix of this one."""
        if sequence.request.prompt_logprobs is not None:
            return False
        known = self.cache.find_prefix(sequence.keys)[1]
        for other in self._running:
            common = min(count_common_tokens(other.keys, sequence.keys), len(other.keys) - 1)
            if common >= known + MIN_PREFIX and other.computed < min(common, len(other.request.prompt)):
                return True
        return False

    def _start(self, sequence: Sequence) -> bool:
        """Give a text memory, with the prefix that other texts have computed; whether there was enough."""
        reserved = sequence.request.cached_tokens if sequence.was_preempted else len(sequence.ids) + GROWTH
        reserved = min(reserved, sequence.request.cached_tokens)
        source, common = self.cache.find_prefix(sequence.keys)
        sequence.block = self.cache.allocate(reserved, source)
        if sequence.block is None and source in self.cache.kept:  # there is memory for only one of the two
            source, sequence.block = None, self.cache.allocate(reserved)
        if sequence.block is None:
            return False
        has_logprobs = sequence.request.prompt_logprobs is not None and not sequence.tokens
        if source is not None and common >= MIN_PREFIX and not has_logprobs and sequence.shares_blocks(source):
            self.cache.copy_prefix(source, sequence.block, common)
        return True

    def _propose(self) -> dict[Sequence, Proposal]:
        """Tokens that the draft proposes for texts whose prompts are processed, and which follow no grammar."""
        if self.draft is None:
            return {}
        texts = {
            id(sequence): (sequence.ids, sequence.row, sequence.request.max_new_tokens - len(sequence.tokens))
            for sequence in self._running
            if len(sequence.ids) - sequence.computed == 1 and sequence.request.constraint is None
        }
        proposals = self.draft.propose(texts)
        return {sequence: proposals[id(sequence)] for sequence in self._running if id(sequence) in proposals}

    def _check_proposal(
        self, sequence: Sequence, proposal: Proposal, logits_RV: Tensor
    ) -> list[tuple[Sequence, GeneratedToken]]:
        """Add the proposed tokens that are accepted to their text, and one more."""
        assert self.draft is not None and sequence.block is not None
        ids = self.draft.check(proposal, logits_RV, sequence.row)
        del sequence.block.ids[len(sequence.ids) + len(ids) - 1 :]
        tokens = list_logprobs(logits_RV[: len(ids)], ids, [sequence.request.logprobs or 0] * len(ids))
        changes = []
        for token in tokens:
            changes.append((sequence, self._append(sequence, token)))
            if sequence.finish_reason is not None:
                break
        return changes

    def _plan(self, proposals: Mapping[Sequence, Proposal]) -> dict[Sequence, Chunk]:
        """The tokens of the next forward pass: the last one of each text, and chunks of prompts."""
        chunks: dict[Sequence, Chunk] = {}
        budget = self.prefill_chunk
        for sequence in list(self._running):
            if sequence.block is None:  # put back for the memory of an earlier one
                continue
            missing = len(sequence.ids) - sequence.computed
            tokens = missing
            if missing > 1:
                is_first = budget == self.prefill_chunk
                tokens = sequence.limit_chunk(min(missing, budget), may_exceed=is_first)
            more = proposals[sequence].tokens if sequence in proposals else []
            if tokens == 0 or not self._reserve(sequence, sequence.computed + tokens + len(more)):
                continue
            budget -= min(tokens, budget) if missing > 1 else 0
            has_logprobs = sequence.request.prompt_logprobs is not None and not sequence.tokens
            chunks[sequence] = sequence.build_chunk(self.model, tokens, more, has_logprobs=has_logprobs)
        return {sequence: chunk for sequence, chunk in chunks.items() if sequence.block is not None}

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Make room for this many tokens of a text, if necessary by putting the latest ones back in the queue."""
        while True:
            block = sequence.block
            if block is None:
                return False
            if tokens <= block.slab.size or self.cache.move(
                block, min(tokens + GROWTH, sequence.request.cached_tokens)
            ):
                return True
            self._preempt(self._running[-1])

    def _preempt(self, sequence: Sequence) -> None:
        """Put a text back in the queue, before all others."""
        assert sequence.block is not None
        self.cache.free(sequence.block)
        sequence.block, sequence.was_preempted = None, True
        self._running.remove(sequence)
        self._waiting.appendleft(sequence)

    def _follows_constraint(self, sequence: Sequence) -> bool:
        """Whether the constraint of a text allows a token; otherwise it ends, and other texts go on."""
        try:
            if sequence.request.constraint is not None:
                sequence.request.constraint.allowed()
        except UserError as error:
            sequence.error = error
            self._finish(sequence, "cancelled")
        return sequence.error is None

    def _record_prompt(self, sequence: Sequence, chunk: Chunk, logits_RV: Tensor) -> None:
        """Record the log-probabilities of the prompt's tokens after those of a chunk."""
        targets = sequence.ids[sequence.computed - len(chunk.ids) + 1 : sequence.computed + 1]
        top = sequence.request.prompt_logprobs or 0
        sequence.prompt_logprobs += list_logprobs(logits_RV[: len(targets)], targets, [top] * len(targets))

    def _sample(self, rows: list[tuple[Sequence, Tensor]]) -> list[tuple[Sequence, GeneratedToken]]:
        """Sample one token for each text, and end the texts whose last it is."""
        sequences = [sequence for sequence, _ in rows]
        logits_RV = torch.stack([row for _, row in rows])
        ids = sample_rows(logits_RV, [sequence.row for sequence in sequences]).tolist()
        tops = [sequence.request.logprobs for sequence in sequences]
        if any(top is not None for top in tops):
            tokens = list_logprobs(logits_RV, ids, [top or 0 for top in tops])
        else:
            tokens = [GeneratedToken(token) for token in ids]
        return [(sequence, self._append(sequence, token)) for sequence, token in zip(sequences, tokens, strict=True)]

    def _append(self, sequence: Sequence, token: GeneratedToken) -> GeneratedToken:
        """Add a generated token to its text; the same token with the reason if it is the last."""
        request, number = sequence.request, token.token
        reason: FinishReason | None = None
        if number in request.stop_tokens:
            reason = "stop"
        elif len(sequence.tokens) + 1 == request.max_new_tokens:
            reason = "length"
        if request.logprobs is None:
            token = GeneratedToken(number, finish_reason=reason)
        else:
            token = GeneratedToken(number, token.logprob, token.top, reason)
        sequence.append(token)
        if request.constraint is not None:
            request.constraint.accept(number)
        if reason is not None:
            self._finish(sequence, reason)
        return token

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a text; its block is kept for texts with the same prefix."""
        sequence.finish_reason = reason
        sequence.release()
        if self.draft is not None:
            self.draft.release(id(sequence))
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        if sequence.block is not None:
            self.cache.keep(sequence.block)
            sequence.block = None


def list_logprobs(logits_RV: Tensor, ids: list[int], tops: list[int]) -> list[GeneratedToken]:
    """Tokens with their log-probabilities, and with as many of the most likely tokens as `tops` says."""
    logprobs_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)).log_softmax(-1)
    chosen = logprobs_RV.gather(-1, torch.tensor(ids, device=logits_RV.device)[:, None])[:, 0].tolist()
    best = logprobs_RV.topk(max(tops, default=0), -1)
    pairs = zip(ids, chosen, tops, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        GeneratedToken(token, logprob, tuple(zip(tokens[:top], values[:top], strict=True)))
        for token, logprob, top, tokens, values in pairs
    ]
