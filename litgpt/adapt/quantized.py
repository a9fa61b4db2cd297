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

from litgpt.adapt.layers import become, stored
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.init import copy_into

BLOCK = 64  # numbers that share a scale
SCALE_BLOCK = 256  # scales that share a scale, where those are quantized too
Pieces = dict[str, Tensor]


@dataclass(frozen=True)
class Packing:
    """A way to pack matrices.

    Attributes:
        sizes: the bytes of each piece of a matrix of some shape (out, in).
        pack: the pieces of a matrix.
        unpack: the matrix of a shape, in a type, out of its pieces.
        package: what must be installed.
    """

    sizes: Callable[[tuple[int, int]], dict[str, int]]
    pack: Callable[[Tensor], Pieces]
    unpack: Callable[[Pieces, tuple[int, int], torch.dtype], Tensor]
    package: str


class Packed(nn.Linear):
    """A linear layer whose frozen weight is packed.

    Attributes:
        cut: what is computed with of the unpacked weight, if other processes compute with the rest; None for all.
    """

    packing: Packing
    pieces: tuple[str, ...]
    unpacked_dtype: torch.dtype
    cut: Callable[[Tensor], Tensor] | None = None

    def unpacked(self, change: Callable[[Tensor], Tensor] = lambda piece: piece, dtype: Any = None) -> Tensor:
        """The weight (out, in), its pieces first put through `change`."""
        pieces = {name: change(stored(self, name)) for name in self.pieces}
        return self.packing.unpack(pieces, (self.out_features, self.in_features), dtype or self.unpacked_dtype)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        unpack = partial(self._unpack, dtype=x.dtype)
        y = product(x, unpack, *(stored(self, name) for name in self.pieces))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _unpack(self, *pieces: Tensor, dtype: torch.dtype) -> Tensor:
        shape = (self.out_features, self.in_features)
        weight = self.packing.unpack(dict(zip(self.pieces, pieces, strict=True)), shape, dtype)
        return weight if self.cut is None else self.cut(weight).contiguous()


class Product(torch.autograd.Function):
    """x W^T, which keeps the pieces of W for its gradient, not W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unpack: Callable[..., Tensor], *pieces: Tensor) -> Tensor:
        ctx.unpack = unpack
        ctx.save_for_backward(*pieces)
        return F.linear(x, unpack(*pieces))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ ctx.unpack(*ctx.saved_tensors), *[None] * (1 + len(ctx.saved_tensors))


product = torch.compiler.disable(Product.apply)  # the libraries' unpacking is not for its tracer
"""`Product` of a compiled block, which is compiled up to it and from it on."""


def quantize(model: GPT, kind: str) -> None:
    """Make the linear layers of the blocks packed ones, without values yet; embedding, norms and head stay.

    Comes before `attach`, and `fill` after both.

    Raises:
        UserError: if `kind` is not known, its package is missing, or the model has experts, which stay unpacked.
    """
    packing = packing_of(kind)
    if model.config.n_expert:
        raise UserError(f"quantize: {kind} does not pack experts, where most of the weights are; give null")
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear):
            weight = stored(layer, "weight")
            sizes = packing.sizes((layer.out_features, layer.in_features))
            for name, size in sizes.items():
                piece = torch.empty(size, dtype=torch.uint8, device=weight.device)
                layer.register_parameter(name, nn.Parameter(piece, requires_grad=False))
            become(layer, Packed)
            layer.packing, layer.pieces, layer.unpacked_dtype = packing, tuple(sizes), weight.dtype  # type: ignore


@torch.no_grad()
def fill(
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
        if isinstance(layer, Packed) and key == "weight":
            pieces = layer.packing.pack(tensor.to(device or tensor.device, torch.float32))
            for piece, value in pieces.items():
                write(stored(layer, piece), value)
        else:
            write(stored(layer, key), tensor)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, flat."""
    return tensor.new_empty(tensor.numel()).copy_(tensor.detach().reshape(-1)).view(torch.uint8)


def numbers(piece: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that flat bytes stand for."""
    return piece.contiguous().view(dtype)


def supported(dtype: torch.dtype) -> torch.dtype:
    """The type to unpack in: that of the product, or float32 where the library knows no other."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32


def up(number: int, step: int) -> int:
    """How many steps of this size hold a number."""
    return -(-number // step)


def four_bit_sizes(shape: tuple[int, int], *, twice: bool) -> dict[str, int]:
    """Half a byte a number, and a scale of 4 bytes, or of one byte and a 256th of 4, for 64 numbers."""
    count = shape[0] * shape[1]
    blocks = up(count, BLOCK)
    sizes = {"weight": up(count, 2), "weight_scale": blocks if twice else 4 * blocks}
    return {**sizes, "weight_scale_scale": 4 * up(blocks, SCALE_BLOCK), "weight_offset": 4} if twice else sizes


def pack_four_bits(weight: Tensor, *, kind: str, twice: bool) -> Pieces:
    """Pieces as bitsandbytes makes them."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, quant_type=kind, compress_statistics=twice
    )
    pieces = {"weight": codes.reshape(-1), "weight_scale": as_bytes(state.absmax)}
    if twice:
        pieces |= {"weight_scale_scale": as_bytes(state.state2.absmax), "weight_offset": as_bytes(state.offset)}
    return pieces


def unpack_four_bits(pieces: Pieces, shape: tuple[int, int], dtype: torch.dtype, *, kind: str, twice: bool) -> Tensor:
    """The matrix that bitsandbytes' pieces stand for."""
    from bitsandbytes import functional

    codes, scale = pieces["weight"], pieces["weight_scale"]
    inner = {}
    if twice:
        scales = functional.QuantState(
            absmax=numbers(pieces["weight_scale_scale"]),
            code=code_of("dynamic", codes.device),
            blocksize=SCALE_BLOCK,
            dtype=torch.float32,
        )
        inner = {"offset": numbers(pieces["weight_offset"])[0], "state2": scales}
    state = functional.QuantState(
        absmax=scale if twice else numbers(scale),
        shape=torch.Size(shape),
        code=code_of(kind, codes.device),
        blocksize=BLOCK,
        quant_type=kind,
        dtype=supported(dtype),
        **inner,
    )
    return functional.dequantize_4bit(codes.reshape(-1, 1), state).to(dtype)


@cache
def code_of(kind: str, device: torch.device) -> Tensor:
    """The numbers that bitsandbytes' codes stand for: 16 of nf4 or fp4, 256 of dynamic, which scales are kept in."""
    from bitsandbytes import functional

    return functional.create_dynamic_map().to(device) if kind == "dynamic" else functional.get_4bit_type(kind, device)


def eight_bit_sizes(shape: tuple[int, int]) -> dict[str, int]:
    """A byte a number, and 4 a row."""
    return {"weight": shape[0] * shape[1], "weight_scale": 4 * shape[0]}


def pack_eight_bits(weight: Tensor) -> Pieces:
    """A byte a number, and the largest size in each row (Dettmers et al. 2022, section 2.1)."""
    largest = weight.abs().amax(1, keepdim=True)
    codes = (weight * (127 / largest.clamp(min=1e-30))).round().to(torch.int8)
    return {"weight": as_bytes(codes), "weight_scale": as_bytes(largest)}


def unpack_eight_bits(pieces: Pieces, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix that codes from -127 to 127 and the largest of each row stand for."""
    codes = numbers(pieces["weight"], torch.int8).view(shape)
    return (codes * (numbers(pieces["weight_scale"])[:, None] / 127)).to(dtype)


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


def pack_torchao(weight: Tensor) -> Pieces:
    """Pieces as torchao's NF4Tensor has them."""
    from torchao.quantization import to_nf4

    packed = to_nf4(weight.contiguous(), BLOCK, scale_block(tuple(weight.shape)))  # type: ignore[arg-type]
    parts = (packed.quantized_data, packed.quantized_scalers, packed.quantization_factor, packed.scaler_mean)
    return dict(
        zip(("weight", "weight_scale", "weight_scale_scale", "weight_offset"), map(as_bytes, parts), strict=True)
    )


def unpack_torchao(pieces: Pieces, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix that torchao's pieces stand for."""
    codes = pieces["weight"]
    like = torchao_like(codes.device)
    packed = type(like)(
        torchao_meta(shape, codes.device),
        BLOCK,
        shape[0] * shape[1] // BLOCK,
        scale_block(shape),
        numbers(pieces["weight_scale"], torch.int8),
        numbers(pieces["weight_scale_scale"]),
        numbers(pieces["weight_offset"])[0],
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


def four_bits(kind: str, *, twice: bool) -> Packing:
    """The packing of bitsandbytes' four-bit numbers."""
    return Packing(
        partial(four_bit_sizes, twice=twice),
        partial(pack_four_bits, kind=kind, twice=twice),
        partial(unpack_four_bits, kind=kind, twice=twice),
        "bitsandbytes",
    )


PACKINGS = {
    "bnb.nf4": four_bits("nf4", twice=False),
    "bnb.nf4-dq": four_bits("nf4", twice=True),
    "bnb.fp4": four_bits("fp4", twice=False),
    "bnb.fp4-dq": four_bits("fp4", twice=True),
    "bnb.int8-training": Packing(eight_bit_sizes, pack_eight_bits, unpack_eight_bits, ""),
    "torchao.nf4": Packing(torchao_sizes, pack_torchao, unpack_torchao, "torchao"),
}
"""By name; dq: the scales are quantized too."""


def packing_of(kind: str) -> Packing:
    """The packing of this name.

    Raises:
        UserError: if there is none, or its package is missing.
    """
    if kind not in PACKINGS:
        raise UserError(f"quantize: {kind!r} is not known; give {', '.join(PACKINGS)}")
    package = PACKINGS[kind].package
    if package and find_spec(package) is None:
        raise UserError(f"quantize: {kind} needs the package {package}; `pip install {package}`, or bnb.int8-training")
    return PACKINGS[kind]
