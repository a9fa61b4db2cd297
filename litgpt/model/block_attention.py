"""Attention on accelerators that skips what a mask rules out: no (T, U) tensor of it, nor of the scores, is made.

By torch's FlexAttention (Dong et al. 2024), compiled; its backward pass is for accelerators only. On a CPU the forward
pass runs uncompiled, which is how it is held against other attention; on a GPU it was not run.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from litgpt.model.config import Config


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a kernel of its own; without that it makes what it should not."""
    return torch.compile(function, dynamic=True)


def kernel(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function as it runs best: within compiled code, and on a CPU, it is left as it is."""
    return function if device.type == "cpu" or torch.compiler.is_compiling() else compiled(function)


def blocks_of(
    config: Config, positions: Tensor, documents_BT: Tensor | None, queries: range, *, window: int | None
) -> BlockMask:
    """Which blocks of keys the queries at these places may see; arguments as `attention.mask_of` has them.

    Args:
        window: of the kind of layer, None for none.
    """
    chunks = None if window is None or config.window_type == "sliding" else positions // window
    in_rows = [one for one in (documents_BT, chunks) if one is not None and one.dim() > 1]

    def may_see(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = query + queries.start
        seen = place >= key
        if chunks is not None:
            chunk = chunks[row] if chunks.dim() > 1 else chunks
            seen = seen & (chunk[place] == chunk[key])
        elif window is not None:
            seen = seen & (place - key < window)
        return seen if documents_BT is None else seen & (documents_BT[row, place] == documents_BT[row, key])

    make = kernel(create_block_mask, positions.device)
    return make(
        may_see, len(in_rows[0]) if in_rows else None, None, len(queries), queries.stop, device=positions.device
    )


def attend_in_blocks(
    q_BHTS: Tensor,
    k_BKUS: Tensor,
    v_BKUS: Tensor,
    *,
    blocks: BlockMask,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """What `attention.attend` computes, (B, H, T, S of the values), by a mask of blocks."""

    def capped(score: Tensor, *places: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    found, told = kernel(flex_attention, q_BHTS.device)(
        q_BHTS,
        k_BKUS,
        v_BKUS,
        score_mod=None if softcap is None else capped,
        block_mask=blocks,
        scale=scale,
        enable_gqa=q_BHTS.shape[1] != k_BKUS.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if sinks is None:
        return found
    share = torch.sigmoid(told.lse - sinks.to(told.lse.dtype)[None, :, None])  # of all but the sink
    return (found * share.unsqueeze(-1)).to(found.dtype)
