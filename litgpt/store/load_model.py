"""Read model folders, those of Hugging Face, of LitGPT and ours, under our names: memory-mapped, piece by piece."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from litgpt.errors import UserError
from litgpt.files import read_json
from litgpt.model import registry
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.names import NameTable, TensorMapping
from litgpt.store.collectives_io import Warn, get_rank_and_size, print_to_stderr
from litgpt.store.gguf_files import GGUFFile, find_gguf
from litgpt.store.safetensors_files import TensorShard, get_shard, intersect_blocks
from litgpt.store.state_dict import iter_model_tensors
from litgpt.store.weight_files import LIT_MODEL, WeightSource, open_weights

BLOCK_BYTES = 32 << 20  # what is read of a file at once, and so what stays in memory beside the model


def load_config(folder: Path) -> Config:
    """The shape of the model in a folder or a GGUF file: by model_config.yaml, config.json, or the GGUF file itself."""
    told = any((folder / name).is_file() for name in ("model_config.yaml", "config.json"))
    if not told and (path := find_gguf(folder)):
        values = GGUFFile(path).config_json
        family = next(one for one in registry.load_families().values() if one.model_type == values["model_type"])
        return Config(**family.read(values, name=path.stem).to_dict())
    config = Config.from_checkpoint(folder)
    return untie_if_saved_apart(folder, config) if config.tie_embeddings and (folder / LIT_MODEL).is_file() else config


def untie_if_saved_apart(folder: Path, config: Config) -> Config:
    """The shape with a head of its own if LitGPT's file has one: it trains the two matrices of a tied model apart."""
    source = open_weights(folder)
    head, embedding = "lm_head.weight", "transformer.wte.weight"
    if not {head, embedding} <= set(source.names) or torch.equal(source.read(head), source.read(embedding)):
        return config
    return replace(config, tie_embeddings=False)


def find_name_table(source: WeightSource, folder: Path, config: Config) -> NameTable | None:
    """The table that the source's names follow; None for our own names."""
    if source.table or "embedding.weight" in source.names:
        return source.table
    if any(name.startswith("transformer.wte.") for name in source.names) and source.where.suffix == ".pth":
        return registry.load_litgpt_table()
    folder = folder.parent if folder.is_file() else folder
    published = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    kind = published.get("model_type") if isinstance(published, dict) else None
    family = next((one for one in registry.load_families().values() if one.model_type == kind), None)
    family = family or registry.find_family(config)
    if family is None:
        raise UserError(
            f"{folder}: no known architecture has this shape and these tensor names; is config.json missing?"
        )
    return family.tensors


def get_parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every parameter of a model of this shape, by name."""
    return {name: tuple(parameter.shape) for name, parameter in GPT.on_meta(config).named_parameters()}


@dataclass(frozen=True)
class PublishedTensor:
    """A published tensor, not read yet, and what it becomes of ours."""

    source: WeightSource
    step: TensorMapping
    config: Config
    shapes: Mapping[str, tuple[int, ...]]

    def parts(self) -> dict[str, Tensor]:
        """Our tensors (or one expert's slice of each) in full: views of the file where the layout allows it."""
        return self._split(self.source.read(self.step.hf_name))

    def _split(self, tensor: Tensor) -> dict[str, Tensor]:
        try:
            return dict(zip(self.step.names, self.step.split(tensor, self.config), strict=True))
        except UserError as error:
            raise UserError(f"{self.source.where}: {error}") from None

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape that the model asks of one of the parts."""
        return self.shapes[name] if self.step.expert is None else self.shapes[name][1:]

    def check(self) -> None:
        """Hold type and shape against the model's; looks at no values.

        Raises:
            UserError: naming the published tensor.
        """
        like = self.source.like(self.step.hf_name)
        where, theirs = self.source.where, self.step.hf_name
        if not like.is_floating_point():
            raise UserError(f"{where}: {theirs} is of type {like.dtype}; weights are floating-point numbers")
        if like.dtype.itemsize == 1:
            raise UserError(f"{where}: {theirs} is of type {like.dtype} without scales; use weights that are whole")
        for name, part in self._split(like).items():
            here, there = tuple(part.shape), self.shape_of(name)
            if here != there:
                hint = "the shape in its model_config.yaml or config.json"
                if name in ("embedding.weight", "head.weight") and here[1:] == there[1:]:
                    hint = f"model_config.padded_vocab_size: {here[0]}"
                raise UserError(f"{where}: {theirs} is {list(here)}, the model's {name} {list(there)}; use {hint}")

    def map_into(self, parameters: Mapping[str, Tensor]) -> bool:
        """Let a parameter be a view of the file, if it has the file's type and layout and is whole, on the CPU."""
        if not self.source.lends or self.step.kind != "rename" or self.step.expert is not None:
            return False
        ((name, view),) = self.parts().items()
        parameter = parameters.get(name)
        if parameter is None:
            return False
        fits = not isinstance(parameter, DTensor) and parameter.device.type == "cpu" and parameter.dtype == view.dtype
        if not fits or not view.is_contiguous() or view.data_ptr() % view.element_size():
            return False
        parameter.data = view
        return True

    def copy_to(self, ranks_parts: Mapping[str, TensorShard]) -> None:
        """Copy what lies in a rank's parts of our tensors, a block of rows at a time; looks at no other values.

        The values are cast to the type of the parts, and sent to their device.
        """
        here = (name for name in self.step.names if name in ranks_parts)  # the others lie on other stages
        meets = {name: found for name in here if (found := self._meet(name, ranks_parts[name]))}
        if not meets:
            return
        tensor = self.source.read(self.step.hf_name)
        if self.step.kind == "grouped":  # to part the rows would copy all of them, so only their numbers are parted
            numbers = self._split(torch.arange(tensor.shape[0])[:, None])
            for name, (target, where) in meets.items():
                rows = numbers[name][where[0], 0]
                self._copy(target, rows, tensor, lambda some: tensor[some][:, *where[1:]])  # noqa: B023 - used at once
        else:
            parts = self._split(tensor)
            for name, (target, where) in meets.items():
                self._copy(target, parts[name][where], tensor, lambda some: some)

    def _copy(self, target: Tensor, rows: Tensor, tensor: Tensor, values: Callable[[Tensor], Tensor]) -> None:
        for mine, theirs in zip(split_rows(target, tensor), split_rows(rows, tensor), strict=True):
            mine.copy_(values(theirs))
            self.source.release(self.step.hf_name)

    def _meet(self, name: str, part: TensorShard) -> tuple[Tensor, tuple[slice, ...]] | None:
        """The values of a rank that a part fills, and where in the part they lie; None if it fills none."""
        local, offset, shape = part.local.detach(), part.offset, self.shape_of(name)
        if self.step.expert is not None:
            here = self.step.expert - offset[0]
            if not 0 <= here < local.shape[0]:
                return None
            local, offset = local[here], offset[1:]
        meet = intersect_blocks((0,) * len(shape), shape, offset, tuple(local.shape))
        return (local[meet[1]], meet[0]) if meet else None


def split_rows(tensor: Tensor, like: Tensor) -> list[Tensor]:
    """A tensor in runs of rows, as many in each as come to `BLOCK_BYTES` in `like`."""
    if not tensor.dim():
        return [tensor]
    row_bytes = max(1, like.nbytes // max(1, like.shape[0]))
    return list(tensor.split(max(1, BLOCK_BYTES // row_bytes)))


def list_published(folder: Path, config: Config, *, warn: Warn = print_to_stderr) -> list[PublishedTensor]:
    """Every tensor of a model in a folder, each checked by name, type and shape; no values are read.

    Args:
        folder: a model folder, or a `.gguf` file.
        warn: told in one line how many published tensors the model has no place for.

    Raises:
        UserError: naming a tensor that only the folder or only the shape has, or of another shape or type.
    """
    source = open_weights(folder)
    table = find_name_table(source, folder, config)
    steps = steps_for(source, table, config)
    unread = table.left_unread(source.names, config) if table else []
    if unread:
        warn(f"{source.where}: {len(unread)} tensors of parts that the model has not are left out, first {unread[0]}")
    shapes = get_parameter_shapes(config)
    kept = [step for step in steps if not (config.tie_embeddings and step.names == ("head.weight",))]
    check_names(source.where, kept, shapes)
    for step in steps:
        if step not in kept:
            check_tied(source, step, next(one for one in kept if "embedding.weight" in one.names))
    tensors = [PublishedTensor(source, step, config, shapes) for step in kept]
    for tensor in tensors:
        tensor.check()
    return tensors


def steps_for(source: WeightSource, table: NameTable | None, config: Config) -> list[TensorMapping]:
    """How each published tensor becomes ours."""
    if table is None:
        return [TensorMapping(name, (name,), "rename") for name in source.names]
    try:
        return table.map_hf_names(source.names, config)
    except UserError as error:
        raise UserError(f"{source.where}: {error}") from None


def check_names(where: Path, steps: list[TensorMapping], shapes: Mapping[str, Any]) -> None:
    """Refuse a folder that lacks tensors, holds unknown ones, or holds one twice."""
    found = Counter((name, step.expert) for step in steps for name in step.names)
    names = {name for name, _ in found}
    missing, unknown = sorted(shapes.keys() - names), sorted(names - shapes.keys())
    twice = sorted({name for (name, _), times in found.items() if times > 1})
    for kind, wrong in (("lacks", missing), ("has tensors that the model has not:", unknown), ("holds twice", twice)):
        if wrong:
            some = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise UserError(f"{where}: {kind} {some}; use the model_config of this folder")


def check_tied(source: WeightSource, head: TensorMapping, embedding: TensorMapping) -> None:
    """Refuse a head that is published beside the embedding it is tied to, and differs from it."""
    one, other = source.read(head.hf_name), source.read(embedding.hf_name)
    same = one.shape == other.shape and all(
        torch.equal(*pair) for pair in zip(split_rows(one, one), split_rows(other, one), strict=True)
    )
    source.release(head.hf_name)
    source.release(embedding.hf_name)
    if not same:
        raise UserError(
            f"{source.where}: {head.hf_name} differs from {embedding.hf_name}, but the model ties "
            "them; set model_config.tie_embeddings: false"
        )


def read_dtypes(folder: Path, config: Config) -> dict[str, torch.dtype]:
    """The type that the files of a model folder have for each of our parameters."""
    return {
        name: published.source.like(published.step.hf_name).dtype
        for published in list_published(folder, config, warn=lambda line: None)
        for name in published.step.names
    }


def iter_tensors(folder: Path, config: Config, *, warn: Warn = print_to_stderr) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model folder under our names, whole, one at a time; memory-mapped where a rename suffices.

    Raises:
        UserError: as `list_published`.
    """
    stacks: dict[str, Tensor] = {}
    waiting: Counter[str] = Counter()
    for published in list_published(folder, config, warn=warn):
        expert = published.step.expert
        if expert is None:
            yield from published.parts().items()
            published.source.release(published.step.hf_name)
            continue
        for name, values in published.parts().items():
            if name not in stacks:
                stacks[name] = values.new_empty((config.n_expert, *values.shape))
                waiting[name] = config.n_expert
            stacks[name][expert] = values
            waiting[name] -= 1
        published.source.release(published.step.hf_name)
        for name in published.step.names:
            if not waiting[name]:
                yield name, stacks.pop(name)


@torch.no_grad()
def load_model(
    model: nn.Module,
    folder: Path | str,
    *,
    config: Config | None = None,
    mmap: bool = False,
    warn: Warn = print_to_stderr,
) -> None:
    """Fill a model from a model folder; each rank copies only its part of a sharded parameter, cast to its type.

    Beside the model, no more than a block of the files is in memory at a time.

    Args:
        folder: a model folder, or a `.gguf` file.
        config: the model's shape; `model.config` if None.
        mmap: let parameters that have the type of the files stay in them, memory-mapped: read when they are first
            looked at, copied when they are first written to. The files may be replaced meanwhile, but not changed.
        warn: told, on the first rank, how many published tensors the model has no place for.

    Raises:
        UserError: as `list_published`. The model is then as it was.
    """
    shape: Config = config or model.config  # type: ignore[assignment]
    rank, _ = get_rank_and_size()
    tensors = dict(iter_model_tensors(model))
    parts = {name: get_shard(tensor) for name, tensor in tensors.items()}
    for published in list_published(Path(folder), shape, warn=warn if rank == 0 else lambda line: None):
        if not (mmap and published.map_into(tensors)):
            published.copy_to(parts)
