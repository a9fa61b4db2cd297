"""The weights that a folder publishes, whatever files they are in: names, and one tensor at a time."""

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
from litgpt.store.legacy import state_dict
from litgpt.store.safetensors_files import SafetensorsFiles

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
LIT_MODEL = "lit_model.pth"

Dequantize = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class WeightSource:
    """The tensors that a folder publishes.

    Attributes:
        like: a tensor's shape and type, on the meta device.
        read: its values; a view of a file where that is possible, not to be written to.
        release: take what was read of it out of memory again.
        lends: whether what is read is memory-mapped, and nothing else shares it.
        table: what the names mean, if the kind of file settles that; None leaves it to the folder.
    """

    where: Path
    names: list[str]
    like: Callable[[str], Tensor]
    read: Callable[[str], Tensor]
    release: Callable[[str], None] = lambda name: None
    lends: bool = False
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
        return WeightSource(path, file.names, file.like, file.read, table=file.name_table)
    raise UserError(f"{folder}: no weights in it; a model folder holds {SAFETENSORS}, {LIT_MODEL}, {BIN} or one .gguf")


def list_safetensors(folder: Path) -> list[Path]:
    """The safetensors files that `open_weights` reads the weights in a folder from, and their index."""
    if (folder / SAFETENSORS_INDEX).is_file():
        return [folder / SAFETENSORS_INDEX, *read_index(folder / SAFETENSORS_INDEX, ".safetensors")[0]]
    if (folder / SAFETENSORS).is_file():
        return [folder / SAFETENSORS]
    return [] if (folder / PROGRESS).is_file() else sorted(folder.glob("*.safetensors"))


def read_index(index: Path, suffix: str) -> tuple[list[Path], dict[str, str]]:
    """The shards that an index lists, and which tensor it promises in which; only files inside its folder."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise DamagedFileError(f"{index}: weight_map is not a mapping of tensor names to file names")
    shards = [join_inside(index.parent, name) for name in sorted(set(places.values()))]
    for shard in shards:
        if shard.suffix != suffix or not shard.is_file():
            raise DamagedFileError(f"{index}: lists {shard.name}, which is not a {suffix} file in this folder")
    return shards, places


def open_safetensors(where: Path, shards: list[Path], places: Mapping[str, str] | None = None) -> WeightSource:
    """A set of safetensors files as a source; weights stored in 4 or 8 bits are read as what they stand for."""
    files = SafetensorsFiles(shards)
    for name, shard in (places or {}).items():
        if name not in files.wholes or files.wholes[name].blocks[0][0].name != Path(shard).name:
            raise DamagedFileError(f"{where}: {name} is not in {shard}, where the index says it is")
    for name, whole in files.wholes.items():
        if len(whole.blocks) > 1:
            raise DamagedFileError(f"{where}: {name} is in {whole.blocks[0][0].name} and in {whole.blocks[1][0].name}")
    return wrap_dequantized(WeightSource(where, list(files.wholes), files.like, files.whole, files.release, lends=True))


def open_training_checkpoint(folder: Path) -> WeightSource:
    """The weights of a training checkpoint as a source, under our own names."""
    files = open_checkpoint(folder)
    names = [name.removeprefix("model.") for name in files.wholes if name.startswith("model.")]

    def named(get: Callable[[str], Any]) -> Callable[[str], Any]:
        return lambda name: get(f"model.{name}")

    return WeightSource(folder, names, named(files.like), named(files.whole), named(files.release))


def open_torch_files(paths: Iterable[Path]) -> WeightSource:
    """A set of `.pth` or `.bin` files as a source."""
    tensors: dict[str, Tensor] = {}
    paths = list(paths)
    for path in paths:
        tensors |= state_dict(path)
    return WeightSource(paths[0], list(tensors), lambda name: tensors[name].to("meta"), tensors.__getitem__)


def wrap_dequantized(source: WeightSource) -> WeightSource:
    """A source in which weights that are stored in 8 or 4 bits appear as what they stand for."""
    known = set(source.names)
    packed: dict[str, tuple[Dequantize, str, str]] = {}
    for name in source.names:
        weight, blocks = name.removesuffix(FP8_SCALE), name.removesuffix(MXFP4_BLOCKS)
        if weight != name and weight in known:
            packed[weight] = (partial(dequantize_fp8, block=read_block_size(source.where.parent)), weight, name)
        elif blocks != name and blocks + MXFP4_SCALES in known:
            packed[blocks] = (dequantize_mxfp4, name, blocks + MXFP4_SCALES)
    if not packed:
        return source

    def unpack(name: str, get: Callable[[str], Tensor]) -> Tensor:
        if name not in packed:
            return get(name)
        dequantize, values, scales = packed[name]
        try:
            return dequantize(get(values), get(scales))
        except UserError as error:
            raise UserError(f"{source.where}: {name}: {error}") from None

    def read(name: str) -> Tensor:
        found = unpack(name, source.read)
        if name in packed:
            release(name)
        return found

    def release(name: str) -> None:
        for part in packed[name][1:] if name in packed else (name,):
            source.release(part)

    inner = {part for _, *parts in packed.values() for part in parts}
    names = [name for name in source.names if name not in inner] + list(packed)
    return WeightSource(source.where, names, lambda name: unpack(name, source.like), read, release)
