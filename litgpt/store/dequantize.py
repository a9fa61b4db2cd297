"""Dequantize weights that are published in 8 or 4 bits: FP8 in blocks, and MXFP4."""

from pathlib import Path

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.files import read_json_object

FP8_SCALE = "_scale_inv"  # beside X.weight
MXFP4_BLOCKS, MXFP4_SCALES = "_blocks", "_scales"  # in place of X
DEFAULT_BLOCK = (128, 128)
# The values of the sixteen codes of E2M1 (OCP Microscaling Formats v1.0, section 5.3.3).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0_BIAS = 127
CHUNK = 1 << 22  # values that are held in float32 at once


def dequantize_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int] = DEFAULT_BLOCK) -> Tensor:
    """Multiply FP8 weights (out, in) by the scales of their blocks (DeepSeek-V3, section 3.3); returns bfloat16.

    Args:
        scale: (out / block[0], in / block[1]), rounded up.

    Raises:
        UserError: if there is not one scale for each block.
    """
    expected = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    if tuple(scale.shape) != expected:
        raise UserError(f"{list(scale.shape)} scales for {list(weight.shape)} weights in blocks of {list(block)}")
    values = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    if weight.is_meta:
        return values
    for number, rows in enumerate(weight.split(block[0])):
        columns = scale[number].float().repeat_interleave(block[1])[: weight.shape[1]]
        values[number * block[0] :][: len(rows)] = rows.float() * columns
    return values


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Dequantize packed MXFP4 to bfloat16 weights (experts, in, out), the layout in which gpt-oss computes.

    Args:
        blocks: uint8 (experts, out, groups, bytes); a byte holds two E2M1 codes, the low half first.
        scales: uint8 (experts, out, groups); a power of two with a bias of 127 for each group.

    Raises:
        UserError: if there is not one scale for each group.
    """
    if blocks.dim() != 4 or blocks.shape[:-1] != scales.shape:
        raise UserError(f"{list(scales.shape)} scales for {list(blocks.shape)} blocks")
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise UserError(f"MXFP4 of types {blocks.dtype} and {scales.dtype}; both are uint8")
    experts, rows, groups, size = blocks.shape
    table = torch.tensor(E2M1, dtype=torch.bfloat16)
    values = torch.empty(experts, rows, groups * size * 2, dtype=torch.bfloat16, device=blocks.device)
    if blocks.is_meta:
        return values.mT
    flat = values.view(-1, size, 2)
    packed, exponents = blocks.reshape(-1, size), scales.reshape(-1, 1, 1).int() - E8M0_BIAS
    step = max(1, CHUNK // (2 * size))
    for start in range(0, len(packed), step):
        chunk = slice(start, start + step)
        codes = torch.stack((packed[chunk] & 15, packed[chunk] >> 4), dim=-1)
        flat[chunk] = torch.ldexp(table[codes.int()], exponents[chunk])
    return values.mT


def read_block_size(folder: Path) -> tuple[int, int]:
    """Read the size of the blocks that share a scale from the folder's config.json; the default is 128 x 128."""
    settings = read_json_object(folder / "config.json").get("quantization_config")
    block = settings.get("weight_block_size") if isinstance(settings, dict) else None
    if block is None:
        return DEFAULT_BLOCK
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
        raise UserError(f"{folder / 'config.json'}: weight_block_size: {block!r}; two sizes such as [128, 128]")
    return block[0], block[1]
