"""BOFT: the inputs of a layer turned by a product of sparse orthogonal matrices (Liu et al. 2024)."""

import torch
from torch import Tensor

from litgpt.adapt.layers import Adapted, InitValues, add, shape_of, stored, whole, widened
from litgpt.adapt.targets import linears_of, modules_known_as
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.surgery import add_mixin
from litgpt.recipe.tuner import BOFT


class BOFTLinear(Adapted):
    """A linear layer that is scale * (W Q x) + b, Q a product of rotations in blocks.

    Its added parameters are `boft_r` (factors, blocks, size, size), of which the skew-symmetric part makes the
    rotations, and `boft_scale` (out,).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.adapter_on:
            return super().forward(x)
        y = super().forward(x @ rotation(stored(self, "boft_r")).to(x.dtype))
        scale, bias = stored(self, "boft_scale"), self.bias
        return (y * scale if bias is None else (y - bias) * scale + bias).to(y.dtype)

    def merged(self, name: str) -> Tensor:
        value = super().merged(name)
        if name != "weight":
            return value
        turn, scale = (widened(whole(stored(self, key))) for key in ("boft_r", "boft_scale"))
        return (value @ rotation(turn).to(value.dtype).mT) * scale[:, None]

    def init_values(self, settings: BOFT, seed: str) -> InitValues:
        yield from super().init_values(settings, seed)
        yield "boft_r", torch.zeros(stored(self, "boft_r").shape)
        yield "boft_scale", torch.ones(stored(self, "boft_scale").shape)


def rotation(r_FNSS: Tensor) -> Tensor:
    """The orthogonal matrix (in, in), in float32 at least: the last factor times ... times the first.

    Each factor is block-diagonal with the Cayley transforms (I - K)(I + K)^-1 of skew-symmetric K, after a shuffle that
    lets factor number i mix 2^i neighbouring blocks.
    """
    with torch.autocast(r_FNSS.device.type, enabled=False):
        skew = widened(r_FNSS - r_FNSS.mT) / 2
        one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        blocks_FNSS = torch.linalg.solve(one + skew, one - skew, left=False)
        product = None
        for number, blocks in enumerate(blocks_FNSS):
            matrix = torch.block_diag(*blocks)
            order = shuffle(blocks.shape[0], blocks.shape[1], number).to(matrix.device)
            matrix = matrix[order][:, order]
            product = matrix if product is None else matrix @ product
        assert product is not None
        return product


def shuffle(blocks: int, size: int, number: int) -> Tensor:
    """The order of inputs for factor `number`: half-blocks of 2^number neighbours, even ones before odd ones."""
    half = size // 2 or 1
    order = torch.arange(blocks * size)
    if not number:
        return order
    return order.view(blocks >> number, -1, 2, half).transpose(1, 2).flatten()


def attach(model: GPT, settings: BOFT) -> None:
    """Turn the inputs of the layers that the settings name.

    Raises:
        UserError: for a name that stands for nothing or no linear layer, or a width that the blocks do not tile.
    """
    for name, layer in linears_of(model, modules_known_as(model), settings.target_modules):
        weight = stored(layer, "weight")
        rows, columns = shape_of(layer, "weight")
        factors = settings.butterfly_factors
        tiles = settings.block_size * 2 ** (factors - 1)
        if columns % tiles or (factors > 1 and settings.block_size % 2):
            raise UserError(
                f"tuner.block_size: {settings.block_size} with {factors} factors does not tile the {columns} inputs of "
                f"{name}; give an even divisor, or another target"
            )
        add(layer, "boft_r", (factors, columns // settings.block_size, *[settings.block_size] * 2), weight)
        add(layer, "boft_scale", (rows,), weight)
        add_mixin(layer, BOFTLinear)
