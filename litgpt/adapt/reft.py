"""LoReFT: hidden states edited in a subspace of low rank after each block (Wu et al. 2024)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.adapt.layers import Adapted, InitValues, add, generator, stored, widened
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.surgery import add_mixin
from litgpt.recipe.tuner import ReFT


class ReFTBlock(Adapted):
    """A block whose output h becomes h + R^T (W h + b - R h) at every position.

    Its added parameters are `reft_basis` (r, D), whose rows made orthonormal are R, `reft_weight` (r, D) and
    `reft_bias` (r,).
    """

    reft_dropout: float

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        h = super().forward(*arguments, **named)
        if not self.adapter_on:
            return h
        basis, weight, bias = (stored(self, key) for key in ("reft_basis", "reft_weight", "reft_bias"))
        rows = orthonormal(basis)
        seen = h if torch.is_autocast_enabled(h.device.type) else h.to(weight.dtype)
        rows = rows.to(weight.dtype)
        edit = F.linear(F.linear(seen, weight, bias) - F.linear(seen, rows), rows.mT)
        return h + F.dropout(edit, self.reft_dropout, self.training).to(h.dtype)

    def refusal(self) -> str:
        """What it does to hidden states is no part of any weight."""
        return "its edits of hidden states have no place in the base's shape"

    def init_values(self, settings: ReFT, seed: str) -> InitValues:
        """W starts as R, so that nothing is edited."""
        yield from super().init_values(settings, seed)
        basis = torch.empty(stored(self, "reft_basis").shape).normal_(generator=generator(f"{seed}/reft_basis"))
        yield "reft_basis", basis
        yield "reft_weight", orthonormal(basis)
        yield "reft_bias", torch.zeros(stored(self, "reft_bias").shape)


def orthonormal(rows: Tensor) -> Tensor:
    """Rows (r, D) of length one, at right angles, that span what the given ones span; in float32 at least."""
    with torch.autocast(rows.device.type, enabled=False):
        return torch.linalg.qr(widened(rows).mT)[0].mT


def attach(model: GPT, settings: ReFT) -> None:
    """Edit the output of the blocks that the settings number; of all, unless told.

    Raises:
        UserError: for a block that is not there, or a rank above the width.
    """
    config = model.config
    layers = range(config.n_layer) if settings.layers is None else settings.layers
    if wrong := [layer for layer in layers if not 0 <= layer < config.n_layer]:
        raise UserError(f"tuner.layers: {wrong[0]} is no block; give numbers from 0 to {config.n_layer - 1}")
    if settings.r > config.n_embd:
        raise UserError(f"tuner.r: {settings.r} is more than the model's width; give at most {config.n_embd}")
    for layer in layers:
        block = model.blocks[layer]
        for key, shape in (("reft_basis", (settings.r, config.n_embd)), ("reft_weight", (settings.r, config.n_embd))):
            add(block, key, shape, model.embedding.weight)
        add(block, "reft_bias", (settings.r,), model.embedding.weight)
        block.reft_dropout = settings.dropout  # type: ignore[assignment]
        add_mixin(block, ReFTBlock)
