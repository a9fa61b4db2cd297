"""litgpt convert_to_litgpt: any files that hold a model become a model folder, which loads as it stands."""

from pathlib import Path

import yaml

from litgpt.files import write_text
from litgpt.model import registry
from litgpt.model.config import Config
from litgpt.recipe.store_commands import ConvertToLitgpt


def run(recipe: ConvertToLitgpt) -> None:
    """Convert what the recipe names; print where it lies."""
    folder = convert(recipe.checkpoint_dir, recipe.model_name, recipe.dtype, per_tensor=bool(recipe.debug_mode))
    print(f"{folder}: ready")


def convert(path: Path, model_name: str | None, dtype: str | None, *, per_tensor: bool = False) -> Path:
    """Make a model folder out of a folder or a GGUF file; returns where it lies.

    Weights that are in safetensors already, and are not to be cast, stay as they are: they are checked, and their shape
    is written beside them.

    Raises:
        UserError: if the weights are not those of the shape. Nothing is changed then.
    """
    import torch

    from litgpt.store import convert as conversion
    from litgpt.store.checkpoint_load import PROGRESS, resolve_checkpoint
    from litgpt.store.load_model import list_published
    from litgpt.store.weight_files import list_safetensors

    source = path if path.is_file() else resolve_checkpoint(path) or path
    folder = path.with_suffix("") if path.suffix == ".gguf" and path.is_file() else source
    config = shape_of(source, model_name)
    tensors = list_published(source, config)
    for tensor in tensors if per_tensor else ():
        print(f"{tensor.step.hf_name} -> {', '.join(tensor.step.names)} ({tensor.step.kind})")
    if dtype or folder != source or (folder / PROGRESS).is_file() or not list_safetensors(source):
        conversion.rewrite_folder(folder, source, config, dtype=getattr(torch, dtype) if dtype else None)
    else:
        write_text(folder / "model_config.yaml", yaml.safe_dump(config.to_dict()))
    return folder


def shape_of(source: Path, model_name: str | None) -> Config:
    """The shape of the weights: that of a known model, else what the folder tells, else that of the folder's name.

    Raises:
        UserError: if none of them is there.
    """
    from litgpt.store.gguf_files import find_gguf
    from litgpt.store.load_model import load_config

    if model_name:
        return Config.from_name(model_name)
    told = any((source / name).is_file() for name in ("model_config.yaml", "config.json")) or find_gguf(source)
    return Config.from_name(source.name) if not told and source.name in registry.names() else load_config(source)
