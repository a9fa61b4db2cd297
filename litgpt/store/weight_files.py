"""The weights in a model folder, whatever files they are in: their names, and one tensor at a time."""

import os
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
from litgpt.store.collectives_io import warn_once
from litgpt.store.gguf_files import GGUFFile, find_gguf
from litgpt.store.legacy import load_state_dict
from litgpt.store.megatron_files import METADATA, TorchDistFolder, find_torch_dist
from litgpt.store.safetensors_files import SafetensorsFiles

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
LIT_MODEL = "lit_model.pth"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CONSOLIDATED = "consolidated"  # the beginning of the names of Mistral's own files

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
    """Open the weights in a model folder: safetensors, a training checkpoint, LitGPT's, `.bin`, GGUF or Megatron's.

    Args:
        folder: a model folder, or a file with weights.

    Raises:
        UserError: if there are none, a shard is missing or damaged, or an index names a file outside the folder.
    """
    path = choose_weights(folder)
    if path is None:
        raise UserError(
            f"{folder}: no weights in it; a model folder holds {SAFETENSORS}, {LIT_MODEL}, {BIN}, one .gguf or a "
            "torch_dist checkpoint of Megatron-core"
        )
    if path.is_dir():
        return open_safetensors(path, list_loose(path))
    if path.name == PROGRESS:
        return open_training_checkpoint(path.parent)
    if path.suffix == ".gguf":
        file = GGUFFile(path)
        return WeightSource(path, file.names, file.read_meta, file.read, table=file.name_table)
    if path.name == METADATA:
        megatron = TorchDistFolder(path.parent)
        return WeightSource(path.parent, megatron.names, megatron.read_meta, megatron.read, table=megatron.name_table)
    if path.suffix in (".pth", ".bin"):
        return open_torch_files([path])
    if path.suffix == ".safetensors":
        return open_safetensors(path, [path])
    if path.name == BIN_INDEX:
        return open_torch_files(read_index(path, ".bin")[0])
    return open_safetensors(path, *read_index(path, ".safetensors"))


def choose_weights(folder: Path) -> Path | None:
    """The file, the index or the folder of loose files that the weights in a folder are read from; None without any.

    Of several sets of weights, transformers' choice is read: a whole file rather than an index, safetensors rather
    than `.bin`. A line on standard error names the others, which are not opened, once in a process.
    """
    if folder.is_file():
        return folder
    sets = list_weights(folder)
    if not sets or sets[0].suffix == ".gguf":
        return find_gguf(folder)  # refuses several
    read, *unread = map(name_weights, sets)
    if unread:
        warn_once(f"{folder}: reads {read}, not {', '.join(unread)} beside it, which may hold other weights")
    return sets[0]


def list_weights(folder: Path) -> list[Path]:
    """The sets of weights in a folder, the one that is read first: each as its file, its index, or the folder of files.

    An index of which no shard is there comes last.
    """
    indexes = [folder / name for name in (SAFETENSORS_INDEX, BIN_INDEX) if (folder / name).is_file()]
    absent = [index for index in indexes if not has_shards(index)]
    whole = [folder / SAFETENSORS, folder / SAFETENSORS_INDEX]
    if (folder / MANIFEST).is_file():
        whole.append(folder / PROGRESS)
    sets = [path for path in whole if path.is_file() and path not in absent]
    if folder / SAFETENSORS_INDEX not in indexes and list_loose(folder):
        sets.append(folder)
    sets += [path for path in (folder / name for name in (LIT_MODEL, BIN, BIN_INDEX)) if path.is_file()]
    sets += [*sorted(folder.glob("*.gguf")), *sorted(folder.glob(f"{CONSOLIDATED}*.safetensors"))]
    sets += [megatron / METADATA] if (megatron := find_torch_dist(folder)) else []
    return [path for path in sets if path not in absent] + absent


def list_loose(folder: Path) -> list[Path]:
    """The safetensors files with weights that no index lists: not a training checkpoint's, an adapter's or Mistral's.

    Mistral's `consolidated*.safetensors` are the same weights under other names.
    """
    is_checkpoint = (folder / PROGRESS).is_file()
    return [
        path
        for path in sorted(folder.glob("*.safetensors"))
        if path.name not in (SAFETENSORS, ADAPTER_WEIGHTS)
        and not path.name.startswith(CONSOLIDATED)
        and not (is_checkpoint and path.name.startswith("shard-"))
    ]


def has_shards(index: Path) -> bool:
    """Whether any file that an index lists is there; True for a damaged index, which is refused when it is opened."""
    try:
        content = read_json(index)
    except UserError:
        return True
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    return not names or any(os.path.isfile(index.parent / name) for name in names)


def name_weights(path: Path) -> str:
    """A set of weights for a message: the name of its file or index, or its first loose file."""
    return list_loose(path)[0].name if path.is_dir() else path.name


def list_safetensors(folder: Path) -> list[Path]:
    """The safetensors files that `open_weights` reads the weights in a folder from, and their index."""
    path = choose_weights(folder)
    if path is not None and path.is_dir():
        return list_loose(path)
    if path is None or ".safetensors" not in path.name:
        return []
    return [path] if path.suffix == ".safetensors" else [path, *read_index(path, ".safetensors")[0]]


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
            block = dequantize.read_block_size(source.path if source.path.is_dir() else source.path.parent)
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
