"""Bone, now MiSS: one trained block is added to all shards of a matrix (Kang and Yin 2024, arXiv 2409.15371)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.adapt.layers import AdaptedLayer, InitValues, add_parameter, gather_value, own_parameter
from litgpt.adapt.targets import find_linears, get_module_aliases
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.surgery import add_mixin
from litgpt.recipe.tuner import Bone


class BoneLinear(AdaptedLayer):
    """A linear layer whose matrix W (out, in) is divided along its inputs into shards of r columns.

    Its added parameter is `bone_block`: (r, out), whose transpose is added to every shard; (r, mini_r) with `mini`, of
    which copies side by side are (r, out); with `bat` (out / r, r, r), one B for each row of square blocks, of which
    each becomes W_block + W_block B + B.
    """

    bone_dropout: float
    bone_variant: str
    in_features: int
    out_features: int
    bias: Tensor | None

    @classmethod
    def from_linear(cls, layer: nn.Linear, name: str, settings: Bone) -> None:
        """Convert a layer in place.

        Raises:
            UserError: if its sizes are not divisible as the variant needs.
        """
        r, rows, columns = settings.r, layer.out_features, layer.in_features
        if r > columns:
            raise UserError(f"tuner.r: {r} is more than the {columns} inputs of {name}; set at most {columns}")
        if settings.variant == "bat" and (rows % r or columns % r):
            raise UserError(f"tuner.r: {r} does not divide {name} ({rows}, {columns}); set a common divisor for bat")
        if settings.variant == "mini" and rows % settings.mini_r:
            raise UserError(f"tuner.mini_r: {settings.mini_r} does not divide the {rows} outputs of {name}; set 1")
        shapes = {"bone": (r, rows), "mini": (r, settings.mini_r), "bat": (rows // r, r, r)}
        add_parameter(layer, "bone_block", shapes[settings.variant], own_parameter(layer, "weight"))
        layer.bone_dropout, layer.bone_variant = settings.dropout, settings.variant  # type: ignore[assignment]
        add_mixin(layer, cls)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer with the changed matrix; (..., in) -> (..., out)."""
        if not self.adapter_on:
            return super().forward(x)
        block = own_parameter(self, "bone_block")
        if self.bone_variant == "bat":
            weight = self.base_parameter("weight")
            return F.linear(x, weight + change_square_blocks(weight, block.to(weight.dtype)), self.bias)
        y = super().forward(x)
        inputs = F.dropout(x, self.bone_dropout, self.training)
        inputs = inputs if torch.is_autocast_enabled(x.device.type) else inputs.to(block.dtype)
        inputs = F.pad(inputs, (0, -self.in_features % len(block)))
        return y + (inputs.unflatten(-1, (-1, len(block))).sum(-2) @ self.repeat_block(block)).to(y.dtype)

    def repeat_block(self, block: Tensor) -> Tensor:
        """Copies of the block side by side, (r, out); one unless the variant is `mini`."""
        return block.repeat(1, self.out_features // block.shape[1])

    def merge_parameter(self, name: str) -> Tensor:
        """The changed matrix; the bias is the base's."""
        value = super().merge_parameter(name)
        if name != "weight":
            return value
        block = gather_value(self, "bone_block").to(value.dtype)
        if self.bone_variant == "bat":
            return value + change_square_blocks(value, block)
        shards = -(-self.in_features // len(block))
        return value + self.repeat_block(block).mT.repeat(1, shards)[:, : self.in_features]

    def init_values(self, _settings: Bone, _seed: str) -> InitValues:
        """Zeros, so the layer starts as the base's."""
        yield "bone_block", torch.zeros(own_parameter(self, "bone_block").shape)


def change_square_blocks(weight: Tensor, block_NRR: Tensor) -> Tensor:
    """The change W B + B of every square block (r, r) of a matrix (out, in), where B is that of its rows."""
    r = block_NRR.shape[-1]
    blocks_MNRR = weight.unflatten(1, (-1, r)).unflatten(0, (-1, r)).permute(2, 0, 1, 3)
    return (blocks_MNRR @ block_NRR + block_NRR).permute(1, 2, 0, 3).reshape(weight.shape)


def attach_bone(model: GPT, settings: Bone) -> None:
    """Add a block to the layers that the settings name.

    Raises:
        UserError: if a name matches no linear layer, or the sizes of a layer are not divisible as the variant needs.
    """
    for name, layer in find_linears(model, get_module_aliases(model), settings.target_modules):
        BoneLinear.from_linear(layer, name, settings)
