"""Model folders: read those of Hugging Face and LitGPT, write ones that transformers loads as they stand."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from litgpt.errors import UserError
from litgpt.files import Damaged, inside, read_json, staged_folder, write_json
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.names import Step, Table
from litgpt.model.registry import families, family_of, litgpt_names
from litgpt.store.checkpoint import Group, Warn, agree, place_of, say
from litgpt.store.legacy import state_dict
from litgpt.store.state import model_tensors
from litgpt.store.tensors import TensorFiles, part_of, write_tensors

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
LIT_MODEL = "lit_model.pth"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")


@dataclass(frozen=True)
class Source:
    """The tensors that a folder publishes: where, under which names, and how to read one."""

    where: Path
    names: list[str]
    read: Callable[[str], Tensor]


def source_in(folder: Path) -> Source:
    """The weights in a model folder: safetensors first, then LitGPT's file, then `.bin` files.

    Raises:
        UserError: if there are none, a shard is missing or damaged, or an index names a file outside the folder.
    """
    if (folder / SAFETENSORS_INDEX).is_file():
        return from_safetensors(folder / SAFETENSORS_INDEX, *indexed(folder / SAFETENSORS_INDEX, ".safetensors"))
    if (folder / SAFETENSORS).is_file():
        return from_safetensors(folder / SAFETENSORS, [folder / SAFETENSORS])
    if loose := sorted(folder.glob("*.safetensors")):
        return from_safetensors(folder, loose)
    if (folder / LIT_MODEL).is_file():
        return from_torch([folder / LIT_MODEL])
    if (folder / BIN_INDEX).is_file():
        return from_torch(indexed(folder / BIN_INDEX, ".bin")[0])
    if (folder / BIN).is_file():
        return from_torch([folder / BIN])
    raise UserError(f"{folder}: no weights in it; a model folder holds {SAFETENSORS}, {LIT_MODEL} or {BIN}")


def indexed(index: Path, suffix: str) -> tuple[list[Path], dict[str, str]]:
    """The shards that an index lists, and which tensor it promises in which; only files inside its folder."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise Damaged(f"{index}: weight_map is not a mapping of tensor names to file names")
    shards = [inside(index.parent, name) for name in sorted(set(places.values()))]
    for shard in shards:
        if shard.suffix != suffix or not shard.is_file():
            raise Damaged(f"{index}: lists {shard.name}, which is not a {suffix} file in this folder")
    return shards, places


def from_safetensors(where: Path, shards: list[Path], places: Mapping[str, str] | None = None) -> Source:
    """A set of safetensors files as a source."""
    files = TensorFiles(shards)
    for name, shard in (places or {}).items():
        if name not in files.wholes or files.wholes[name].blocks[0][0].name != Path(shard).name:
            raise Damaged(f"{where}: {name} is not in {shard}, where the index says it is")
    for name, whole in files.wholes.items():
        if len(whole.blocks) > 1:
            raise Damaged(f"{where}: {name} is in {whole.blocks[0][0].name} and in {whole.blocks[1][0].name}")
    return Source(where, list(files.wholes), files.whole)


def from_torch(paths: list[Path]) -> Source:
    """A set of `.pth` or `.bin` files as a source."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= state_dict(path)
    return Source(paths[0], list(tensors), tensors.__getitem__)


def table_for(source: Source, folder: Path, config: Config) -> Table | None:
    """The table that the source's names follow; None for our own names."""
    if "embedding.weight" in source.names:
        return None
    if any(name.startswith("transformer.wte.") for name in source.names) and source.where.suffix != ".bin":
        return litgpt_names()
    published = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    kind = published.get("model_type") if isinstance(published, dict) else None
    family = next((one for one in families().values() if one.model_type == kind), None) or family_of(config)
    if family is None:
        raise UserError(
            f"{folder}: no known architecture has this shape and these tensor names; is config.json missing?"
        )
    return family.tensors


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Every parameter of a model of this shape, by name."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in GPT(config).named_parameters()}


def tensors_in(folder: Path, config: Config) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model folder under our names, one at a time, mostly memory-mapped.

    Raises:
        UserError: naming a tensor that only the folder or only the shape has, or of another shape or type.
    """
    source = source_in(folder)
    table = table_for(source, folder, config)
    if table is None:
        steps = [Step(name, (name,), "rename") for name in source.names]
    else:
        try:
            steps = table.reading(source.names, config)
        except UserError as error:
            raise UserError(f"{source.where}: {error}") from None
    shapes = shapes_of(config)
    tied = [step for step in steps if config.tie_embeddings and step.ours == ("head.weight",)]
    found = [name for step in steps if step not in tied for name in step.ours]
    check_names(source.where, found, shapes)
    by_name = {name: step for step in steps for name in step.ours}
    for step in tied:
        if not torch.equal(source.read(step.theirs), source.read(by_name["embedding.weight"].theirs)):
            raise UserError(
                f"{source.where}: {step.theirs} differs from {by_name['embedding.weight'].theirs}, but the model ties "
                "them; set model_config.tie_embeddings: false"
            )
    for step in steps:
        if step not in tied:
            yield from checked_parts(source, step, shapes, config)


def check_names(where: Path, found: list[str], shapes: Mapping[str, Any]) -> None:
    """Refuse a folder that lacks tensors, holds unknown ones, or holds one twice."""
    missing, unknown = sorted(shapes.keys() - set(found)), sorted(set(found) - shapes.keys())
    twice = sorted({name for name in found if found.count(name) > 1}) if len(set(found)) < len(found) else []
    for kind, names in (("lacks", missing), ("has tensors that the model has not:", unknown), ("holds twice", twice)):
        if names:
            some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise UserError(f"{where}: {kind} {some}; use the model_config of this folder")


def checked_parts(
    source: Source, step: Step, shapes: Mapping[str, tuple[int, ...]], config: Config
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors out of one published one, if type and shape are right."""
    tensor = source.read(step.theirs)
    if not tensor.is_floating_point():
        raise UserError(f"{source.where}: {step.theirs} is of type {tensor.dtype}; weights are floating-point numbers")
    try:
        parts = step.split(tensor, config) if tensor.dim() else [tensor]
    except UserError as error:
        raise UserError(f"{source.where}: {error}") from None
    for name, part in zip(step.ours, parts, strict=True):
        if tuple(part.shape) != shapes[name]:
            hint = "the shape in its model_config.yaml or config.json"
            if name in ("embedding.weight", "head.weight") and part.shape[1:] == shapes[name][1:]:
                hint = f"model_config.padded_vocab_size: {part.shape[0]}"
            here, there = list(part.shape), list(shapes[name])
            raise UserError(f"{source.where}: {step.theirs} is {here}, the model's {name} {there}; use {hint}")
        yield name, part


@torch.no_grad()
def load(model: nn.Module, folder: Path | str, *, config: Config | None = None) -> None:
    """Fill a model from a model folder; each rank copies only its part of a sharded parameter, cast to its type.

    Args:
        config: the model's shape; `model.config` if None.

    Raises:
        UserError: as `tensors_in`. The model may then be filled in part.
    """
    shape: Config = config or model.config  # type: ignore[assignment]
    parameters = dict(model_tensors(model))
    for name, tensor in tensors_in(Path(folder), shape):
        part = part_of(parameters[name])
        where = tuple(slice(start, start + size) for start, size in zip(part.offset, part.local.shape, strict=True))
        part.local.copy_(tensor[where])


class ShardWriter:
    """Published tensors gathered into files of at most so many bytes, and the index over them."""

    def __init__(self, folder: Path, shard_bytes: float) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.waiting: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        held = sum(one.nbytes for one in self.waiting.values())
        if self.waiting and held + tensor.nbytes > self.shard_bytes:
            self._flush()
        self.waiting[name] = tensor
        self.total += tensor.nbytes

    def _flush(self) -> None:
        write_tensors(self.folder / f"{len(self.shards)}.safetensors", self.waiting, {"format": "pt"})
        self.shards.append(list(self.waiting))
        self.waiting = {}

    def close(self) -> None:
        """Write what waits, and give the files their names now that their number is known."""
        self._flush()
        if len(self.shards) == 1:
            (self.folder / "0.safetensors").rename(self.folder / SAFETENSORS)
            return
        places: dict[str, str] = {}
        for number, names in enumerate(self.shards):
            shard = f"model-{number + 1:05d}-of-{len(self.shards):05d}.safetensors"
            (self.folder / f"{number}.safetensors").rename(self.folder / shard)
            places |= dict.fromkeys(names, shard)
        write_json(self.folder / SAFETENSORS_INDEX, {"metadata": {"total_size": self.total}, "weight_map": places})


def save(
    folder: Path | str,
    *,
    config: Config,
    tensors: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
    tokenizer_dir: Path | str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: float = 5e9,
    replace: bool = False,
    warn: Warn = say,
) -> None:
    """Write a model folder whole or not at all, as its published architecture has it, so that transformers loads it.

    Args:
        tensors: every parameter once, under our names.
        tokenizer_dir: a folder whose tokenizer files are copied.
        dtype: cast to this type; None keeps each tensor's own.
        shard_bytes: the size above which the weights are split over files.
        replace: take the place of a folder that exists.
        warn: told if no published architecture has this shape; the folder then keeps our tensor names.

    Raises:
        UserError: if the folder holds something already, or a tensor is missing, unknown or of another shape.
    """
    family = family_of(config)
    shapes = shapes_of(config)
    own = [Step(name, (name,), "rename") for name in shapes]
    steps = own if family is None else family.tensors.writing(shapes, config)
    with staged_folder(Path(folder), replace=replace) as staged:
        writer = ShardWriter(staged, shard_bytes)
        types = set()
        for name, tensor in joined(steps, tensors, shapes, config):
            cast = tensor.detach().to("cpu", dtype or tensor.dtype)
            types.add(cast.dtype)
            writer.add(name, cast)
        writer.close()
        (staged / "model_config.yaml").write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
        special = copy_tokenizer(Path(tokenizer_dir), staged) if tokenizer_dir else {}
        if family is None:
            warn(
                f"{folder}: no published architecture has this shape; its tensors keep our names, only litgpt loads it"
            )
            return
        kept = str(types.pop() if len(types) == 1 else torch.float32).removeprefix("torch.")
        write_json(staged / "config.json", {**family.config_json(config), "torch_dtype": kept, **special})
        if not (staged / "generation_config.json").exists():
            write_json(staged / "generation_config.json", {"_from_model_config": True, **special})


def joined(
    steps: list[Step],
    tensors: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    config: Config,
) -> Iterator[tuple[str, Tensor]]:
    """Published tensors, each as soon as all of ours that it is made of have come by."""
    step_of = {name: step for step in steps for name in step.ours}
    waiting: dict[str, Tensor] = {}
    missing = set(shapes)
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if name not in missing:
            raise UserError(f"{name}: not a tensor of this model, or given twice; check model_config.yaml")
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(f"{name}: {list(tensor.shape)} here, {list(shapes[name])} in the model's shape")
        missing.remove(name)
        waiting[name] = tensor
        step = step_of[name]
        if all(part in waiting for part in step.ours):
            yield step.theirs, step.join([waiting.pop(part) for part in step.ours], config)
    if missing:
        raise UserError(
            f"{', '.join(sorted(missing)[:5])}: missing, but the model's shape has it; check model_config.yaml"
        )


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of the tokenizer in a folder, by name."""
    return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}


def copy_tokenizer(source: Path, target: Path) -> dict[str, Any]:
    """Copy a tokenizer's files; returns what config.json says of it: the numbers of its special tokens."""
    for name, path in tokenizer_files(source).items():
        shutil.copyfile(path, target / name)
    special: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (source / name).is_file():
            values = read_json(source / name)
            known = {f"{token}_id": values.get(f"{token}_id") for token in SPECIAL_TOKENS}
            special |= {key: value for key, value in known.items() if value is not None}
    return special or named_tokens(source)


def named_tokens(source: Path) -> dict[str, int]:
    """The numbers of the special tokens that tokenizer_config.json names."""
    if not ((source / "tokenizer_config.json").is_file() and (source / "tokenizer.json").is_file()):
        return {}
    from tokenizers import Tokenizer

    values = read_json(source / "tokenizer_config.json")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    found = {}
    for token in SPECIAL_TOKENS:
        text = values.get(token)
        text = text.get("content") if isinstance(text, dict) else text
        number = tokenizer.token_to_id(text) if isinstance(text, str) else None
        if number is not None:
            found[f"{token}_id"] = number
    return found


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a model in full, one at a time; all ranks must iterate together, as shards are gathered."""
    for name, tensor in model_tensors(model):
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def save_model(folder: Path | str, model: nn.Module, *, config: Config, group: Group = None, **settings: Any) -> None:
    """Write a model folder from a model that may be spread over ranks; all ranks call it, the first one writes.

    Args:
        settings: as in `save`.

    Raises:
        UserError: on every rank, if the first could not write.
    """
    rank, _ = place_of(group)
    tensors = whole_tensors(model)
    error = ""
    if rank == 0:
        try:
            save(folder, config=config, tensors=tensors, **settings)
        except (UserError, OSError) as problem:
            error = str(problem)
    for _ in tensors:
        pass  # the other ranks, and a first one that failed, take part in every gathering
    error = agree(error, group)
    if error:
        raise UserError(f"{folder}: not written ({error})")
