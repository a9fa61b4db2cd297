"""`litgpt merge_lora`: merge an adapter into its base model; the output folder is written atomically."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from litgpt import adapt
from litgpt.data.render.chat_template import find_turn_ends, read_template
from litgpt.data.render.prompt_format import extend_stop_ids
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import check_writable, staged_folder, write_text
from litgpt.infer.load import (
    WEIGHT_DTYPES,
    find_base_folder,
    find_main_dtype,
    open_model,
    open_with_adapter,
    resolve_model_folder,
)
from litgpt.messages import print_message
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.recipe.merge_lora import MergeLora
from litgpt.store.adapters.folder import ADAPTER_CONFIG, MODEL_FILES, has_adapter, load_adapter_folder
from litgpt.store.adapters.saved_adapter import SavedAdapter
from litgpt.store.checkpoint_load import PROGRESS
from litgpt.store.convert import link_or_copy
from litgpt.store.load_model import load_config, read_dtypes
from litgpt.store.save_model import write_model_folder
from litgpt.store.tokenizer_files import copy_tokenizer, find_tokenizer_files

LENGTH = 64  # tokens in a row of the comparison
CPU = torch.device("cpu")


def run(recipe: MergeLora) -> None:
    """Merge, compare the logits with those of base and adapter, and print the output folder."""
    folder = resolve_model_folder(recipe.checkpoint_dir)
    has_model = any((folder / name).is_file() for name in MODEL_FILES)
    if has_model and not has_adapter(folder):
        print_message(f"{folder}: holds a whole model and no adapter; nothing to merge")
        return
    if not has_adapter(folder):
        raise UserError(f"checkpoint_dir: {folder} holds no adapter; give the folder with its {ADAPTER_CONFIG}")
    output = recipe.output_dir or choose_output(folder, has_model=has_model)
    check_writable(output, "output_dir")
    base = find_base_folder(folder, recipe.pretrained_checkpoint_dir)
    with staged_output(output, folder) as staged:
        messages = merge(recipe, folder, base, staged)
    print("\n".join([*messages, f"{output}: {base} with {folder} merged"]))


def choose_output(folder: Path, *, has_model: bool) -> Path:
    """The default output: the adapter's folder, or a new one next to a training checkpoint, which its run may delete.

    Raises:
        UserError: if the folder holds a merged model.
    """
    if has_model:
        raise UserError(f"{folder} holds a merged model already; give an output_dir, or remove that model")
    return folder.with_name(f"{folder.name}-merged") if (folder / PROGRESS).is_file() else folder


@contextmanager
def staged_output(output: Path, adapter: Path) -> Iterator[Path]:
    """Stage the output folder, with the adapter's files if they are in the same folder; renamed on success."""
    is_same = output.resolve() == adapter.resolve()
    with staged_folder(output, replace=is_same) as staged:
        if is_same:
            shutil.copytree(adapter, staged, symlinks=True, dirs_exist_ok=True, copy_function=link_or_copy)
        yield staged


def merge(recipe: MergeLora, folder: Path, base: Path, staged: Path) -> list[str]:
    """Write the merged model into a staged folder; returns messages.

    Raises:
        UserError: if base and adapter do not match or cannot be merged, or the logits are not finite.
    """
    base_config = load_config(base)
    adapter = load_adapter_folder(folder, base_config)
    config = adapter.config
    dtype = torch.float32 if recipe.rows else find_main_dtype(base, base_config)
    ids = draw_rows(config, recipe.rows, recipe.seed)
    model = open_with_adapter(adapter, base, device=CPU, dtype=dtype, exact=True)
    separate = compute_row_logits(model, ids)
    if recipe.quantize != "as_trained":
        model = open_with_adapter(adapter, base, device=CPU, dtype=dtype, exact=True, quantize=recipe.quantize)
    dtype_given = choose_dtype(recipe, adapter)
    base_types = read_dtypes(base, base_config)
    for name in ("head.weight", "score.weight"):  # which the base does not have if it is tied, or no reward model
        base_types.setdefault(name, base_types["embedding.weight"])
    types = {name: dtype_given or kept for name, kept in base_types.items()}
    copy_adapter_tokenizer(folder, base, staged)
    write_model_folder(staged, model.config, adapt.merge_adapter(model, types), tokenizer_dir=base)
    del model
    if not recipe.rows:
        return []
    merged = compute_row_logits(open_model(staged, device=CPU, dtype=torch.float32), ids)
    return [compare_logits(separate, merged), *explain_quantization(recipe, adapter)]


def copy_adapter_tokenizer(adapter: Path, base: Path, staged: Path) -> None:
    """Copy the tokenizer of an adapter's folder, if it has one, and what it lacks from the base's folder.

    The tokens that end a text with the adapter's tokenizer and chat template end one with the merged model too.
    """
    copy_tokenizer(adapter, staged)
    copy_tokenizer(base, staged)
    if find_tokenizer_files(adapter):
        tokenizer, template = Tokenizer(staged), read_template(staged)
        for name, text in extend_stop_ids(tokenizer, find_turn_ends(template, tokenizer) if template else ()).items():
            write_text(staged / name, text)


def choose_dtype(recipe: MergeLora, adapter: SavedAdapter) -> torch.dtype | None:
    """The dtype of the merged model; None for that of the base."""
    if recipe.precision:
        return WEIGHT_DTYPES[recipe.precision]
    return adapter.dtype if adapter.base_settings.dtype else None


def draw_rows(config: Config, rows: int, seed: int) -> Tensor:
    """Draw random tokens (rows, T)."""
    length = min(LENGTH, config.block_size)
    return torch.randint(config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def compute_row_logits(model: GPT, ids: Tensor) -> Tensor:
    """Compute the logits (rows, T, V) of tokens in float32; empty for no rows."""
    return model(ids).float() if len(ids) else torch.empty(0)


def compare_logits(separate: Tensor, merged: Tensor) -> str:
    """Compare the logits or scores of the merged model with those of base and adapter; returns a message.

    Raises:
        UserError: if they are not finite.
    """
    if not bool(merged.isfinite().all()):
        raise UserError("the merged model's logits are not finite; check the adapter, or set precision: 32-true")
    difference = float((merged - separate).abs().max() / separate.abs().max())
    rows = f"(the merged model against its base with the adapter, on {len(merged)} rows of random tokens)"
    if merged.shape[-1] == 1:
        return f"score gap: {difference:.1e} of the largest score {rows}"
    same = float((merged.argmax(-1) == separate.argmax(-1)).float().mean())
    return f"logit gap: {difference:.1e} of the largest logit; {same:.1%} of the likeliest tokens are the same {rows}"


def explain_quantization(recipe: MergeLora, adapter: SavedAdapter) -> list[str]:
    """Explain a gap that comes from merging into other weights of the base than those of the training."""
    trained = adapter.base_settings.quantize
    if recipe.quantize in ("as_trained", trained):
        return []
    before, after = (kind or "its original weights" for kind in (trained, recipe.quantize))
    return [
        f"the gap is mostly the error of quantization: the adapter was trained on the base with {before}, and is "
        f"merged into the base with {after}; quantize: as_trained merges it as it was trained"
    ]
