"""`litgpt validate`: check that a model folder can be used, without loading it."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from litgpt import adapt
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.infer.load import find_base_folder, find_tokenizer_folder, resolve_model_folder
from litgpt.messages import print_message
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.registry import CONFIG_FILES
from litgpt.recipe.store_commands import Validate
from litgpt.store.adapters.folder import is_adapter, load_adapter_folder
from litgpt.store.load_model import load_config, load_saved_config
from litgpt.store.tensor_audit import audit_folder
from litgpt.store.weight_files import open_weights

GIGABYTE = 1024**3
TRAINING_COPIES = 4  # weights, gradients and AdamW's two moments, all of one type
TEXT = "Hello"


@dataclass
class CheckpointValidationResult:
    """Result of comparing a checkpoint's tensors with a model's.

    Attributes:
        missing_keys: tensors of the model that are not in the checkpoint, by their names in the model.
        unexpected_keys: tensors of the checkpoint that are not in the model, by their names in the checkpoint.
        shape_mismatches: one line for each tensor of another shape or dtype.
        errors: why the checkpoint cannot be read.
    """

    is_valid: bool
    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    shape_mismatches: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Format the result, with at most ten tensors of each kind."""
        if self.is_valid:
            return "Checkpoint validation passed."
        lines = ["Checkpoint validation failed:"]
        kinds = {
            "errors": self.errors,
            "missing": self.missing_keys,
            "unexpected": self.unexpected_keys,
            "of another shape": self.shape_mismatches,
        }
        for kind, names in kinds.items():
            if names:
                more = f", and {len(names) - 10} more" if len(names) > 10 else ""
                lines.append(f"  {len(names)} {kind}: {', '.join(names[:10])}{more}")
        return "\n".join(lines)


def validate_checkpoint(
    checkpoint_path: Path | str, model: nn.Module, verbose: bool = True
) -> CheckpointValidationResult:
    """Compare the names, shapes and dtypes of a checkpoint's tensors with a model's; values are not read.

    Args:
        checkpoint_path: a model folder, or the file with its weights.
        model: has its shape in `model.config`; may be on the meta device.
        verbose: print the summary.
    """
    config: Any = model.config
    try:
        audit = audit_folder(Path(checkpoint_path), config)
    except UserError as error:
        result = CheckpointValidationResult(False, errors=[str(error)])
    else:
        result = CheckpointValidationResult(audit.is_clean, audit.missing, audit.unknown, audit.mismatched)
    if verbose:
        print(result.summary())
    return result


def estimate_model_memory(
    config: Config, dtype: str | torch.dtype = "float32", training: bool = False
) -> dict[str, Any]:
    """Estimate the memory of a model's weights, in training also of gradients and AdamW's moments; no activations.

    Returns:
        `param_count`; `param_memory_gb` and `estimated_total_gb`, in GiB; `available_gpu_memory_gb` and
        `fits_in_memory`, both None without a GPU.
    """
    count = sum(parameter.numel() for parameter in GPT.on_meta(config).parameters())
    number_format = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    weights = count * number_format.itemsize / GIGABYTE
    total = weights * (TRAINING_COPIES if training else 1)
    available = torch.cuda.mem_get_info()[0] / GIGABYTE if torch.cuda.is_available() else None
    return {
        "param_count": count,
        "param_memory_gb": weights,
        "estimated_total_gb": total,
        "available_gpu_memory_gb": available,
        "fits_in_memory": None if available is None else total <= available,
    }


def run(recipe: Validate) -> None:
    """Run all checks and print one line for each.

    The folder of a run stands for its latest checkpoint or final model, as in the commands that load it.

    Raises:
        UserError: after the last check, if any failed.
    """
    if recipe.checkpoint_dir.is_dir():
        recipe = replace(recipe, checkpoint_dir=resolve_model_folder(recipe.checkpoint_dir))
    failed = []
    for number, (name, step) in enumerate(STEPS.items(), 1):
        try:
            print(f"[{number}/{len(STEPS)}] {name}: {step(recipe)}")
        except UserError as error:
            print(f"[{number}/{len(STEPS)}] {name}: FAILED: {error}")
            failed.append(name)
    if failed:
        raise UserError(f"{recipe.checkpoint_dir}: {len(failed)} of {len(STEPS)} steps failed: {', '.join(failed)}")
    print(f"{recipe.checkpoint_dir}: valid")


def find_weights_folder(recipe: Validate) -> Path:
    """The folder that holds the weights; for an adapter, that of its base."""
    return find_base_folder(recipe.checkpoint_dir) if is_adapter(recipe.checkpoint_dir) else recipe.checkpoint_dir


def find_weights(recipe: Validate) -> Path:
    """The folder, or the named file in it, that holds the weights."""
    return find_weights_folder(recipe) / (recipe.model_filename or "")


def validate_files(recipe: Validate) -> str:
    """Check that the files of weights, shape and tokenizer exist."""
    if not recipe.checkpoint_dir.is_dir():
        raise UserError(f"{recipe.checkpoint_dir}: no such folder")
    tokenizer_folder = find_tokenizer_folder(recipe.checkpoint_dir)
    for folder, names in (
        (find_weights_folder(recipe), CONFIG_FILES),
        (tokenizer_folder, ("tokenizer.json", "tokenizer.model")),
    ):
        if not any((folder / name).is_file() for name in names):
            raise UserError(f"{folder}: has no {' or '.join(names)}")
    source = open_weights(find_weights(recipe))
    return f"{len(source.names)} tensors in {source.path.name}"


def validate_shape(recipe: Validate) -> str:
    """Check that the shape of the model can be read."""
    config = load_saved_config(find_weights_folder(recipe))
    sizes = ("n_layer", "n_embd", "n_head", "padded_vocab_size")
    return f"{config.name or 'unnamed'}, " + ", ".join(f"{size} {getattr(config, size)}" for size in sizes)


def validate_tokenizer(recipe: Validate) -> str:
    """Check that decoding inverts encoding; a token without a row in the embedding is a warning."""
    tokenizer = Tokenizer(find_tokenizer_folder(recipe.checkpoint_dir))
    tokens = tokenizer.encode(TEXT, bos=False)
    if tokenizer.decode(tokens).strip() != TEXT:
        raise UserError(f"{TEXT!r} is encoded as {tokens.tolist()} and decoded as {tokenizer.decode(tokens)!r}")
    config = load_saved_config(find_weights_folder(recipe))
    if is_adapter(recipe.checkpoint_dir):
        config = load_adapter_folder(recipe.checkpoint_dir, config).config
    tokenizer.check_rows(config.padded_vocab_size or 0)
    print_message(*tokenizer.warnings)
    return f"{tokenizer.vocab_size} tokens; {TEXT!r} is encoded as {tokens.tolist()} and decoded back"


def validate_tensors(recipe: Validate) -> str:
    """Check that the weights have the names, shapes and dtypes of the model."""
    config = load_config(find_weights_folder(recipe))
    audit = audit_folder(find_weights(recipe), config)
    if not audit.is_clean:
        faults = [f"{name} is missing" for name in audit.missing]
        faults += [f"{name} is not in the model" for name in audit.unknown] + audit.mismatched
        raise UserError("; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else ""))
    if is_adapter(recipe.checkpoint_dir):
        adapter, model = load_adapter_folder(recipe.checkpoint_dir, config), GPT.on_meta(config)
        adapt.attach(model, adapter.settings)
        adapt.check_adapter(model, adapter.tensors)
    return f"all {len(audit.mappings)} match the model" + (f", {len(audit.left_out)} left out" * bool(audit.left_out))


def validate_memory(recipe: Validate) -> str:
    """Check that the model fits into the GPU, if there is one."""
    memory = estimate_model_memory(load_config(find_weights_folder(recipe)), recipe.dtype, recipe.training)
    needs = f"{memory['param_count']:,} parameters, {memory['estimated_total_gb']:.2f} GiB in {recipe.dtype}"
    needs += " with gradients and moments" if recipe.training else ""
    if memory["available_gpu_memory_gb"] is None:
        return f"{needs}; no GPU to compare with"
    if not memory["fits_in_memory"]:
        raise UserError(f"{needs}, but {memory['available_gpu_memory_gb']:.2f} GiB are free on the GPU")
    return f"{needs} of {memory['available_gpu_memory_gb']:.2f} free on the GPU"


STEPS = {
    "files": validate_files,
    "shape": validate_shape,
    "tokenizer": validate_tokenizer,
    "tensors": validate_tensors,
    "memory": validate_memory,
}
