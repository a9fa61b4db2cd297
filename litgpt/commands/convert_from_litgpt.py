"""`litgpt convert_from_litgpt`: export a model or adapter to a new folder, and to the Hugging Face hub if asked."""

import shlex
from pathlib import Path

import torch

from litgpt.data.render.chat_template import find_turn_ends, read_template
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import check_unused, staged_folder
from litgpt.infer.load import find_base_folder, find_tokenizer_folder, resolve_model_folder
from litgpt.model.config import Config
from litgpt.recipe.store_commands import ConvertFromLitgpt
from litgpt.store import hub, litgpt_files
from litgpt.store.adapters.folder import check_whole_model, has_adapter, load_adapter_folder, write_peft_folder
from litgpt.store.adapters.vllm_lora import choose_max_rank, convert_lora_to_vllm
from litgpt.store.convert import export_folder
from litgpt.store.gguf_write import write_gguf, write_modelfile
from litgpt.store.load_model import load_config
from litgpt.store.tokenizer_files import copy_tokenizer, has_tokenizer


def run(recipe: ConvertFromLitgpt) -> None:
    """Export the model and print the output's path.

    Raises:
        UserError: if the output folder is not empty, or the format cannot express the model's shape.
    """
    check_unused(recipe.output_dir)
    if recipe.push_to_hub:
        hub.check_repository("push_to_hub", recipe.push_to_hub)
    source = resolve_model_folder(recipe.checkpoint_dir)
    print(export_adapter(recipe, source) if recipe.format == "vllm" else export_model(recipe, source))
    if recipe.push_to_hub:
        print(hub.upload(recipe.output_dir, recipe.push_to_hub, access_token=recipe.access_token))


def export_model(recipe: ConvertFromLitgpt, source: Path) -> str:
    """Write a whole model; returns a message."""
    check_whole_model(source)
    config = load_config(source)
    if recipe.format == "gguf":
        export_gguf(recipe, source, config)
    else:
        export_folder_or_file(recipe, source, config)
    return f"{recipe.output_dir}: written"


def export_adapter(recipe: ConvertFromLitgpt, source: Path) -> str:
    """Write an adapter that vLLM applies in full, with its tokenizer; returns the command that serves it.

    Raises:
        UserError: if there is no adapter, or vLLM would not apply all of it.
    """
    if not has_adapter(source):
        raise UserError(f"format: vllm: {source} holds a whole model, which vLLM serves as it is; give an adapter")
    base, output = find_base_folder(source), recipe.output_dir
    base_config = load_config(base)
    cure = f"merge the adapter and serve the model: litgpt merge_lora {source} --output_dir merged"
    tensors, values = convert_lora_to_vllm(load_adapter_folder(source, base_config), base_config, cure)
    if recipe.dtype:
        tensors = {name: tensor.to(getattr(torch, recipe.dtype)) for name, tensor in tensors.items()}
    with staged_folder(output) as staged:
        write_peft_folder(staged, tensors, values)
        copy_tokenizer(source, staged)
    options = {"--max-lora-rank": choose_max_rank(values), "--lora-modules": f"{output.resolve().name}={output}"}
    if has_tokenizer(output):
        options["--tokenizer"] = output
    elif (output / "chat_template.jinja").is_file():
        options["--chat-template"] = output / "chat_template.jinja"
    if (output / "generation_config.json").is_file():
        options["--generation-config"] = output
    line = shlex.join([str(word) for option in options.items() for word in option])
    return f"{output}: written; serve it with: vllm serve {shlex.quote(str(base))} --enable-lora {line}"


def export_folder_or_file(recipe: ConvertFromLitgpt, source: Path, config: Config) -> None:
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
