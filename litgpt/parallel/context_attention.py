"""Context parallelism: the tokens of each row are sharded over ranks, which communicate in attention only.

Axes: B batch, H heads, K key-value heads, T tokens of a row, P tokens of this rank, S numbers of a head.
"""

from collections.abc import Callable
from math import gcd

from torch import Tensor
from torch.distributed import ProcessGroup

from litgpt.errors import UserError
from litgpt.model.attention_inputs import AttentionInputs
from litgpt.parallel.collectives import all_gather, all_to_all, slice_local
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.model_sizes import check_context_heads
from litgpt.parallel.ring_attention import ALTERNATIVE, ring_attention
from litgpt.parallel.token_sharding import Attend, ContextAttention, HeadTailSharding, LocalTokens, VocabularyShard
from litgpt.recipe.parallel import ParallelArgs


class AllGatherAttention(ContextAttention):
    """Each rank gathers all keys and values during attention, for the queries of its own tokens."""

    def query_ranges(self, tokens: int) -> list[range]:
        """The positions of this rank's tokens."""
        return self.sharding.local_ranges(tokens)

    def __call__(self, attend: Attend, q_BHPS: Tensor, k_BKPS: Tensor, v_BKPS: Tensor, sinks: Tensor | None) -> Tensor:
        """Attention output of this rank's tokens, (B, H, P, S)."""
        shards = (all_gather(local, self.group, 2) for local in (k_BKPS, v_BKPS))
        return attend(q_BHPS, *(self.sharding.restore_order(x, 2) for x in shards), sinks=sinks)


class UlyssesAttention(ContextAttention):
    """Each rank has all tokens of some heads during attention (Jacobs et al. 2023, DeepSpeed Ulysses)."""

    def __call__(self, attend: Attend, q_BHPS: Tensor, k_BKPS: Tensor, v_BKPS: Tensor, sinks: Tensor | None) -> Tensor:
        """Attention output of this rank's tokens, (B, H, P, S).

        Raises:
            UserError: if the number of heads is not divisible by the number of ranks.
        """
        ranks = self.sharding.ranks
        check_context_heads(q_BHPS.shape[1], ranks)
        copies = ranks // gcd(k_BKPS.shape[1], ranks)
        k_BKPS, v_BKPS = (local.repeat_interleave(copies, dim=1) for local in (k_BKPS, v_BKPS))
        q, k, v = (self._all_to_all(local, 1, 2) for local in (q_BHPS, k_BKPS, v_BKPS))
        if sinks is not None:
            sinks = slice_local(sinks, self.group, 0)
        return self._all_to_all(attend(q, k, v, sinks=sinks), 2, 1)

    def _all_to_all(self, x: Tensor, split_dim: int, concat_dim: int) -> Tensor:
        """Turn a tensor that is sharded along `concat_dim` into one that is sharded along `split_dim`."""
        ones = [1] * self.sharding.ranks
        chunks = x.unflatten(split_dim, (len(ones), -1)).movedim(split_dim, 0)
        return all_to_all(chunks, self.group, ones, ones).movedim(0, concat_dim).flatten(concat_dim, concat_dim + 1)


class RingAttention(ContextAttention):
    """Each rank has the keys and values of one rank after the other, for the queries of its own tokens.

    No rank ever holds those of a whole row. Only causal attention over whole rows with a plain softmax is supported.
    """

    def check(self, inputs: AttentionInputs) -> None:
        """Allow only causal attention over whole rows.

        Raises:
            UserError: if rows hold several documents, or more tokens than a window.
        """
        segments = inputs.segments or ()
        masks = [mask for kinds in (inputs.masks, *(segment.masks for segment in segments)) for mask in kinds.values()]
        if len(segments) > 1 or any(mask is not None for mask in masks):
            raise UserError(
                "parallel.context_method: ring supports whole rows only, but some rows hold several documents, or more "
                f"tokens than a window; {ALTERNATIVE}"
            )

    def __call__(self, attend: Attend, q_BHPS: Tensor, k_BKPS: Tensor, v_BKPS: Tensor, _sinks: Tensor | None) -> Tensor:
        """Attention output of this rank's tokens, (B, H, P, S)."""
        return ring_attention(q_BHPS, k_BKPS, v_BKPS, self.group, attend.keywords["scale"])


ATTENTIONS: dict[str, Callable[[ProcessGroup, HeadTailSharding], ContextAttention]] = {
    "all-gather": AllGatherAttention,
    "ulysses": UlyssesAttention,
    "ring": RingAttention,
}


def build_local_tokens(mesh: Mesh, settings: ParallelArgs, vocabulary: VocabularyShard | None) -> LocalTokens:
    """The token sharding of a run.

    Args:
        vocabulary: the rows of the output matrix on this rank; None if it has all.
    """
    group, ranks = mesh.group("context"), mesh.dims.context
    sharding = HeadTailSharding(group, head_tail=settings.context_method != "ulysses")
    attention = ATTENTIONS[settings.context_method](group, sharding) if ranks > 1 else None
    multiple = (mesh.dims.tensor if settings.sequence else 1) * (2 * ranks if ranks > 1 else 1)
    return LocalTokens(group, sharding, attention, multiple=multiple, vocabulary=vocabulary)
