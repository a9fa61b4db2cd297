"""Attention on accelerators that skips masked blocks: neither the (T, U) mask nor the scores are materialized.

Uses torch's FlexAttention (Dong et al. 2024), compiled; its backward pass runs on accelerators only. On a CPU the
forward pass runs uncompiled, which the tests compare with other attention; it has not been run on a GPU.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from litgpt.model.config import Config


@cache
def compile_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile the function as a separate kernel; uncompiled, it materializes the scores."""
    return torch.compile(function, dynamic=True)


def select_kernel(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function itself on a CPU and within compiled code, else a compiled kernel of it."""
    return function if device.type == "cpu" or torch.compiler.is_compiling() else compile_kernel(function)


def join_masks(config: Config, is_earlier: Tensor, same_block: Tensor | None, in_window: Tensor | None) -> Tensor:
    """Whether a query may attend to a key, given whether it is no later one, of the same block, and in the window.

    None for no blocks, or no window. A window limits attention within an image, but not within a prompt.
    """
    if same_block is not None and not config.has_prompt_blocks:
        is_earlier = is_earlier | same_block
    allowed = is_earlier if in_window is None else is_earlier & in_window
    return allowed | same_block if same_block is not None and config.has_prompt_blocks else allowed


def build_block_mask(
    config: Config,
    positions: Tensor,
    documents_BT: Tensor | None,
    queries: range,
    *,
    keys: int,
    window: int | None,
    blocks_BT: Tensor | None = None,
) -> BlockMask:
    """The mask of `attention_inputs.build_masks` as blocks.

    Args:
        keys: the number of keys.
        window: of the kind of layer, None for none.
        blocks_BT: as in `attention_inputs.build_attention_inputs`.
    """
    chunks = None if window is None or config.window_type == "sliding" else positions // window
    per_row = [numbers for numbers in (documents_BT, blocks_BT, chunks) if numbers is not None and numbers.dim() > 1]

    def is_allowed(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        index = query + queries.start
        same_block = in_window = None
        if blocks_BT is not None:
            block = blocks_BT[row, index]
            same_block = (block == blocks_BT[row, key]) & (block >= 0)
        if chunks is not None:
            chunk = chunks[row] if chunks.dim() > 1 else chunks
            in_window = chunk[index] == chunk[key]
        elif window is not None:
            in_window = index - key < window
        allowed = join_masks(config, index >= key, same_block, in_window)
        return allowed if documents_BT is None else allowed & (documents_BT[row, index] == documents_BT[row, key])

    create = select_kernel(create_block_mask, positions.device)
    rows = len(per_row[0]) if per_row else None
    return create(is_allowed, rows, None, len(queries), keys, device=positions.device)


def attend_blocks(
    q_BHTS: Tensor,
    k_BKUS: Tensor,
    v_BKUS: Tensor,
    *,
    mask: BlockMask,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`attention.attend` with a block mask, (B, H, T, S of the values)."""

    def cap_score(score: Tensor, *_indices: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    output, auxiliary = select_kernel(flex_attention, q_BHTS.device)(
        q_BHTS,
        k_BKUS,
        v_BKUS,
        score_mod=None if softcap is None else cap_score,
        block_mask=mask,
        scale=scale,
        enable_gqa=q_BHTS.shape[1] != k_BKUS.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if sinks is None:
        return output
    weight = torch.sigmoid(auxiliary.lse - sinks.to(auxiliary.lse.dtype)[None, :, None])  # of all keys but the sink
    return (output * weight.unsqueeze(-1)).to(output.dtype)
