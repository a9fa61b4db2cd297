"""Safetensors files: written in one pass that also hashes them, read in pieces from several files as one tensor."""

import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    """The header of a safetensors file: eight bytes of length, then JSON that names, types and places each tensor."""
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise UserError(f"{name}: tensors of type {tensor.dtype} cannot be written to a safetensors file")
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> str:
    """Write CPU tensors to a safetensors file, fsync it, and return its SHA-256 (taken from the bytes as they pass)."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(block: bytes | memoryview) -> None:
            digest.update(block)
            file.write(block)

        put(build_header(tensors, order, metadata))
        for name in order:
            for block in iter_byte_blocks(tensors[name]):
                put(block)
    sync_file(path)
    return digest.hexdigest()


@dataclass(frozen=True)
class TensorShard:
    """What this rank holds of a tensor: its local values, where they start in the whole, and the whole's shape."""

    local: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    sharded: bool  # a DTensor; a plain tensor is alike on every rank
    first_replica: bool


def get_shard(tensor: Tensor) -> TensorShard:
    """The part of a plain or distributed tensor that lies on this rank."""
    if not isinstance(tensor, DTensor):
        return TensorShard(tensor, tuple(tensor.shape), (0,) * tensor.dim(), sharded=False, first_replica=True)
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    coordinate = tensor.device_mesh.get_coordinate() or ()
    first = all(
        place == 0 for place, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()
    )
    return TensorShard(tensor.to_local(), tuple(tensor.shape), tuple(offset), sharded=True, first_replica=first)


@dataclass
class SavedTensor:
    """A tensor as a set of files holds it: its shape and type, and which file holds which block of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: list[tuple[Path, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)  # file, offset, shape
    python: bool = False  # a Python number, kept as a tensor without dimensions


def intersect_blocks(
    have_offset: tuple[int, ...], have_shape: tuple[int, ...], want_offset: tuple[int, ...], want_shape: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where two blocks of one tensor meet, as slices of the first and slices of the second; None if nowhere."""
    source, target = [], []
    for have, have_size, want, want_size in zip(have_offset, have_shape, want_offset, want_shape, strict=True):
        start, end = max(have, want), min(have + have_size, want + want_size)
        if start >= end:
            return None
        source.append(slice(start - have, end - have))
        target.append(slice(start - want, end - want))
    return tuple(source), tuple(target)


class MappedFile:
    """The tensors of one safetensors file as views of its memory map, whose pages are given back when asked to."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            SafetensorError, OSError, ValueError: if it is not a whole safetensors file.
        """
        with safe_open(path, framework="pt") as file:  # holds sizes, offsets and the file's length against each other
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
        """A tensor whose values are read from the disk where they are looked at."""
        dtype, shape, start, end = self.entries[name]
        if start == end:
            return torch.empty(shape, dtype=dtype)
        raw = torch.frombuffer(self._bytes, dtype=torch.uint8, count=end - start, offset=start)
        return raw.view(dtype).view(shape)

    def release(self, name: str) -> None:
        """Take a tensor's pages out of this process's memory; looking at it again reads them again."""
        _, _, start, end = self.entries[name]
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # pages that are shared with its neighbours stay
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._bytes.madvise(mmap.MADV_DONTNEED, first, length)


class SafetensorsFiles:
    """A set of safetensors files, read as the whole tensors that they hold blocks of; memory-mapped, on demand."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.wholes: dict[str, SavedTensor] = {}
        self.metadata: dict[str, str] = {}
        self._open: dict[Path, MappedFile] = {}
        for path in paths:
            try:
                self._open[path] = MappedFile(path)
                self._read_header(path)
            except FileNotFoundError:
                raise DamagedFileError(f"{path}: no such file") from None
            except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise DamagedFileError(f"{path}: not a whole safetensors file ({error})") from None

    def _read_header(self, path: Path) -> None:
        file = self._open[path]
        self.metadata |= file.metadata
        placed = json.loads(file.metadata.get("parts", "{}"))
        for name, (dtype, size, _, _) in file.entries.items():
            entry = placed.get(name, {})
            whole = self.wholes.setdefault(
                name, SavedTensor(tuple(entry.get("shape", size)), dtype, python=entry.get("python", False))
            )
            whole.blocks.append((path, tuple(entry.get("offset", [0] * len(size))), size))

    def fill(self, name: str, part: TensorShard) -> None:
        """Copy into `part.local` its values of tensor `name`, reading no others.

        Raises:
            DamagedFileError: if the files do not hold every value of the part, or cannot be read.
        """
        filled = 0
        for path, offset, size in self.wholes[name].blocks:
            meet = intersect_blocks(offset, size, part.offset, tuple(part.local.shape))
            if meet is None:
                continue
            source, target = meet
            values = self._open[path].view(name)[source]
            part.local.detach()[target].copy_(values)
            self._open[path].release(name)
            filled += values.numel()
        if filled != part.local.numel():
            raise DamagedFileError(f"{name}: {filled} of {part.local.numel()} values found in {self._names(name)}")

    def _names(self, name: str) -> str:
        return ", ".join(path.name for path, _, _ in self.wholes[name].blocks)

    def whole(self, name: str) -> Tensor:
        """Tensor `name` in full, on the CPU; if it lies in one block a view of the file, not to be written to."""
        have = self.wholes[name]
        if len(have.blocks) == 1 and have.blocks[0][2] == have.shape:
            return self._open[have.blocks[0][0]].view(name)
        tensor = torch.empty(have.shape, dtype=have.dtype)
        self.fill(name, get_shard(tensor))
        return tensor

    def like(self, name: str) -> Tensor:
        """Shape and type of tensor `name`, on the meta device."""
        return torch.empty(self.wholes[name].shape, dtype=self.wholes[name].dtype, device="meta")

    def release(self, name: str) -> None:
        """Take the mapped pages of a tensor out of this process's memory."""
        for path, _, _ in self.wholes[name].blocks:
            self._open[path].release(name)
