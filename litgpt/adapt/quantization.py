"""Matrices in 4 or 8 bits: a frozen base for training (QLoRA, Dettmers et al. 2023), and a whole model for inference.

For training, a quantized weight is stored in flat uint8 parameters, `weight` and its scales, which are sharded,
gathered and saved like any parameter; they are never cast. The weight is dequantized for each product, and again in
backward instead of being saved. For inference, the layers are those of bitsandbytes, which have fused kernels, and of
`weight_only.py`.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.adapt.layers import own_parameter
from litgpt.adapt.weight_only import Int4Linear, Int8Linear
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.init import Writer, copy_into
from litgpt.model.surgery import add_mixin
from litgpt.model.uncompiled import uncompiled

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale, if those are quantized too
QuantTensors = dict[str, Tensor]


@dataclass(frozen=True)
class QuantFormat:
    """A format for the quantized matrices of a base that is trained.

    Attributes:
        sizes: returns the number of bytes of each tensor of a quantized matrix, given its shape (out, in).
        quantize: returns the tensors of a quantized matrix, given the matrix in float32.
        dequantize: returns the matrix, given its tensors, shape and dtype.
    """

    sizes: Callable[[tuple[int, int]], dict[str, int]]
    quantize: Callable[[Tensor], QuantTensors]
    dequantize: Callable[[QuantTensors, tuple[int, int], torch.dtype], Tensor]


class QuantizedLinear(nn.Linear):
    """A linear layer whose frozen weight is quantized.

    Attributes:
        quant_tensors: the names of the weight's tensors.
        original_dtype: the type of the weight before it was quantized.
        slice_weight: selects this rank's part of the dequantized weight under tensor parallelism; None for all.
    """

    quant_format: QuantFormat
    quant_tensors: tuple[str, ...]
    original_dtype: torch.dtype
    slice_weight: Callable[[Tensor], Tensor] | None = None

    def dequantize_weight(self, gather: Callable[[Tensor], Tensor] = lambda x: x, dtype: Any = None) -> Tensor:
        """The weight (out, in); its tensors are passed through `gather` first."""
        tensors = (gather(own_parameter(self, name)) for name in self.quant_tensors)
        return self._dequantize(*tensors, dtype=dtype or self.original_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the dequantized weight, in the dtype of autocast if it is on; (..., in) -> (..., out)."""
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        tensors = (own_parameter(self, name) for name in self.quant_tensors)
        y = quantized_matmul(x, partial(self._dequantize_local, dtype=x.dtype), *tensors)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _dequantize(self, *tensors: Tensor, dtype: torch.dtype) -> Tensor:
        named = dict(zip(self.quant_tensors, tensors, strict=True))
        return self.quant_format.dequantize(named, (self.out_features, self.in_features), dtype)

    def _dequantize_local(self, *tensors: Tensor, dtype: torch.dtype) -> Tensor:
        weight = self._dequantize(*tensors, dtype=dtype)
        return weight if self.slice_weight is None else self.slice_weight(weight).contiguous()


class QuantizedMatmul(torch.autograd.Function):
    """x W^T that saves the quantized tensors of W for backward, not W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dequantize: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.dequantize = dequantize
        ctx.save_for_backward(*tensors)
        return F.linear(x, dequantize(*tensors))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ ctx.dequantize(*ctx.saved_tensors), *[None] * (1 + len(ctx.saved_tensors))


quantized_matmul = uncompiled(QuantizedMatmul.apply)  # the libraries' kernels cannot be traced
"""`QuantizedMatmul` with a graph break before and after it."""


def check_quantization(model: GPT, kind: str, kinds: Collection[str]) -> None:
    """Check that a model can be quantized to a format.

    Raises:
        UserError: if `kind` is not one of `kinds`, its package is missing, or the model has experts.
    """
    if kind not in kinds:
        raise UserError(f"quantize: {kind!r} is not known; set {', '.join(kinds)}")
    package = {"int8": None, "int4": None, "bnb.int8-training": None, "torchao.nf4": "torchao"}.get(
        kind, "bitsandbytes"
    )
    if package and find_spec(package) is None:
        raise UserError(
            f"quantize: {kind} needs {package}, which is not installed: pip install 'litgpt[quantize]', or set null"
        )
    if model.config.n_expert:
        raise UserError(f"quantize: {kind} is not supported with experts, which hold most weights; set null")


def quantize(model: GPT, kind: str) -> None:
    """Convert the linear layers of the blocks to quantized ones for training; embedding, norms and head stay.

    Call it before `adapt.attach`; the weights are uninitialized until `load_quantized`, which comes after both.

    Raises:
        UserError: as `check_quantization`.
    """
    check_quantization(model, kind, QUANT_FORMATS)
    quant_format = QUANT_FORMATS[kind]
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear):
            weight = own_parameter(layer, "weight")
            sizes = quant_format.sizes((layer.out_features, layer.in_features))
            for name, size in sizes.items():
                tensor = torch.empty(size, dtype=torch.uint8, device=weight.device)
                layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            add_mixin(layer, QuantizedLinear)
            layer.quant_format, layer.quant_tensors = quant_format, tuple(sizes)  # type: ignore[assignment]
            layer.original_dtype = weight.dtype  # type: ignore[assignment]


@torch.no_grad()
def load_quantized(
    model: GPT, tensors: Iterable[tuple[str, Tensor]], *, device: torch.device | None = None, write: Writer = copy_into
) -> None:
    """Load weights into a model, each quantized if its layer is; one at a time.

    Args:
        tensors: every parameter of the base in full, under our names.
        device: where to quantize; None for the device of each tensor.
        write: stores a full value into a parameter, which may be sharded.
    """
    layers = dict(model.named_modules())
    for name, tensor in tensors:
        owner, _, key = name.rpartition(".")
        layer = layers.get(owner)
        if layer is None or key not in layer._parameters:
            continue  # it belongs to another pipeline stage
        if isinstance(layer, QuantizedLinear) and key == "weight":
            quantized = layer.quant_format.quantize(tensor.to(device or tensor.device, torch.float32))
            for quant_name, value in quantized.items():
                write(own_parameter(layer, quant_name), value)
        else:
            write(own_parameter(layer, key), tensor)


def quantize_for_inference(model: GPT, kind: str, device: torch.device) -> None:
    """Replace the linear layers of the blocks by quantized ones on `device`; embedding, norms and head stay.

    Raises:
        UserError: as `check_quantization`.
    """
    check_quantization(model, kind, INFERENCE_KINDS)
    for parent in list(model.blocks.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:  # layers of bitsandbytes are subclasses
                setattr(parent, name, INFERENCE_KINDS[kind](layer).to(device))


def build_bnb_layer(layer: nn.Linear, kind: str) -> nn.Module:
    """A layer of bitsandbytes with the weights of `layer`, which computes in their type; quantized once it is moved."""
    from bitsandbytes import nn as bnb

    sizes, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
    quantized: nn.Module
    if kind in BNB_4BIT:
        settings = BNB_4BIT[kind]
        quantized = bnb.Linear4bit(*sizes, bias=has_bias, compute_dtype=layer.weight.dtype, device="meta", **settings)
        quantized.weight = bnb.Params4bit(layer.weight.detach(), requires_grad=False, **settings)
    else:
        quantized = bnb.Linear8bitLt(*sizes, bias=has_bias, has_fp16_weights=False, threshold=6.0, device="meta")
        quantized.weight = bnb.Int8Params(layer.weight.detach(), requires_grad=False, has_fp16_weights=False)
    quantized.bias = layer.bias
    return quantized


def view_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, flat."""
    return tensor.new_empty(tensor.numel()).copy_(tensor.detach().reshape(-1)).view(torch.uint8)


def view_numbers(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Flat bytes as numbers of a type."""
    return tensor.contiguous().view(dtype)


def ceil_div(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)


def size_bnb_4bit(shape: tuple[int, int], *, compress_statistics: bool, **_: Any) -> dict[str, int]:
    """Half a byte per weight, and per 64 weights a scale of 4 bytes, or of one byte and a 256th of 4 bytes."""
    count = shape[0] * shape[1]
    blocks = ceil_div(count, BLOCK)
    if not compress_statistics:
        return {"weight": ceil_div(count, 2), "weight_scale": 4 * blocks}
    scales = {"weight_scale": blocks, "weight_scale_scale": 4 * ceil_div(blocks, SCALE_BLOCK), "weight_offset": 4}
    return {"weight": ceil_div(count, 2), **scales}


def quantize_bnb_4bit(weight: Tensor, **settings: Any) -> QuantTensors:
    """Quantize with bitsandbytes."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight.contiguous(), blocksize=BLOCK, **settings)
    tensors = {"weight": codes.reshape(-1), "weight_scale": view_bytes(state.absmax)}
    if state.nested:
        tensors |= {"weight_scale_scale": view_bytes(state.state2.absmax), "weight_offset": view_bytes(state.offset)}
    return tensors


def dequantize_bnb_4bit(
    tensors: QuantTensors, shape: tuple[int, int], dtype: torch.dtype, *, quant_type: str, compress_statistics: bool
) -> Tensor:
    """Dequantize with bitsandbytes, which supports float32, float16 and bfloat16."""
    from bitsandbytes import functional

    codes, scale = tensors["weight"], tensors["weight_scale"]
    nested = {}
    if compress_statistics:
        scales = functional.QuantState(
            absmax=view_numbers(tensors["weight_scale_scale"]),
            code=get_bnb_code("dynamic", codes.device),
            blocksize=SCALE_BLOCK,
            dtype=torch.float32,
        )
        nested = {"offset": view_numbers(tensors["weight_offset"])[0], "state2": scales}
    state = functional.QuantState(
        absmax=scale if compress_statistics else view_numbers(scale),
        shape=torch.Size(shape),
        code=get_bnb_code(quant_type, codes.device),
        blocksize=BLOCK,
        quant_type=quant_type,
        dtype=dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32,
        **nested,
    )
    return functional.dequantize_4bit(codes.reshape(-1, 1), state).to(dtype)


@cache
def get_bnb_code(quant_type: str, device: torch.device) -> Tensor:
    """The code book of bitsandbytes: 16 values of nf4 or fp4, 256 of the dynamic type of quantized scales."""
    from bitsandbytes import functional

    if quant_type == "dynamic":
        return functional.create_dynamic_map().to(device)
    return functional.get_4bit_type(quant_type, device)


def size_int8(shape: tuple[int, int]) -> dict[str, int]:
    """A byte per weight, and 4 per row."""
    return {"weight": shape[0] * shape[1], "weight_scale": 4 * shape[0]}


def quantize_int8(weight: Tensor) -> QuantTensors:
    """A byte per weight, and the largest magnitude of each row (Dettmers et al. 2022, section 2.1)."""
    largest = weight.abs().amax(1, keepdim=True)
    codes = (weight * (127 / largest.clamp(min=1e-30))).round().to(torch.int8)
    return {"weight": view_bytes(codes), "weight_scale": view_bytes(largest)}


def dequantize_int8(tensors: QuantTensors, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix from codes of -127 to 127 and the largest magnitude of each row."""
    codes = view_numbers(tensors["weight"], torch.int8).view(shape)
    return (codes * (view_numbers(tensors["weight_scale"])[:, None] / 127)).to(dtype)


def get_torchao_scale_block(shape: tuple[int, int]) -> int:
    """The number of scales that share a scale in torchao, which requires whole blocks."""
    blocks = shape[0] * shape[1] // BLOCK
    return max(size for size in (1, 2, 4, 8, 16, 32, 64, 128, SCALE_BLOCK) if blocks % size == 0)


def size_torchao(shape: tuple[int, int]) -> dict[str, int]:
    """As bitsandbytes with quantized scales.

    Raises:
        UserError: if the number of weights is not divisible by the block size.
    """
    if (count := shape[0] * shape[1]) % BLOCK:
        raise UserError(f"quantize: torchao.nf4 needs matrices divisible by {BLOCK}, not {list(shape)}; set bnb.nf4")
    scales = count // BLOCK // get_torchao_scale_block(shape)
    return {"weight": count // 2, "weight_scale": count // BLOCK, "weight_scale_scale": 4 * scales, "weight_offset": 4}


def quantize_torchao(weight: Tensor) -> QuantTensors:
    """Quantize with torchao's NF4Tensor."""
    from torchao.quantization import to_nf4

    nf4 = to_nf4(weight.contiguous(), BLOCK, get_torchao_scale_block(tuple(weight.shape)))  # type: ignore[arg-type]
    tensors = (nf4.quantized_data, nf4.quantized_scalers, nf4.quantization_factor, nf4.scaler_mean)
    names = ("weight", "weight_scale", "weight_scale_scale", "weight_offset")
    return dict(zip(names, map(view_bytes, tensors), strict=True))


def dequantize_torchao(tensors: QuantTensors, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Dequantize with torchao's NF4Tensor."""
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import SubclassTensorArgs

    codes = tensors["weight"]
    template = build_torchao_template(codes.device)
    nf4 = type(template)(
        SubclassTensorArgs(torch.Size(shape), (shape[1], 1), 0, torch.float32, codes.device, False),
        BLOCK,
        shape[0] * shape[1] // BLOCK,
        get_torchao_scale_block(shape),
        view_numbers(tensors["weight_scale"], torch.int8),
        view_numbers(tensors["weight_scale_scale"]),
        view_numbers(tensors["weight_offset"])[0],
        codes,
        template.nf4,
    )
    return nf4.get_original_weight().to(dtype)


@cache
def build_torchao_template(device: torch.device) -> Any:
    """A small NF4Tensor, for its class and code book."""
    from torchao.quantization import to_nf4

    return to_nf4(torch.zeros(1, BLOCK, device=device), BLOCK, 1)


BNB_4BIT: dict[str, dict[str, Any]] = {
    "bnb.nf4": {"quant_type": "nf4", "compress_statistics": False},
    "bnb.nf4-dq": {"quant_type": "nf4", "compress_statistics": True},
    "bnb.fp4": {"quant_type": "fp4", "compress_statistics": False},
    "bnb.fp4-dq": {"quant_type": "fp4", "compress_statistics": True},
}
"""Settings of bitsandbytes by name: the type, and whether its scales are quantized too (Dettmers et al. 2023)."""
QUANT_FORMATS = {
    **{
        kind: QuantFormat(
            partial(size_bnb_4bit, **settings),
            partial(quantize_bnb_4bit, **settings),
            partial(dequantize_bnb_4bit, **settings),
        )
        for kind, settings in BNB_4BIT.items()
    },
    "bnb.int8-training": QuantFormat(size_int8, quantize_int8, dequantize_int8),
    "torchao.nf4": QuantFormat(size_torchao, quantize_torchao, dequantize_torchao),
}
"""Formats for training, by name."""
INFERENCE_KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    **{kind: partial(build_bnb_layer, kind=kind) for kind in (*BNB_4BIT, "bnb.int8")},
    "int8": Int8Linear,
    "int4": Int4Linear,
}
"""Layers for inference, by name."""
