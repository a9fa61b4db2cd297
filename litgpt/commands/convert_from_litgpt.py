"""`litgpt convert_from_litgpt`: export a model to a new folder, and to the Hugging Face hub if asked."""

from pathlib import Path

import torch

from litgpt.data.render.chat_template import find_turn_ends, read_template
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import check_unused, staged_folder
from litgpt.infer.load import find_tokenizer_folder
from litgpt.model.config import Config
from litgpt.recipe.store_commands import ConvertFromLitgpt
from litgpt.store import hub, litgpt_files
from litgpt.store.adapters.folder import check_whole_model
from litgpt.store.checkpoint_load import resolve_checkpoint
from litgpt.store.convert import export_folder
from litgpt.store.gguf_write import write_gguf, write_modelfile
from litgpt.store.load_model import load_config


def run(recipe: ConvertFromLitgpt) -> None:
    """Export the model and print the output's path.

    Raises:
        UserError: if the output folder is not empty, or the format cannot express the model's shape.
    """
    check_unused(recipe.output_dir)
    if recipe.push_to_hub and not hub.REPOSITORY.fullmatch(recipe.push_to_hub):
        raise UserError(f"push_to_hub: {recipe.push_to_hub!r} is not org/name, such as me/my-model")
    source = resolve_checkpoint(recipe.checkpoint_dir) or recipe.checkpoint_dir
    check_whole_model(source)
    config = load_config(source)
    if recipe.format == "gguf":
        export_gguf(recipe, source, config)
    else:
        export(recipe, source, config)
    print(f"{recipe.output_dir}: written")
    if recipe.push_to_hub:
        print(hub.upload(recipe.output_dir, recipe.push_to_hub, access_token=recipe.access_token))


def export(recipe: ConvertFromLitgpt, source: Path, config: Config) -> None:
    """Write a folder of torch or safetensors files."""
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
    if recipe.format == "lit_model.pth":
        litgpt_files.write_litgpt_folder(recipe.output_dir, source, config, dtype=dtype)
    elif recipe.format == "model.pth":
        litgpt_files.write_model_pth(recipe.output_dir, source, config, dtype=dtype)
    else:
        export_folder(recipe.output_dir, source, config, dtype=dtype, shard_bytes=recipe.max_shard_size * 1e9)


def export_gguf(recipe: ConvertFromLitgpt, source: Path, config: Config) -> None:
    """Write a GGUF file with tokenizer and chat template, and a Modelfile."""
    folder = find_tokenizer_folder(source)
    tokenizer, template = Tokenizer(folder), read_template(folder)
    ends = [*tokenizer.stop_ids, *(find_turn_ends(template, tokenizer) if template else [])]
    name = f"{config.name.replace('/', '-')}.gguf"
    with staged_folder(recipe.output_dir) as staged:
        chat_template = template.sources[0] if template else None
        write_gguf(staged / name, source, config, tokenizer_dir=folder, dtype=recipe.dtype, chat_template=chat_template)
        stops = dict.fromkeys(tokenizer.processor.id_to_token(token) for token in ends)
        write_modelfile(staged / "Modelfile", name, stops, config.block_size)
