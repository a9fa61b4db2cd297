"""The weights in a model folder, whatever files they are in: their names, and one tensor at a time."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from litgpt.errors import UserError
from litgpt.files import MANIFEST, DamagedFileError, join_inside, read_json
from litgpt.model.names import NameTable
from litgpt.store.checkpoint_load import PROGRESS, open_checkpoint
from litgpt.store.dequantize import (
    FP8_SCALE,
    MXFP4_BLOCKS,
    MXFP4_SCALES,
    dequantize_fp8,
    dequantize_mxfp4,
    read_block_size,
)
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
        read: its values; a view of a file where that is possible, not to be written to.
        release: take what was read of it out of memory again.
        is_mapped: whether what is read is memory-mapped, and nothing else shares it.
        table: what the names mean, if the kind of file settles that; None leaves it to the folder.
    """

    path: Path
    names: list[str]
    read_meta: Callable[[str], Tensor]
    read: Callable[[str], Tensor]
    release: Callable[[str], None] = lambda _name: None
    is_mapped: bool = False
    table: NameTable | None = None


def open_weights(folder: Path) -> WeightSource:
    """The weights in a model folder: safetensors first, then a training checkpoint, LitGPT's file, `.bin`, GGUF.

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
    """A set of safetensors files as a source; weights in 4 or 8 bits are dequantized when read."""
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
    """The weights of a training checkpoint as a source, under our own names."""
    files = open_checkpoint(folder)
    names = [name.removeprefix("model.") for name in files.tensors if name.startswith("model.")]

    def add_prefix(read: Callable[[str], Any]) -> Callable[[str], Any]:
        return lambda name: read(f"model.{name}")

    return WeightSource(folder, names, add_prefix(files.read_meta), add_prefix(files.read), add_prefix(files.release))


def open_torch_files(paths: Iterable[Path]) -> WeightSource:
    """A set of `.pth` or `.bin` files as a source."""
    tensors: dict[str, Tensor] = {}
    paths = list(paths)
    for path in paths:
        tensors |= load_state_dict(path)
    return WeightSource(paths[0], list(tensors), lambda name: tensors[name].to("meta"), tensors.__getitem__)


def dequantize_source(source: WeightSource) -> WeightSource:
    """A source whose weights in 8 or 4 bits are dequantized when read, and whose scales are not listed."""
    names = set(source.names)
    quantized: dict[str, tuple[Dequantize, str, str]] = {}  # how, the name of the values, that of the scales
    for name in source.names:
        weight, blocks = name.removesuffix(FP8_SCALE), name.removesuffix(MXFP4_BLOCKS)
        if weight != name and weight in names:
            quantized[weight] = (partial(dequantize_fp8, block=read_block_size(source.path.parent)), weight, name)
        elif blocks != name and blocks + MXFP4_SCALES in names:
            quantized[blocks] = (dequantize_mxfp4, name, blocks + MXFP4_SCALES)
    if not quantized:
        return source

    def dequantize(name: str, read: Callable[[str], Tensor]) -> Tensor:
        if name not in quantized:
            return read(name)
        convert, values, scales = quantized[name]
        try:
            return convert(read(values), read(scales))
        except UserError as error:
            raise UserError(f"{source.path}: {name}: {error}") from None

    def read(name: str) -> Tensor:
        tensor = dequantize(name, source.read)
        if name in quantized:
            release(name)
        return tensor

    def release(name: str) -> None:
        for stored_name in quantized[name][1:] if name in quantized else (name,):
            source.release(stored_name)

    stored = {name for _, *names in quantized.values() for name in names}
    listed = [name for name in source.names if name not in stored] + list(quantized)
    return WeightSource(source.path, listed, lambda name: dequantize(name, source.read_meta), read, release)
