"""Write and hash safetensors files in one pass; read a tensor whose blocks are in several files as one tensor."""

import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from litgpt.errors import UserError
from litgpt.files import DamagedFileError, sync_file

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
WRITE_BYTES = 16 << 20  # small enough that hashing and writing find the bytes in cache


def iter_byte_blocks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a CPU tensor in row-major order, in blocks of at most 16 MiB."""
    if tensor.numel():
        view = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(view), WRITE_BYTES):
            yield view[start : start + WRITE_BYTES]


def build_header(tensors: Mapping[str, Tensor], order: Iterable[str], metadata: dict[str, str]) -> bytes:
    """The header of a safetensors file: its length in eight bytes, then JSON with dtype, shape and offsets by name."""
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise UserError(f"{name}: tensors of type {tensor.dtype} cannot be written to a safetensors file")
        offsets = [start, start + tensor.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        start = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> str:
    """Write CPU tensors to a safetensors file, fsync it, and return its SHA-256."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(block: bytes | memoryview) -> None:
            digest.update(block)
            file.write(block)

        write(build_header(tensors, order, metadata))
        for name in order:
            for block in iter_byte_blocks(tensors[name]):
                write(block)
    sync_file(path)
    return digest.hexdigest()


@dataclass(frozen=True)
class TensorShard:
    """This rank's shard of a tensor: its local values, their offset in the full tensor, and the full tensor's shape."""

    local: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    is_sharded: bool  # a DTensor; a plain tensor is the same on every rank
    is_first_replica: bool


def get_shard(tensor: Tensor) -> TensorShard:
    """The shard of a plain or distributed tensor on this rank."""
    if not isinstance(tensor, DTensor):
        return TensorShard(tensor, tuple(tensor.shape), (0,) * tensor.dim(), is_sharded=False, is_first_replica=True)
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    coordinate = tensor.device_mesh.get_coordinate() or ()
    first = all(
        place == 0 for place, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()
    )
    return TensorShard(tensor.to_local(), tuple(tensor.shape), tuple(offset), is_sharded=True, is_first_replica=first)


class SavedBlock(NamedTuple):
    """A block of a tensor: the file that holds it, its offset in the full tensor, and its shape."""

    path: Path
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass
class SavedTensor:
    """A tensor in a set of files: its full shape, its type and its blocks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: list[SavedBlock] = field(default_factory=list)
    is_number: bool = False  # a Python number, saved as a tensor without dimensions


def intersect_blocks(
    offset: tuple[int, ...], shape: tuple[int, ...], other_offset: tuple[int, ...], other_shape: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """The overlap of two blocks of a tensor, as an index into the first and one into the second; None without one."""
    index, other_index = [], []
    for first, size, other, other_size in zip(offset, shape, other_offset, other_shape, strict=True):
        start, end = max(first, other), min(first + size, other + other_size)
        if start >= end:
            return None
        index.append(slice(start - first, end - first))
        other_index.append(slice(start - other, end - other))
    return tuple(index), tuple(other_index)


class MappedFile:
    """The tensors of one safetensors file as views of its memory map, whose pages can be released."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            SafetensorError, OSError, ValueError: if it is not a whole safetensors file.
        """
        with safe_open(path, framework="pt") as file:  # checks sizes, offsets and the length of the file
            self.metadata: dict[str, str] = file.metadata() or {}
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(header))
            # a private map is writable, as torch wants memory to be, and never changes the file
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        entries.pop("__metadata__", None)
        self.entries = {
            name: (DTYPES[entry["dtype"]], tuple(entry["shape"]), *(8 + header + at for at in entry["data_offsets"]))
            for name, entry in entries.items()
        }

    def view(self, name: str) -> Tensor:
        """A tensor whose values are read from disk when they are used."""
        dtype, shape, start, end = self.entries[name]
        if start == end:
            return torch.empty(shape, dtype=dtype)
        raw = torch.frombuffer(self._bytes, dtype=torch.uint8, count=end - start, offset=start)
        return raw.view(dtype).view(shape)

    def release(self, name: str) -> None:
        """Free the pages of a tensor in this process's memory; they are read again when the tensor is used."""
        _, _, start, end = self.entries[name]
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # pages shared with neighboring tensors stay
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._bytes.madvise(mmap.MADV_DONTNEED, first, length)


class SafetensorsFiles:
    """A set of safetensors files, read as the full tensors whose blocks they hold; memory-mapped, on demand."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.tensors: dict[str, SavedTensor] = {}
        self.metadata: dict[str, str] = {}
        self._open: dict[Path, MappedFile] = {}
        for path in paths:
            try:
                self._open_file(path)
            except FileNotFoundError:
                raise DamagedFileError(f"{path}: no such file") from None
            except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise DamagedFileError(f"{path}: not a whole safetensors file ({error})") from None

    def _open_file(self, path: Path) -> None:
        file = self._open[path] = MappedFile(path)
        self.metadata |= file.metadata
        blocks = json.loads(file.metadata.get("parts", "{}"))
        for name, (dtype, shape, _, _) in file.entries.items():
            block = blocks.get(name, {})
            tensor = self.tensors.setdefault(
                name, SavedTensor(tuple(block.get("shape", shape)), dtype, is_number=block.get("python", False))
            )
            tensor.blocks.append(SavedBlock(path, tuple(block.get("offset", [0] * len(shape))), shape))

    def copy_to(self, name: str, shard: TensorShard) -> None:
        """Copy the values of a shard of tensor `name` into `shard.local`; reads no other values.

        Raises:
            DamagedFileError: if the files do not hold every value of the shard, or cannot be read.
        """
        num_copied, blocks = 0, self.tensors[name].blocks
        for block in blocks:
            if overlap := intersect_blocks(block.offset, block.shape, shard.offset, tuple(shard.local.shape)):
                index, local_index = overlap
                values = self._open[block.path].view(name)[index]
                shard.local.detach()[local_index].copy_(values)
                self._open[block.path].release(name)
                num_copied += values.numel()
        if num_copied != shard.local.numel():
            paths = ", ".join(block.path.name for block in blocks)
            raise DamagedFileError(f"{name}: {num_copied} of {shard.local.numel()} values found in {paths}")

    def read(self, name: str) -> Tensor:
        """Read the full tensor `name` on the CPU; a view of the file, not to be written to, if it has one block."""
        saved = self.tensors[name]
        if len(saved.blocks) == 1 and saved.blocks[0].shape == saved.shape:
            return self._open[saved.blocks[0].path].view(name)
        tensor = torch.empty(saved.shape, dtype=saved.dtype)
        self.copy_to(name, get_shard(tensor))
        return tensor

    def read_meta(self, name: str) -> Tensor:
        """Shape and type of tensor `name`, on the meta device."""
        return torch.empty(self.tensors[name].shape, dtype=self.tensors[name].dtype, device="meta")

    def release(self, name: str) -> None:
        """Free the mapped pages of a tensor in this process's memory."""
        for block in self.tensors[name].blocks:
            self._open[block.path].release(name)
