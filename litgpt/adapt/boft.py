"""BOFT: the inputs of a layer are rotated by a product of sparse orthogonal matrices (Liu et al. 2024)."""

import torch
from torch import Tensor, nn

from litgpt.adapt.layers import AdaptedLayer, InitValues, add_parameter, gather_value, own_parameter, upcast
from litgpt.adapt.targets import find_linears, get_module_aliases
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.surgery import add_mixin
from litgpt.recipe.tuner import BOFT


class BOFTLinear(AdaptedLayer):
    """A linear layer that computes scale * (W Q x) + b, where Q is a product of block-diagonal rotations.

    Its added parameters are `boft_r` (factors, blocks, size, size), whose skew-symmetric part defines the rotations,
    and `boft_scale` (out,).
    """

    @classmethod
    def from_linear(cls, layer: nn.Linear, name: str, settings: BOFT) -> None:
        """Convert a layer in place.

        Raises:
            UserError: if its number of inputs is not divisible by the size of the blocks that the factors mix.
        """
        weight = own_parameter(layer, "weight")
        columns = layer.in_features
        factors = settings.butterfly_factors
        tiles = settings.block_size * 2 ** (factors - 1)
        if columns % tiles or (factors > 1 and settings.block_size % 2):
            raise UserError(
                f"tuner.block_size: {settings.block_size} with {factors} factors does not tile the {columns} inputs of "
                f"{name}; set an even divisor, or use another target"
            )
        shape = (factors, columns // settings.block_size, settings.block_size, settings.block_size)
        add_parameter(layer, "boft_r", shape, weight)
        add_parameter(layer, "boft_scale", (layer.out_features,), weight)
        add_mixin(layer, cls)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer with rotated inputs; (..., in) -> (..., out)."""
        if not self.adapter_on:
            return super().forward(x)
        y = super().forward(x @ build_rotation(own_parameter(self, "boft_r")).to(x.dtype))
        scale, bias = own_parameter(self, "boft_scale"), self.bias
        return (y * scale if bias is None else (y - bias) * scale + bias).to(y.dtype)

    def merge_parameter(self, name: str) -> Tensor:
        """The rotated and scaled weight; the bias is the base's."""
        value = super().merge_parameter(name)
        if name != "weight":
            return value
        factors, scale = (gather_value(self, key) for key in ("boft_r", "boft_scale"))
        return (value @ build_rotation(factors).to(value.dtype).mT) * scale[:, None]

    def init_values(self, _settings: BOFT, _seed: str) -> InitValues:
        """Q is the identity and all scales are one."""
        yield "boft_r", torch.zeros(own_parameter(self, "boft_r").shape)
        yield "boft_scale", torch.ones(own_parameter(self, "boft_scale").shape)


def build_rotation(r_FNSS: Tensor) -> Tensor:
    """The orthogonal matrix (in, in), in float32 or wider: the last factor times ... times the first.

    Each factor is block-diagonal with the Cayley transforms (I - K)(I + K)^-1 of skew-symmetric K, permuted so that
    factor number i mixes 2^i neighbouring blocks.
    """
    with torch.autocast(r_FNSS.device.type, enabled=False):
        skew = upcast(r_FNSS - r_FNSS.mT) / 2
        identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        blocks_FNSS = torch.linalg.solve(identity + skew, identity - skew, left=False)
        product = None
        for number, blocks in enumerate(blocks_FNSS):
            matrix = torch.block_diag(*blocks)
            order = build_butterfly_order(blocks.shape[0], blocks.shape[1], number).to(matrix.device)
            matrix = matrix[order][:, order]
            product = matrix if product is None else matrix @ product
        assert product is not None
        return product


def build_butterfly_order(blocks: int, size: int, number: int) -> Tensor:
    """The order of inputs (blocks * size,) for factor `number`: half-blocks of 2^number neighbours, even before odd."""
    half = size // 2 or 1
    order = torch.arange(blocks * size)
    if not number:
        return order
    return order.view(blocks >> number, -1, 2, half).transpose(1, 2).flatten()


def attach_boft(model: GPT, settings: BOFT) -> None:
    """Add rotations to the layers that the settings name.

    Raises:
        UserError: if a name matches no linear layer, or the blocks do not tile a layer's inputs.
    """
    for name, layer in find_linears(model, get_module_aliases(model), settings.target_modules):
        BOFTLinear.from_linear(layer, name, settings)
