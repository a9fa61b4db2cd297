"""Keep a model's matrices in 4 or 8 bits, by bitsandbytes; for writing text only."""

from typing import Any

import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.model.gpt import GPT

FOUR_BITS = {
    "bnb.nf4": ("nf4", False),
    "bnb.nf4-dq": ("nf4", True),
    "bnb.fp4": ("fp4", False),
    "bnb.fp4-dq": ("fp4", True),
}
"""By name: the four-bit numbers, and whether their scales are quantized too (Dettmers et al. 2023)."""
KINDS = (*FOUR_BITS, "bnb.int8")


def quantize(model: GPT, kind: str, device: torch.device) -> None:
    """Replace every linear layer of the blocks by a quantized one on `device`; embedding, norms and head stay.

    Raises:
        UserError: if `kind` is not known, bitsandbytes is missing, or the model has experts, which it cannot hold.
    """
    if kind not in KINDS:
        raise UserError(f"quantize: {kind!r} is not known; give {', '.join(KINDS)}")
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(
            f"quantize: {kind} needs the package bitsandbytes; `pip install litgpt[quantize]`, or null"
        ) from None
    if model.config.n_expert:
        raise UserError(f"quantize: {kind} has no place for experts; give null and precision: bf16-true")
    for parent in list(model.blocks.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:  # its quantized kinds are derived from it
                setattr(parent, name, quantized(layer, kind, device, bitsandbytes.nn))


def quantized(layer: nn.Linear, kind: str, device: torch.device, library: Any) -> nn.Module:
    """A linear layer whose matrix is quantized; products are computed in the type that it had."""
    sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
    if kind == "bnb.int8":
        new = library.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, threshold=6.0, device="meta")
        new.weight = library.Int8Params(layer.weight.detach(), requires_grad=False, has_fp16_weights=False)
    else:
        numbers, twice = FOUR_BITS[kind]
        settings = {"quant_type": numbers, "compress_statistics": twice}
        new = library.Linear4bit(*sizes, bias=bias, compute_dtype=layer.weight.dtype, device="meta", **settings)
        new.weight = library.Params4bit(layer.weight.detach(), requires_grad=False, **settings)
    new.bias = layer.bias
    return new.to(device)
