"""The weights in a model folder, whatever files they are in: their names, and one tensor at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from litgpt.errors import UserError
from litgpt.files import MANIFEST, DamagedFileError, join_inside, read_json
from litgpt.model.names import NameTable
from litgpt.store import dequantize
from litgpt.store.checkpoint_load import PROGRESS, open_checkpoint
from litgpt.store.gguf_files import GGUFFile, find_gguf
from litgpt.store.legacy import load_state_dict
from litgpt.store.safetensors_files import SafetensorsFiles

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
LIT_MODEL = "lit_model.pth"

Dequantize = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class WeightSource:
    """The tensors of a model's files.

    Attributes:
        read_meta: a tensor's shape and type, on the meta device.
        read: its values; a view of the file where possible, which must not be written to.
        release: free the memory of a tensor that was read.
        is_mapped: whether tensors are memory-mapped, and nothing else shares the memory.
        table: the name table, if the file format determines it; None if the folder does.
    """

    path: Path
    names: list[str]
    read_meta: Callable[[str], Tensor]
    read: Callable[[str], Tensor]
    release: Callable[[str], None] = lambda _name: None
    is_mapped: bool = False
    table: NameTable | None = None


def open_weights(folder: Path) -> WeightSource:
    """Open the weights in a model folder: safetensors, a training checkpoint, LitGPT's file, `.bin` or GGUF.

    Args:
        folder: a model folder, or a file with weights.

    Raises:
        UserError: if there are none, a shard is missing or damaged, or an index names a file outside the folder.
    """
    if folder.is_file() and folder.suffix in (".pth", ".bin"):
        return open_torch_files([folder])
    if folder.is_file() and folder.suffix == ".safetensors":
        return open_safetensors(folder, [folder])
    if (folder / SAFETENSORS_INDEX).is_file():
        return open_safetensors(folder / SAFETENSORS_INDEX, *read_index(folder / SAFETENSORS_INDEX, ".safetensors"))
    if (folder / SAFETENSORS).is_file():
        return open_safetensors(folder / SAFETENSORS, [folder / SAFETENSORS])
    if (folder / PROGRESS).is_file() and (folder / MANIFEST).is_file():
        return open_training_checkpoint(folder)
    if loose := sorted(folder.glob("*.safetensors")):
        return open_safetensors(folder, loose)
    if (folder / LIT_MODEL).is_file():
        return open_torch_files([folder / LIT_MODEL])
    if (folder / BIN_INDEX).is_file():
        return open_torch_files(read_index(folder / BIN_INDEX, ".bin")[0])
    if (folder / BIN).is_file():
        return open_torch_files([folder / BIN])
    if path := find_gguf(folder):
        file = GGUFFile(path)
        return WeightSource(path, file.names, file.read_meta, file.read, table=file.name_table)
    raise UserError(f"{folder}: no weights in it; a model folder holds {SAFETENSORS}, {LIT_MODEL}, {BIN} or one .gguf")


def list_safetensors(folder: Path) -> list[Path]:
    """The safetensors files that `open_weights` reads the weights in a folder from, and their index."""
    if (folder / SAFETENSORS_INDEX).is_file():
        return [folder / SAFETENSORS_INDEX, *read_index(folder / SAFETENSORS_INDEX, ".safetensors")[0]]
    if (folder / SAFETENSORS).is_file():
        return [folder / SAFETENSORS]
    return [] if (folder / PROGRESS).is_file() else sorted(folder.glob("*.safetensors"))


def read_index(index: Path, suffix: str) -> tuple[list[Path], dict[str, str]]:
    """The shards that an index lists, and its map from tensor to shard; only files inside its folder."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise DamagedFileError(f"{index}: weight_map is not a mapping of tensor names to file names")
    shards = [join_inside(index.parent, name) for name in sorted(set(weight_map.values()))]
    for shard in shards:
        if shard.suffix != suffix or not shard.is_file():
            raise DamagedFileError(f"{index}: lists {shard.name}, which is not a {suffix} file in this folder")
    return shards, weight_map


def open_safetensors(path: Path, shards: list[Path], weight_map: Mapping[str, str] | None = None) -> WeightSource:
    """Open a set of safetensors files; weights in 4 or 8 bits are dequantized when read."""
    files = SafetensorsFiles(shards)
    for name, shard in (weight_map or {}).items():
        if name not in files.tensors or files.tensors[name].blocks[0].path.name != Path(shard).name:
            raise DamagedFileError(f"{path}: {name} is not in {shard}, where the index says it is")
    for name, tensor in files.tensors.items():
        if len(tensor.blocks) > 1:
            raise DamagedFileError(
                f"{path}: {name} is in {tensor.blocks[0].path.name} and in {tensor.blocks[1].path.name}"
            )
    names = list(files.tensors)
    return dequantize_source(WeightSource(path, names, files.read_meta, files.read, files.release, is_mapped=True))


def open_training_checkpoint(folder: Path) -> WeightSource:
    """Open the weights of a training checkpoint, under our own names."""
    files = open_checkpoint(folder)
    names = [name.removeprefix("model.") for name in files.tensors if name.startswith("model.")]

    def add_prefix(read: Callable[[str], Any]) -> Callable[[str], Any]:
        return lambda name: read(f"model.{name}")

    return WeightSource(folder, names, add_prefix(files.read_meta), add_prefix(files.read), add_prefix(files.release))


def open_torch_files(paths: list[Path]) -> WeightSource:
    """Open a set of `.pth` or `.bin` files."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= load_state_dict(path)
    return WeightSource(paths[0], list(tensors), lambda name: tensors[name].to("meta"), tensors.__getitem__)


def dequantize_source(source: WeightSource) -> WeightSource:
    """Wrap a source so that weights in 8 or 4 bits are dequantized when read, and their scales are not listed."""
    names = set(source.names)
    quantized: dict[str, tuple[Dequantize, str, str]] = {}  # how, the name of the values, that of the scales
    for name in source.names:
        weight, blocks = name.removesuffix(dequantize.FP8_SCALE), name.removesuffix(dequantize.MXFP4_BLOCKS)
        scales = blocks + dequantize.MXFP4_SCALES
        if weight != name and weight in names:
            block = dequantize.read_block_size(source.path.parent)
            quantized[weight] = (partial(dequantize.dequantize_fp8, block=block), weight, name)
        elif blocks != name and scales in names:
            quantized[blocks] = (dequantize.dequantize_mxfp4, name, scales)
    if not quantized:
        return source

    def read_dequantized(name: str, read: Callable[[str], Tensor]) -> Tensor:
        if name not in quantized:
            return read(name)
        convert, values, scales = quantized[name]
        try:
            return convert(read(values), read(scales))
        except UserError as error:
            raise UserError(f"{source.path}: {name}: {error}") from None

    def read(name: str) -> Tensor:
        tensor = read_dequantized(name, source.read)
        if name in quantized:
            release(name)
        return tensor

    def release(name: str) -> None:
        for stored_name in quantized[name][1:] if name in quantized else (name,):
            source.release(stored_name)

    stored = {name for _, *names in quantized.values() for name in names}
    listed = [name for name in source.names if name not in stored] + list(quantized)
    return WeightSource(source.path, listed, lambda name: read_dequantized(name, source.read_meta), read, release)
