"""A frozen base in 4 or 8 bits (QLoRA, Dettmers et al. 2023): linear layers that hold packed weights.

A packed weight is a few flat parameters of bytes, `weight` and others beside it, which shard, gather and save like any
parameter: no cast of floating-point numbers touches them. A product unpacks the weight, and unpacks it again for its
gradient rather than keep it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.adapt.layers import own_parameter
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.init import copy_into
from litgpt.model.surgery import add_mixin

BLOCK = 64  # numbers that share a scale
SCALE_BLOCK = 256  # scales that share a scale, where those are quantized too
QuantTensors = dict[str, Tensor]


@dataclass(frozen=True)
class QuantFormat:
    """A way to pack matrices.

    Attributes:
        sizes: the bytes of each piece of a matrix of some shape (out, in).
        pack: the pieces of a matrix.
        unpack: the matrix of a shape, in a type, out of its pieces.
        package: what must be installed.
    """

    sizes: Callable[[tuple[int, int]], dict[str, int]]
    quantize: Callable[[Tensor], QuantTensors]
    dequantize: Callable[[QuantTensors, tuple[int, int], torch.dtype], Tensor]
    package: str


class QuantizedLinear(nn.Linear):
    """A linear layer whose frozen weight is packed.

    Attributes:
        cut: what is computed with of the unpacked weight, if other processes compute with the rest; None for all.
    """

    quant_format: QuantFormat
    quant_tensors: tuple[str, ...]
    original_dtype: torch.dtype
    slice_weight: Callable[[Tensor], Tensor] | None = None

    def dequantize_weight(self, change: Callable[[Tensor], Tensor] = lambda piece: piece, dtype: Any = None) -> Tensor:
        """The weight (out, in), its pieces first put through `change`."""
        quant_tensors = {name: change(own_parameter(self, name)) for name in self.quant_tensors}
        return self.quant_format.dequantize(
            quant_tensors, (self.out_features, self.in_features), dtype or self.original_dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        dequantize = partial(self._dequantize, dtype=x.dtype)
        y = quantized_matmul(x, dequantize, *(own_parameter(self, name) for name in self.quant_tensors))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _dequantize(self, *quant_tensors: Tensor, dtype: torch.dtype) -> Tensor:
        shape = (self.out_features, self.in_features)
        weight = self.quant_format.dequantize(dict(zip(self.quant_tensors, quant_tensors, strict=True)), shape, dtype)
        return weight if self.slice_weight is None else self.slice_weight(weight).contiguous()


class QuantizedMatmul(torch.autograd.Function):
    """x W^T, which keeps the pieces of W for its gradient, not W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dequantize: Callable[..., Tensor], *quant_tensors: Tensor) -> Tensor:
        ctx.dequantize = dequantize
        ctx.save_for_backward(*quant_tensors)
        return F.linear(x, dequantize(*quant_tensors))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ ctx.dequantize(*ctx.saved_tensors), *[None] * (1 + len(ctx.saved_tensors))


quantized_matmul = torch.compiler.disable(QuantizedMatmul.apply)  # the libraries' unpacking is not for its tracer
"""`Product` of a compiled block, which is compiled up to it and from it on."""


def quantize(model: GPT, kind: str) -> None:
    """Make the linear layers of the blocks packed ones, without values yet; embedding, norms and head stay.

    Comes before `attach`, and `fill` after both.

    Raises:
        UserError: if `kind` is not known, its package is missing, or the model has experts, which stay unpacked.
    """
    quant_format = find_quant_format(kind)
    if model.config.n_expert:
        raise UserError(f"quantize: {kind} does not pack experts, where most of the weights are; give null")
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear):
            weight = own_parameter(layer, "weight")
            sizes = quant_format.sizes((layer.out_features, layer.in_features))
            for name, size in sizes.items():
                piece = torch.empty(size, dtype=torch.uint8, device=weight.device)
                layer.register_parameter(name, nn.Parameter(piece, requires_grad=False))
            add_mixin(layer, QuantizedLinear)
            layer.quant_format, layer.quant_tensors, layer.original_dtype = quant_format, tuple(sizes), weight.dtype  # type: ignore


@torch.no_grad()
def load_quantized(
    model: GPT,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    device: torch.device | None = None,
    write: Callable[[nn.Parameter, Tensor], None] = copy_into,
) -> None:
    """Fill a quantized model with weights, which are packed one at a time.

    Args:
        tensors: every parameter of the base in full, under our names.
        device: where to pack; None for where each tensor is.
        write: stores a whole value into a parameter, which may be a shard.
    """
    layers = dict(model.named_modules())
    for name, tensor in tensors:
        owner, _, key = name.rpartition(".")
        layer = layers.get(owner)
        if layer is None or key not in layer._parameters:
            continue  # it lies in another process
        if isinstance(layer, QuantizedLinear) and key == "weight":
            quant_tensors = layer.quant_format.quantize(tensor.to(device or tensor.device, torch.float32))
            for piece, value in quant_tensors.items():
                write(own_parameter(layer, piece), value)
        else:
            write(own_parameter(layer, key), tensor)


def view_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, flat."""
    return tensor.new_empty(tensor.numel()).copy_(tensor.detach().reshape(-1)).view(torch.uint8)


def view_as(piece: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that flat bytes stand for."""
    return piece.contiguous().view(dtype)


def dequantize_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to unpack in: that of the product, or float32 where the library knows no other."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32


def ceil_div(number: int, step: int) -> int:
    """How many steps of this size hold a number."""
    return -(-number // step)


def bnb_4bit_sizes(shape: tuple[int, int], *, double_quant: bool) -> dict[str, int]:
    """Half a byte a number, and a scale of 4 bytes, or of one byte and a 256th of 4, for 64 numbers."""
    count = shape[0] * shape[1]
    blocks = ceil_div(count, BLOCK)
    sizes = {"weight": ceil_div(count, 2), "weight_scale": blocks if double_quant else 4 * blocks}
    return (
        {**sizes, "weight_scale_scale": 4 * ceil_div(blocks, SCALE_BLOCK), "weight_offset": 4}
        if double_quant
        else sizes
    )


def quantize_bnb_4bit(weight: Tensor, *, kind: str, double_quant: bool) -> QuantTensors:
    """Pieces as bitsandbytes makes them."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, quant_type=kind, compress_statistics=double_quant
    )
    quant_tensors = {"weight": codes.reshape(-1), "weight_scale": view_bytes(state.absmax)}
    if double_quant:
        quant_tensors |= {
            "weight_scale_scale": view_bytes(state.state2.absmax),
            "weight_offset": view_bytes(state.offset),
        }
    return quant_tensors


def dequantize_bnb_4bit(
    quant_tensors: QuantTensors, shape: tuple[int, int], dtype: torch.dtype, *, kind: str, double_quant: bool
) -> Tensor:
    """The matrix that bitsandbytes' pieces stand for."""
    from bitsandbytes import functional

    codes, scale = quant_tensors["weight"], quant_tensors["weight_scale"]
    inner = {}
    if double_quant:
        scales = functional.QuantState(
            absmax=view_as(quant_tensors["weight_scale_scale"]),
            code=bnb_code("dynamic", codes.device),
            blocksize=SCALE_BLOCK,
            dtype=torch.float32,
        )
        inner = {"offset": view_as(quant_tensors["weight_offset"])[0], "state2": scales}
    state = functional.QuantState(
        absmax=scale if double_quant else view_as(scale),
        shape=torch.Size(shape),
        code=bnb_code(kind, codes.device),
        blocksize=BLOCK,
        quant_type=kind,
        dtype=dequantize_dtype(dtype),
        **inner,
    )
    return functional.dequantize_4bit(codes.reshape(-1, 1), state).to(dtype)


@cache
def bnb_code(kind: str, device: torch.device) -> Tensor:
    """The numbers that bitsandbytes' codes stand for: 16 of nf4 or fp4, 256 of dynamic, which scales are kept in."""
    from bitsandbytes import functional

    return functional.create_dynamic_map().to(device) if kind == "dynamic" else functional.get_4bit_type(kind, device)


def int8_sizes(shape: tuple[int, int]) -> dict[str, int]:
    """A byte a number, and 4 a row."""
    return {"weight": shape[0] * shape[1], "weight_scale": 4 * shape[0]}


def quantize_int8(weight: Tensor) -> QuantTensors:
    """A byte a number, and the largest size in each row (Dettmers et al. 2022, section 2.1)."""
    largest = weight.abs().amax(1, keepdim=True)
    codes = (weight * (127 / largest.clamp(min=1e-30))).round().to(torch.int8)
    return {"weight": view_bytes(codes), "weight_scale": view_bytes(largest)}


def dequantize_int8(quant_tensors: QuantTensors, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix that codes from -127 to 127 and the largest of each row stand for."""
    codes = view_as(quant_tensors["weight"], torch.int8).view(shape)
    return (codes * (view_as(quant_tensors["weight_scale"])[:, None] / 127)).to(dtype)


def scale_block(shape: tuple[int, int]) -> int:
    """How many scales share one in torchao, which wants whole blocks."""
    blocks = shape[0] * shape[1] // BLOCK
    return max(size for size in (1, 2, 4, 8, 16, 32, 64, 128, SCALE_BLOCK) if blocks % size == 0)


def torchao_sizes(shape: tuple[int, int]) -> dict[str, int]:
    """As with two levels of scales in bitsandbytes.

    Raises:
        UserError: if the matrix is no whole number of blocks.
    """
    if (count := shape[0] * shape[1]) % BLOCK:
        raise UserError(f"quantize: torchao.nf4 packs {BLOCK} numbers together, not {list(shape)}; bnb.nf4 would do")
    scales = count // BLOCK // scale_block(shape)
    return {"weight": count // 2, "weight_scale": count // BLOCK, "weight_scale_scale": 4 * scales, "weight_offset": 4}


def quantize_torchao(weight: Tensor) -> QuantTensors:
    """Pieces as torchao's NF4Tensor has them."""
    from torchao.quantization import to_nf4

    packed = to_nf4(weight.contiguous(), BLOCK, scale_block(tuple(weight.shape)))  # type: ignore[arg-type]
    parts = (packed.quantized_data, packed.quantized_scalers, packed.quantization_factor, packed.scaler_mean)
    return dict(
        zip(("weight", "weight_scale", "weight_scale_scale", "weight_offset"), map(view_bytes, parts), strict=True)
    )


def dequantize_torchao(quant_tensors: QuantTensors, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix that torchao's pieces stand for."""
    codes = quant_tensors["weight"]
    like = torchao_like(codes.device)
    packed = type(like)(
        torchao_meta(shape, codes.device),
        BLOCK,
        shape[0] * shape[1] // BLOCK,
        scale_block(shape),
        view_as(quant_tensors["weight_scale"], torch.int8),
        view_as(quant_tensors["weight_scale_scale"]),
        view_as(quant_tensors["weight_offset"])[0],
        codes,
        like.nf4,
    )
    return packed.get_original_weight().to(dtype)


@cache
def torchao_like(device: torch.device) -> Any:
    """A small NF4Tensor, for its table of numbers."""
    from torchao.quantization import to_nf4

    return to_nf4(torch.zeros(1, BLOCK, device=device), BLOCK, 1)


def torchao_meta(shape: tuple[int, int], device: torch.device) -> Any:
    """What an NF4Tensor knows of the matrix that it was made of."""
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import SubclassTensorArgs

    return SubclassTensorArgs(torch.Size(shape), (shape[1], 1), 0, torch.float32, device, False)


def bnb_4bit_format(kind: str, *, double_quant: bool) -> QuantFormat:
    """The packing of bitsandbytes' four-bit numbers."""
    return QuantFormat(
        partial(bnb_4bit_sizes, double_quant=double_quant),
        partial(quantize_bnb_4bit, kind=kind, double_quant=double_quant),
        partial(dequantize_bnb_4bit, kind=kind, double_quant=double_quant),
        "bitsandbytes",
    )


QUANT_FORMATS = {
    "bnb.nf4": bnb_4bit_format("nf4", double_quant=False),
    "bnb.nf4-dq": bnb_4bit_format("nf4", double_quant=True),
    "bnb.fp4": bnb_4bit_format("fp4", double_quant=False),
    "bnb.fp4-dq": bnb_4bit_format("fp4", double_quant=True),
    "bnb.int8-training": QuantFormat(int8_sizes, quantize_int8, dequantize_int8, ""),
    "torchao.nf4": QuantFormat(torchao_sizes, quantize_torchao, dequantize_torchao, "torchao"),
}
"""By name; dq: the scales are quantized too."""


def find_quant_format(kind: str) -> QuantFormat:
    """The packing of this name.

    Raises:
        UserError: if there is none, or its package is missing.
    """
    if kind not in QUANT_FORMATS:
        raise UserError(f"quantize: {kind!r} is not known; give {', '.join(QUANT_FORMATS)}")
    package = QUANT_FORMATS[kind].package
    if package and find_spec(package) is None:
        raise UserError(f"quantize: {kind} needs the package {package}; `pip install {package}`, or bnb.int8-training")
    return QUANT_FORMATS[kind]
