"""Matrix products in FP8: the three of a layer, y = x W^T, dx = dy W and dW = dy^T x, with scaled operands of 8 bits.

A recipe says which values share a scale. Products run on FP8 hardware through torchao; elsewhere they are emulated:
operands are rounded to FP8 and multiplied in float32.

Axes: R rows (tokens), I inputs, O outputs of a layer, E experts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.model.moe import Experts, select_bias
from litgpt.model.surgery import add_mixin
from litgpt.model.torchao import import_torchao
from litgpt.model.uncompiled import uncompiled

Product = Callable[[Tensor, Tensor], Tensor]
"""(R, I), (O, I) -> (R, O)"""
EXPERT_MATRICES = ("gate", "up", "down")
SIZE_UNITS = {"tensorwise": 16, "rowwise": 16, "delayed": 16, "mxfp8": 32, "blockwise": 128}
"""What the sizes of a layer are multiples of: the alignment of FP8 hardware, or the size of a block."""
FP8_BLOCK = 128  # DeepSeek-V3, section 3.3.2
CAPABILITIES = {
    **dict.fromkeys(("tensorwise", "delayed"), ((8, 9), (99, 0))),
    "rowwise": ((9, 0), (99, 0)),
    "blockwise": ((9, 0), (10, 0)),
    "mxfp8": ((10, 0), (99, 0)),
}
"""The CUDA capabilities with hardware for a recipe: from the first one, and below the second."""
MIN_AMAX = 1e-12  # torchao.float8.float8_utils.EPS


def is_emulated(recipe: str, device: torch.device) -> bool:
    """Whether a device has no hardware for a recipe."""
    low, high = CAPABILITIES[recipe]
    return device.type != "cuda" or not low <= torch.cuda.get_device_capability(device) < high


def import_float8(name: str) -> Any:
    """A module of torchao for products in FP8.

    Raises:
        UserError: if torchao is not installed.
    """
    return import_torchao(name, "fp8.recipe: products in FP8 need", "set fp8.recipe: null")


def build_product(recipe: str, formats: str, *, emulate: bool) -> Product:
    """The product of a recipe whose scales are computed from the operands themselves.

    Args:
        recipe: of `SIZE_UNITS`, except delayed.
        formats: e4m3 or hybrid.
        emulate: whether to multiply in float32.
    """
    if recipe == "mxfp8":
        kernels = import_float8("quantization.quantize_.common.kernel_preference").KernelPreference
        mode = import_float8("prototype.mx_formats.config").ScaleCalculationMode.RCEIL
        multiply = import_float8("prototype.moe_training.mxfp8_linear")._to_mxfp8_then_scaled_mm
        kernel = kernels.EMULATED if emulate else kernels.AUTO
        return partial(multiply, kernel_preference=kernel, scale_calculation_mode=mode)
    if recipe == "blockwise" and emulate:
        return EmulatedBlockwiseProduct.apply
    if recipe == "blockwise":
        multiply = import_float8("prototype.blockwise_fp8_training.linear").fp8_blockwise_mm.apply
        return lambda x_RI, weight_OI: multiply(x_RI, weight_OI, FP8_BLOCK, x_RI.dtype)
    config = build_float8_config(recipe, formats, emulate=emulate)
    multiply = import_float8("float8.float8_linear").matmul_with_hp_or_float8_args.apply
    mm_config = build_mm_config(config)
    return lambda x_RI, weight_OI: multiply(x_RI, weight_OI.t(), mm_config, config)


def build_float8_config(recipe: str, formats: str, *, emulate: bool) -> Any:
    """torchao's config of the recipes tensorwise and rowwise, with the types of `formats`."""
    module = import_float8("float8.config")
    granularity = {"tensorwise": "TENSORWISE", "rowwise": "AXISWISE"}[recipe]
    scaling = {"scaling_granularity": module.ScalingGranularity[granularity]}
    gradient = module.e5m2_dtype if formats == "hybrid" else module.e4m3_dtype
    return module.Float8LinearConfig(
        cast_config_input=module.CastConfig(**scaling, target_dtype=module.e4m3_dtype),
        cast_config_weight=module.CastConfig(**scaling, target_dtype=module.e4m3_dtype),
        cast_config_grad_output=module.CastConfig(**scaling, target_dtype=gradient),
        round_scales_to_power_of_2=recipe == "rowwise",
        emulate=emulate,
    )


def build_mm_config(config: Any) -> Any:
    """The settings of a layer's three products: output, gradient of the input, gradient of the weight."""
    module = import_float8("float8.float8_training_tensor")
    gemms = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
    settings = [module.ScaledMMConfig(config.emulate, gemm.use_fast_accum, False, False) for gemm in gemms]
    return module.LinearMMConfig(*settings)


def round_to_blocks(x: Tensor, block: tuple[int, int]) -> Tensor:
    """A matrix rounded to e4m3 with a scale amax / 448 for each block (DeepSeek-V3, section 3.3.2), in float32."""
    blocks = x.float().unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    scale = blocks.abs().amax((1, 3), keepdim=True).clamp(min=MIN_AMAX) / torch.finfo(torch.float8_e4m3fn).max
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).view(x.shape)


class EmulatedBlockwiseProduct(torch.autograd.Function):
    """The product with blocks along the summed dim: of 1x128 for activations and gradients, of 128x128 for weights."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_RI, weight_OI)
        y_RO = round_to_blocks(x_RI, (1, FP8_BLOCK)) @ round_to_blocks(weight_OI, (FP8_BLOCK, FP8_BLOCK)).t()
        return y_RO.to(x_RI.dtype)

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor]:
        x_RI, weight_OI = ctx.saved_tensors
        grad_RI = round_to_blocks(grad_RO, (1, FP8_BLOCK)) @ round_to_blocks(weight_OI, (FP8_BLOCK, FP8_BLOCK))
        grad_OI = round_to_blocks(grad_RO, (FP8_BLOCK, 1)).t() @ round_to_blocks(x_RI, (FP8_BLOCK, 1))
        return grad_RI.to(x_RI.dtype), grad_OI.to(weight_OI.dtype)


def multiply_rows(x: Tensor, weight_OI: Tensor, product: Product, unit: int) -> Tensor:
    """(..., I), (O, I) -> (..., O), in autocast's dtype if enabled; rows are padded to a multiple of `unit`."""
    kind = x.device.type
    x_RI = x.flatten(0, -2)
    if torch.is_autocast_enabled(kind):
        x_RI = x_RI.to(torch.get_autocast_dtype(kind))
    rows = len(x_RI)
    x_RI = F.pad(x_RI, (0, 0, 0, -rows % unit)).contiguous()
    with torch.autocast(kind, enabled=False):
        y_RO = product(x_RI, weight_OI if weight_OI.dtype == x_RI.dtype else weight_OI.to(x_RI.dtype))
    return y_RO[:rows].unflatten(0, x.shape[:-1])


@uncompiled  # the numbers of rows are read from the device
def multiply_groups(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, product: Product, unit: int) -> Tensor:
    """(R, I), (E, O, I) -> (R, O): the rows of each expert with its matrix, scaled apart."""
    outputs = []
    for rows_RI, weight_OI in zip(split_by_expert(x_RI, ends_E), weight_EOI.unbind(), strict=True):
        outputs.append(multiply_rows(rows_RI, weight_OI, product, unit) if len(rows_RI) else rows_RI @ weight_OI.t())
    return torch.cat(outputs)


def split_by_expert(x_RI: Tensor, ends_E: Tensor) -> Sequence[Tensor]:
    """The rows of each expert."""
    return [x_RI[start:end] for start, end in pairwise([0, *ends_E.tolist()])]


class FP8Linear(nn.Module):
    """The class of `nn.Linear` with its product in FP8, added to the layer's own."""

    fp8_product: Product
    fp8_unit: int

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight, bias = self.weight, self.bias
        assert isinstance(weight, Tensor)
        y = multiply_rows(x, weight, self.fp8_product, self.fp8_unit)
        return y if bias is None else y + bias.to(y.dtype)  # type: ignore[operator]


class FP8Experts(Experts):
    """The class of experts with products in FP8, added to their own."""

    fp8_products: dict[str, Product]
    fp8_unit: int

    def apply_matrix(self, name: str, x_RD: Tensor, ends_E: Tensor, *, add_bias: bool = True) -> Tensor:
        """x W^T + b with the matrix `name` of each row's expert, (R, O)."""
        y_RO = multiply_groups(x_RD, getattr(self, name), ends_E, self.fp8_products[name], self.fp8_unit)
        bias_EO = getattr(self, f"{name}_bias") if add_bias else None
        return y_RO if bias_EO is None else y_RO + select_bias(bias_EO, y_RO, ends_E)

    def project(self, x_RD: Tensor, ends_E: Tensor) -> list[Tensor]:
        """Gate and up projections, both (R, I), each with scales of its own."""
        return [self.apply_matrix(name, x_RD, ends_E) for name in ("gate", "up")]


def use_fp8(module: nn.Module, products: dict[str, Product], unit: int) -> None:
    """Let a module compute its products in FP8.

    Args:
        products: of a linear layer's `weight`, or of each matrix of experts.
    """
    module.fp8_unit = unit  # type: ignore[assignment]
    if isinstance(module, Experts):
        module.fp8_products = products  # type: ignore[assignment]
        add_mixin(module, FP8Experts)
    else:
        module.fp8_product = products["weight"]  # type: ignore[assignment]
        add_mixin(module, FP8Linear)
