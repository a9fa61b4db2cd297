"""Write model folders that transformers loads, atomically."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from litgpt.errors import UserError
from litgpt.files import staged_folder, write_json
from litgpt.messages import print_message
from litgpt.model.config import Config
from litgpt.model.names import TensorMapping
from litgpt.model.registry import CONFIG_FILES, Family, find_family
from litgpt.phases import phase
from litgpt.store.carried_parts import find_carried_parts
from litgpt.store.collectives_io import StageRanks, Warn, get_rank, share_first_message
from litgpt.store.published_tensor import list_parameters
from litgpt.store.safetensors_files import write_tensors
from litgpt.store.state_dict import iter_model_tensors
from litgpt.store.tokenizer_files import copy_tokenizer
from litgpt.store.weight_files import SAFETENSORS, SAFETENSORS_INDEX

NamedTensors = Iterable[tuple[str, Tensor]]
SHARD_BYTES = 5e9
UNPUBLISHED = (
    "no published architecture has this shape, or the other parts of one are missing; its tensors keep our names, only "
    "litgpt loads it"
)


def write_shards(folder: Path, tensors: NamedTensors, shard_bytes: float) -> None:
    """Write tensors into safetensors files of at most `shard_bytes`, and their index."""
    pending: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    total_size = 0

    def write_pending() -> None:
        write_tensors(folder / f"{len(shards)}.safetensors", pending, {"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and sum(other.nbytes for other in pending.values()) + tensor.nbytes > shard_bytes:
            write_pending()
        pending[name] = tensor
        total_size += tensor.nbytes
    write_pending()
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / SAFETENSORS)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        shard = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    write_json(folder / SAFETENSORS_INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def record_types(tensors: NamedTensors, dtypes: set[torch.dtype]) -> Iterator[tuple[str, Tensor]]:
    """Yield the same tensors, after adding the type of each to `dtypes`."""
    for name, tensor in tensors:
        dtypes.add(tensor.dtype)
        yield name, tensor


def save_model_folder(
    folder: Path | str,
    *,
    config: Config,
    tensors: NamedTensors | Mapping[str, Tensor],
    tokenizer_dir: Path | str | None = None,
    prompt_files: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: float = SHARD_BYTES,
    replace: bool = False,
    warn: Warn = print_message,
) -> None:
    """Write a model folder atomically, in the format of its published architecture, which transformers loads.

    Args:
        tensors: every parameter once, under our names.
        tokenizer_dir: a folder whose tokenizer files are copied; if it has a published model of several parts, of which
            this is one, the others are written too.
        prompt_files: files of the prompt format, text by name, in place of those of `tokenizer_dir`; None for these.
        dtype: cast to this type, except tensors that the config keeps in float32; None keeps the type of each tensor.
        shard_bytes: the maximum size of a file of weights; larger models are split.
        replace: replace a folder that exists.
        warn: called if no published architecture has this shape, or it is never published without parts that the
            tokenizer's folder does not have; the folder then keeps our tensor names.

    Raises:
        UserError: if the folder exists and is not empty, or a tensor is missing, unknown or of another shape.
    """
    with phase(f"writing {folder}"), staged_folder(Path(folder), replace=replace) as staged:
        family = write_model_folder(
            staged,
            config,
            tensors,
            tokenizer_dir=tokenizer_dir,
            prompt_files=prompt_files,
            dtype=dtype,
            shard_bytes=shard_bytes,
        )
        if family is None:
            warn(f"{folder}: {UNPUBLISHED}")


def write_model_folder(
    staged: Path,
    config: Config,
    tensors: NamedTensors | Mapping[str, Tensor],
    *,
    tokenizer_dir: Path | str | None = None,
    prompt_files: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: float = SHARD_BYTES,
) -> Family | None:
    """Write weights, tokenizer and settings into a staged folder; returns the published architecture of this shape.

    Args and errors as in `save_model_folder`.
    """
    special_tokens = copy_tokenizer(Path(tokenizer_dir), staged, prompt_files) if tokenizer_dir else {}
    tensors = tensors.items() if isinstance(tensors, Mapping) else tensors
    source = Path(tokenizer_dir) if tokenizer_dir else None
    family, _ = write_model(
        staged, config, tensors, special_tokens, source=source, dtype=dtype, shard_bytes=shard_bytes
    )
    if family is not None and not (staged / "generation_config.json").exists():
        write_json(staged / "generation_config.json", {"_from_model_config": True, **special_tokens})
    return family


def write_model(
    folder: Path,
    config: Config,
    tensors: NamedTensors,
    special_tokens: Mapping[str, Any],
    *,
    source: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: float = SHARD_BYTES,
) -> tuple[Family | None, str]:
    """Write safetensors files and model_config.yaml; under the names of a published architecture also its config.json.

    Args:
        tensors: every parameter once, under our names.
        special_tokens: the ids of special tokens, for config.json.
        source: a folder; if it has a published model of several parts, of which this is one, all are written.

    Returns:
        The published architecture that is written, if there is one, and the name of the type of the weights.

    Raises:
        UserError: if a tensor is missing, unknown or of another shape.
    """
    family, parameters = find_family(config), list_parameters(config)
    carried = None if family is None or source is None else find_carried_parts(source, family)
    if family is not None and family.is_never_alone and carried is None:
        family = None  # transformers does not load it without the other parts
    if family is None:
        mappings = [TensorMapping(name, (name,), "rename") for name in parameters]
    else:
        mappings = [*family.tensors.map_names(parameters, config), *family.tensors.list_copies(config)]
    dtypes: set[torch.dtype] = set()
    joined = join_tensors(mappings, cast_tensors(tensors, dtype, parameters), parameters, config)
    published = record_types(joined, dtypes)
    write_shards(folder, carried.add_tensors(published, config) if carried else published, shard_bytes)
    saved_dtype = str(dtype or (dtypes.pop() if len(dtypes) == 1 else torch.float32)).removeprefix("torch.")
    for name in CONFIG_FILES:
        (folder / name).unlink(missing_ok=True)  # if it is a hard link, the other file does not change
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    if family is not None:
        tokens = drop_final_padding(special_tokens) if config.output == "score" else special_tokens
        values = {**family.config_json(config), "torch_dtype": saved_dtype, **tokens}
        if carried is not None:
            carried.copy_files(folder)
            values = carried.add_settings(values)
        write_json(folder / "config.json", values)
    return family, saved_dtype


def drop_final_padding(special_tokens: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of special tokens without a padding token that also ends texts.

    transformers takes the score of the last token that is not padding, which would be the one before the end.
    """
    ends = special_tokens.get("eos_token_id")
    is_end = special_tokens.get("pad_token_id") in (ends if isinstance(ends, list) else [ends])
    return {name: token for name, token in special_tokens.items() if not (is_end and name == "pad_token_id")}


def cast_tensors(
    tensors: NamedTensors, dtype: torch.dtype | None, parameters: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors on the CPU in `dtype`, except those that a config keeps in float32 (a router's correction).

    Args:
        dtype: None keeps the type of each tensor.
        parameters: the model's, as `list_parameters` returns them.
    """
    for name, tensor in tensors:
        is_pinned = name in parameters and parameters[name].dtype == torch.float32
        yield name, tensor.detach().to("cpu", tensor.dtype if dtype is None or is_pinned else dtype)


def join_tensors(
    mappings: list[TensorMapping], tensors: NamedTensors, parameters: Mapping[str, Tensor], config: Config
) -> Iterator[tuple[str, Tensor]]:
    """Yield published tensors, each as soon as all of our tensors that it consists of have been read."""
    mappings_of: dict[str, list[TensorMapping]] = {}
    for mapping in mappings:
        for name in mapping.names:
            mappings_of.setdefault(name, []).append(mapping)
    pending: dict[str, Tensor] = {}
    missing = set(parameters)
    for name, tensor in tensors:
        if name not in missing:
            raise UserError(f"{name}: not a tensor of this model, or given twice; check model_config.yaml")
        if tensor.shape != parameters[name].shape:
            raise UserError(f"{name}: has shape {list(tensor.shape)}, the model's is {list(parameters[name].shape)}")
        missing.remove(name)
        pending[name] = tensor
        names = mappings_of[name][0].names
        if all(part in pending for part in names):
            for mapping in mappings_of[name]:  # one for each expert of a stack, and for each copy
                yield mapping.hf_name, mapping.join([pending[part] for part in mapping.names], config)
            for part in names:
                del pending[part]
    if missing:
        raise UserError(
            f"{', '.join(sorted(missing)[:5])}: missing, but the model's shape has it; check model_config.yaml"
        )


def iter_full_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of a model in full; all ranks iterate together, because shards are gathered."""
    for name, tensor in iter_model_tensors(model):
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def gather_stages(model: nn.Module, tensors: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a whole model on the first rank; all ranks iterate to the end together.

    Args:
        model: each rank may hold its shards or a stage of it.
        tensors: the full tensors of this rank's stage; all ranks of the stage iterate over them together.
    """
    return StageRanks((name for name, _ in iter_model_tensors(model))).gather_tensors(tensors)


def save_model(
    folder: Path | str,
    model: nn.Module,
    *,
    config: Config,
    tensors: Iterator[tuple[str, Tensor]] | None = None,
    **settings: Any,
) -> None:
    """Write a model folder from a model that may be sharded; all ranks call it, the first one writes.

    At most one full tensor is in memory at a time, and on the first rank also one file of weights.

    Args:
        model: each rank may hold its shards or a stage of it.
        tensors: written in place of the model's own, as in `gather_stages`.
        settings: as in `save_model_folder`.

    Raises:
        UserError: on every rank, if the first could not write.
    """
    stage_tensors = gather_stages(model, iter_full_tensors(model) if tensors is None else tensors)
    error = ""
    if get_rank() == 0:
        try:
            save_model_folder(folder, config=config, tensors=stage_tensors, **settings)
        except (UserError, OSError) as failure:
            error = str(failure)
    for _ in stage_tensors:
        pass  # the other ranks, and the first one after an error, take part in all collectives
    if error := share_first_message(error):
        raise UserError(f"{folder}: not written ({error})")
