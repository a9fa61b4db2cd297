"""Load model folders of Hugging Face, LitGPT and ours, under our names: memory-mapped or block by block."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from litgpt.messages import print_message
from litgpt.model import registry
from litgpt.model.config import Config
from litgpt.phases import phase
from litgpt.store.collectives_io import Warn, get_rank, warn_once
from litgpt.store.gguf_files import GGUFFile, find_gguf
from litgpt.store.megatron_config import load_megatron_config
from litgpt.store.megatron_files import find_torch_dist
from litgpt.store.published_tensor import PublishedTensor
from litgpt.store.safetensors_files import get_shard
from litgpt.store.state_dict import iter_model_tensors
from litgpt.store.tensor_audit import audit_folder, list_published
from litgpt.store.weight_files import choose_weights


def load_config(folder: Path) -> Config:
    """Load the config of the model in a folder or a GGUF file, corrected by the weights.

    Raises:
        UserError: if the config is missing or invalid; or if the weights are needed to correct it, and are damaged.
    """
    return correct_by_weights(folder, load_saved_config(folder))


def correct_by_weights(folder: Path, config: Config) -> Config:
    """The config, untied if the files hold another head, and without prediction layers if they hold none."""
    return leave_out_missing_predictions(folder, untie_if_head_differs(folder, config))


def leave_out_missing_predictions(folder: Path, config: Config) -> Config:
    """The config without prediction layers if the files hold none, as those that transformers writes.

    A line on standard error says so.
    """
    if not config.n_prediction_layers or choose_weights(folder) is None:
        return config
    audit, layers = audit_folder(folder, config), range(config.n_layer, config.n_blocks)
    prefixes = tuple(f"blocks.{layer}." for layer in layers)
    if any(name.startswith(prefixes) for tensor in audit.tensors for name in tensor.mapping.names):
        return config
    warn_once(
        f"{audit.source.path}: has no weights of the {len(layers)} prediction layers that config.json lists; "
        "loaded without"
    )
    return replace(config, n_prediction_layers=0)


def untie_if_head_differs(folder: Path, config: Config) -> Config:
    """The config, as in transformers 5 without tied embeddings if the files hold an output head with other values.

    A line on standard error says so. Files without a head, or with one that equals the embedding, leave it as it is.
    """
    if not config.tie_embeddings or choose_weights(folder) is None:
        return config
    audit = audit_folder(folder, config)
    head = audit.find_untied_head()
    if head is None:
        return config
    warn_once(
        f"{audit.source.path}: {head.hf_name} differs from the embedding that config.json ties it to; "
        "loaded untied, as by transformers 5"
    )
    return replace(config, tie_embeddings=False)


def load_saved_config(folder: Path) -> Config:
    """Load the config of a folder or a GGUF file: of model_config.yaml, config.json, GGUF or Megatron's arguments."""
    if registry.has_config(folder):
        return Config.from_checkpoint(folder)
    if path := find_gguf(folder):
        values = GGUFFile(path).config_json
        families = registry.load_families().values()
        family = next(family for family in families if family.model_type == values["model_type"])
        return Config(**family.read(values, name=path.stem).to_dict())
    if checkpoint := find_torch_dist(folder):
        return load_megatron_config(checkpoint, folder.resolve().name)
    return Config.from_checkpoint(folder)


def read_dtypes(folder: Path, config: Config) -> dict[str, torch.dtype]:
    """Read the types that the files of a model folder have for our parameters."""
    published = list_published(folder, config, warn=lambda _line: None)
    return {name: tensor.meta.dtype for tensor in published for name in tensor.mapping.names}


def iter_tensors(folder: Path, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield the full weights of a model folder under our names; memory-mapped where only the name differs.

    Raises:
        UserError: as `list_published`.
    """
    return stack_experts(list_published(folder, config), config.n_expert)


def stack_experts(published: Iterable[PublishedTensor], n_expert: int) -> Iterator[tuple[str, Tensor]]:
    """Yield our tensors of published ones, each as soon as all of its experts have been read."""
    stacks: dict[str, Tensor] = {}
    remaining: Counter[str] = Counter()
    for tensor in published:
        expert = tensor.mapping.expert
        if expert is None:
            yield from tensor.read().items()
            tensor.release()
            continue
        for name, values in tensor.read().items():
            if name not in stacks:
                stacks[name] = values.new_empty((n_expert, *values.shape))
                remaining[name] = n_expert
            stacks[name][expert] = values
            remaining[name] -= 1
        tensor.release()
        for name in tensor.mapping.names:
            if not remaining[name]:
                yield name, stacks.pop(name)


@torch.no_grad()
def load_model(
    model: nn.Module,
    folder: Path | str,
    *,
    config: Config | None = None,
    mmap: bool = False,
    warn: Warn = print_message,
) -> None:
    """Load the weights of a model folder; each rank copies only its shard of a parameter, cast to its type.

    In addition to the model, at most one block of the files is in memory at a time.

    Args:
        folder: a model folder, or a `.gguf` file.
        config: the model's config; `model.config` if None.
        mmap: map parameters that have the type of the files: they are read from disk when first used, and copied when
            first written to. Until then the files may be replaced, but not modified.
        warn: called on the first rank with one line if tensors are left out because the model has no such part.

    Raises:
        UserError: as `list_published`; the model is then unchanged.
    """
    shape: Config = config or model.config  # type: ignore[assignment]
    parameters = dict(iter_model_tensors(model))
    shards = {name: get_shard(tensor) for name, tensor in parameters.items()}
    tensors = list_published(Path(folder), shape, warn=warn if get_rank() == 0 else lambda _line: None)
    with phase(f"loading {folder}", len(tensors)) as entry:
        for tensor in tensors:
            entry.advance()
            if not (mmap and tensor.map_into(parameters)):
                tensor.copy_to(shards)
