"""Read the checkpoint folders of Megatron-core (`torch_dist`), which are in the format of torch.distributed.checkpoint.

The pickle `.metadata` lists tensors and where their blocks are; files `__<rank>_<number>.distcp` hold the blocks.
Nothing in a pickle can run code here: classes become plain records, and unknown ones are refused.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.files import DamagedFileError, decode_source, join_inside
from litgpt.model.names import NameTable
from litgpt.model.registry import load_format_table
from litgpt.store.legacy import load_tensor, load_torch_file, refuse_file
from litgpt.store.safetensors_files import DTYPE_NAMES, intersect_blocks

METADATA, COMMON = ".metadata", "common.pt"
LATEST = "latest_checkpointed_iteration.txt"
LAYERS = re.compile(r"((?:.*\.)?decoder\.layers\.)(?!\d)(.*)")
"""The name of a tensor that holds those of all layers: before and after the place of a layer's number."""


class Record:
    """The values of a pickled object whose class is not imported."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

    def get(self, name: str) -> Any:
        """The value of an attribute; None without it."""
        state = self.__dict__.get("state")
        return state.get(name) if isinstance(state, dict) else None


RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    ),
    "torch.serialization": ("_get_layout",),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "pathlib": ("Path", "PosixPath"),
}
"""The names in the `.metadata` of torch 2 and Megatron-core, by module; each becomes a `Record`."""
COMMON_RECORDS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "pathlib.PosixPath",
    "signal.Signals",
    "megatron.core.enums.ModelType",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphScope",
)
"""The classes in a `common.pt`; each becomes a `Record`."""


class MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata`: numbers, texts, containers, records, and the types and shapes of tensors."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global name of the pickle.

        Raises:
            UnpicklingError: for a name that such a file does not contain.
        """
        if name in RECORDS.get(module, ()):
            return Record
        if (module, name) == ("torch", "Size"):
            return tuple
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if dtype in DTYPE_NAMES:
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


class StoredBlock(NamedTuple):
    """A block of a tensor: its offset in the tensor, its shape, and the file, start and length of its bytes."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    path: Path
    start: int
    length: int


class TensorBlocks(NamedTuple):
    """A tensor of a checkpoint: its full shape, its type and its blocks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: list[StoredBlock]


def find_torch_dist(folder: Path) -> Path | None:
    """The checkpoint that `folder` is, or the latest one in it, which a file names; None without one.

    Raises:
        UserError: if that file names a folder that is not a checkpoint.
    """
    if (folder / METADATA).is_file():
        return folder
    latest = folder / LATEST
    if not latest.is_file():
        return None
    name = decode_source(latest.read_bytes()[:100], latest).strip()
    path = join_inside(folder, f"iter_{int(name):07d}" if name.isdecimal() else name)
    if not (path / METADATA).is_file():
        raise UserError(f"{latest}: names {path.name}, which is not a torch_dist checkpoint of Megatron-core")
    return path


class TorchDistFolder:
    """The tensors of a checkpoint; those of layers that it stores in one tensor are listed layer by layer."""

    def __init__(self, folder: Path) -> None:
        """Read which tensors there are, and where.

        Raises:
            UserError: if `.metadata` is damaged or names other classes than such files do.
        """
        self.path = folder
        metadata = load_metadata(folder / METADATA)
        try:
            self._tensors = list_tensor_blocks(folder, metadata)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(f"{folder / METADATA}: not a checkpoint of torch.distributed ({error})") from None
        self._names: dict[str, tuple[str, int | None]] = {}
        for key, tensor in self._tensors.items():
            match = LAYERS.fullmatch(key)
            if match and tensor.shape:
                self._names |= {f"{match[1]}{layer}.{match[2]}": (key, layer) for layer in range(tensor.shape[0])}
            else:
                self._names[key] = (key, None)

    @property
    def names(self) -> list[str]:
        """The names of its tensors, without bytes that are not tensors."""
        return list(self._names)

    @property
    def name_table(self) -> NameTable:
        """The table of Megatron-core's names and ours."""
        return load_format_table("megatron")

    def read_meta(self, name: str) -> Tensor:
        """The shape and type of a tensor, on the meta device."""
        key, layer = self._names[name]
        shape = self._tensors[key].shape
        return torch.empty(shape if layer is None else shape[1:], dtype=self._tensors[key].dtype, device="meta")

    def read(self, name: str) -> Tensor:
        """The values of a tensor, read from its blocks.

        Raises:
            UserError: if blocks are missing or damaged.
        """
        key, layer = self._names[name]
        stored = self._tensors[key]
        offset = (0,) * len(stored.shape) if layer is None else (layer, *(0 for _ in stored.shape[1:]))
        shape = stored.shape if layer is None else (1, *stored.shape[1:])
        tensor, values_read = torch.empty(shape, dtype=stored.dtype), 0
        for block in stored.blocks:
            if overlap := intersect_blocks(block.offset, block.shape, offset, shape):
                values = read_block(block, name)[overlap[0]]
                tensor[overlap[1]] = values
                values_read += values.numel()
        if values_read != tensor.numel():
            raise DamagedFileError(f"{self.path}: {name}: {values_read} of {tensor.numel()} values are there")
        return tensor if layer is None else tensor[0]


def load_metadata(path: Path) -> Record:
    """Unpickle a `.metadata` file.

    Raises:
        UserError: if it is damaged or names classes that such files do not contain.
    """
    try:
        with path.open("rb") as file:
            metadata = MetadataUnpickler(file).load()
    except Exception as error:  # damaged pickles raise nearly anything
        raise refuse_file(path, error, "a list of tensors") from None
    if not isinstance(metadata, Record):
        raise DamagedFileError(f"{path}: holds {type(metadata).__name__}, not the metadata of a checkpoint")
    return metadata


def list_tensor_blocks(folder: Path, metadata: Record) -> dict[str, TensorBlocks]:
    """The tensors that a checkpoint's metadata lists, by name, without objects of other kinds."""
    listed, stored = metadata.get("state_dict_metadata"), metadata.get("storage_data")
    tensors = {
        name: TensorBlocks(read_sizes(entry.get("size")), read_dtype(entry.get("properties")), [])
        for name, entry in listed.items()
        if entry.get("size") is not None
    }
    shapes = {
        (name, read_sizes(chunk.get("offsets"))): read_sizes(chunk.get("sizes"))
        for name in tensors
        for chunk in listed[name].get("chunks")
    }
    for index, info in stored.items():
        name = index.get("fqn")
        if name not in tensors:
            continue
        if info.get("transform_descriptors"):
            raise UserError(f"{folder}: {name} is stored compressed, which is not supported; save it without")
        offset = (0,) * len(tensors[name].shape) if index.get("offset") is None else read_sizes(index.get("offset"))
        path, (start, length) = join_inside(folder, info.get("relative_path")), (info.get("offset"), info.get("length"))
        tensors[name].blocks.append(StoredBlock(offset, shapes[name, offset], path, *read_sizes((start, length))))
    return tensors


def read_sizes(values: Any) -> tuple[int, ...]:
    """A tuple of sizes or offsets; raises a ValueError for other values."""
    if not isinstance(values, tuple) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values!r} are not sizes")
    return values


def read_dtype(properties: Any) -> torch.dtype:
    """The type of a tensor's values, the first of its properties; raises a ValueError for other values."""
    state = properties.__dict__.get("state")
    dtype = state.get("dtype") if isinstance(state, Mapping) else state[0]
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"{dtype!r} is not a type of values")
    return dtype


def read_block(block: StoredBlock, name: str) -> Tensor:
    """The values of a block, which its file holds as `torch.save` wrote them."""
    source = f"{block.path}: {name}"
    try:
        with block.path.open("rb") as file:
            data = read_block_bytes(file, block)
    except OSError as error:
        raise DamagedFileError(f"{source}: {error.strerror or error}") from None
    tensor = load_tensor(data, source)
    if tuple(tensor.shape) != block.shape:
        raise DamagedFileError(f"{source}: {list(tensor.shape)}, but .metadata lists {list(block.shape)}")
    return tensor


def read_block_bytes(file: BinaryIO, block: StoredBlock) -> bytes:
    """The bytes of a block."""
    file.seek(block.start)
    data = file.read(block.length)
    if len(data) != block.length:
        raise DamagedFileError(f"{block.path}: ends after {file.seek(0, 2)} bytes; it was not saved whole")
    return data


def load_run_arguments(folder: Path) -> dict[str, Any] | None:
    """The arguments of the run that wrote a checkpoint; None if its `common.pt` has none.

    Raises:
        UserError: if the file is damaged or holds other classes than Megatron-core's.
    """
    path = folder / COMMON
    if not path.is_file():
        return None
    with torch.serialization.safe_globals([(Record, name) for name in COMMON_RECORDS]):
        content = load_torch_file(path)
    arguments = content.get("args") if isinstance(content, dict) else None
    state = arguments.__dict__.get("state") if isinstance(arguments, Record) else None
    return state if isinstance(state, dict) else None
