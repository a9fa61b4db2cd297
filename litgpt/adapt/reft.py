"""LoReFT: hidden states edited in a low-rank subspace after each block (Wu et al. 2024)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.adapt.layers import AdaptedLayer, InitValues, add_parameter, own_parameter, upcast
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.init import seeded_generator
from litgpt.model.surgery import add_mixin
from litgpt.recipe.tuner import ReFT


class ReFTBlock(AdaptedLayer):
    """A block whose output h becomes h + R^T (W h + b - R h) at every position.

    Its added parameters are `reft_basis` (r, D), whose orthonormalized rows are R, `reft_weight` (r, D) and
    `reft_bias` (r,).
    """

    reft_dropout: float
    merge_error = "edits of hidden states cannot be expressed in the base's weights"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The block's output with its edit; (B, T, D) -> (B, T, D)."""
        hidden = super().forward(*args, **kwargs)
        if not self.adapter_on:
            return hidden
        basis, weight, bias = (own_parameter(self, key) for key in ("reft_basis", "reft_weight", "reft_bias"))
        rows = orthonormalize(basis)
        inputs = hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(weight.dtype)
        rows = rows.to(weight.dtype)
        edit = F.linear(F.linear(inputs, weight, bias) - F.linear(inputs, rows), rows.mT)
        return hidden + F.dropout(edit, self.reft_dropout, self.training).to(hidden.dtype)

    def init_values(self, _settings: ReFT, seed: str) -> InitValues:
        """W starts as R, so that nothing is edited."""
        basis = torch.empty(own_parameter(self, "reft_basis").shape)
        basis.normal_(generator=seeded_generator(f"{seed}/reft_basis"))
        yield "reft_basis", basis
        yield "reft_weight", orthonormalize(basis)
        yield "reft_bias", torch.zeros(own_parameter(self, "reft_bias").shape)


def orthonormalize(rows: Tensor) -> Tensor:
    """Orthonormal rows (r, D) with the same span, in float32 or wider."""
    with torch.autocast(rows.device.type, enabled=False):
        return torch.linalg.qr(upcast(rows).mT)[0].mT


def attach_reft(model: GPT, settings: ReFT) -> None:
    """Edit the output of the blocks that the settings list, by default of all.

    Raises:
        UserError: if a block does not exist, or the rank exceeds the model's width.
    """
    config = model.config
    layers = range(config.n_layer) if settings.layers is None else settings.layers
    if wrong := [layer for layer in layers if not 0 <= layer < config.n_layer]:
        raise UserError(f"tuner.layers: {wrong[0]} is not a block; set numbers from 0 to {config.n_layer - 1}")
    if settings.r > config.n_embd:
        raise UserError(f"tuner.r: {settings.r} is more than the model's width; set at most {config.n_embd}")
    rows = (settings.r, config.n_embd)
    for block in (model.blocks[layer] for layer in layers):
        for key, shape in {"reft_basis": rows, "reft_weight": rows, "reft_bias": rows[:1]}.items():
            add_parameter(block, key, shape, model.embedding.weight)
        block.reft_dropout = settings.dropout  # type: ignore[assignment]
        add_mixin(block, ReFTBlock)
