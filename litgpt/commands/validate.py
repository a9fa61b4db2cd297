"""litgpt validate: whether a model folder can be used, found out before anything is loaded."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.errors import UserError
from litgpt.recipe.store_commands import Validate

if TYPE_CHECKING:
    import torch
    from torch import nn

    from litgpt.model.config import Config

GIGABYTE = 1024**3
TRAINING_COPIES = 4  # weights, gradients and AdamW's two moments, all of one type
TEXT = "Hello"


@dataclass
class CheckpointValidationResult:
    """What is wrong with the tensors of a checkpoint.

    Attributes:
        missing_keys: the model's tensors that the checkpoint lacks, by our names.
        unexpected_keys: its tensors that the model has no place for, by their own.
        shape_mismatches: one line for each tensor of another shape or type.
        errors: why the checkpoint cannot be read at all.
    """

    is_valid: bool
    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    shape_mismatches: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """What is wrong, at most ten of a kind."""
        if self.is_valid:
            return "Checkpoint validation passed."
        lines = ["Checkpoint validation failed:"]
        kinds = {
            "errors": self.errors,
            "missing": self.missing_keys,
            "unexpected": self.unexpected_keys,
            "of another shape": self.shape_mismatches,
        }
        for kind, found in kinds.items():
            if found:
                more = f", and {len(found) - 10} more" if len(found) > 10 else ""
                lines.append(f"  {len(found)} {kind}: {', '.join(found[:10])}{more}")
        return "\n".join(lines)


def validate_checkpoint(
    checkpoint_path: Path | str, model: "nn.Module", verbose: bool = True
) -> CheckpointValidationResult:
    """Hold the names, shapes and types in a checkpoint against a model's; looks at no values.

    Args:
        checkpoint_path: a model folder, or the file with the weights in one.
        model: with the shape as `model.config`; may be on the meta device.
        verbose: print the summary.
    """
    from litgpt.store.tensor_audit import audit_folder

    config: Any = model.config
    try:
        ledger = audit_folder(Path(checkpoint_path), config)
    except UserError as error:
        result = CheckpointValidationResult(False, errors=[str(error)])
    else:
        result = CheckpointValidationResult(ledger.balanced, ledger.missing, ledger.unknown, ledger.misshapen)
    if verbose:
        print(result.summary())
    return result


def estimate_model_memory(
    config: "Config", dtype: "str | torch.dtype" = "float32", training: bool = False
) -> dict[str, Any]:
    """The memory that a model's weights take, in training with gradients and AdamW's moments; without activations.

    Returns:
        `param_count`; `param_memory_gb` and `estimated_total_gb`, in GiB; `available_gpu_memory_gb` and
        `fits_in_memory`, both None without a GPU.
    """
    import torch

    from litgpt.model.gpt import GPT

    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in GPT(config).parameters())
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    weights = count * kind.itemsize / GIGABYTE
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
    """Take the five steps, and say how each went.

    Raises:
        UserError: after all five, if any failed.
    """
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


def weights_of(recipe: Validate) -> Path:
    """Where the weights are: the folder, or the file in it that was named."""
    return recipe.checkpoint_dir / recipe.model_filename if recipe.model_filename else recipe.checkpoint_dir


def check_files(recipe: Validate) -> str:
    """Whether weights, shape and tokenizer are there."""
    from litgpt.store.weight_files import open_weights

    folder = recipe.checkpoint_dir
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for one_of in (("model_config.yaml", "config.json"), ("tokenizer.json", "tokenizer.model")):
        if not any((folder / name).is_file() for name in one_of):
            raise UserError(f"{folder}: no {' or '.join(one_of)} in it")
    source = open_weights(weights_of(recipe))
    return f"{len(source.names)} tensors in {source.where.name}"


def check_shape(recipe: Validate) -> str:
    """Whether the shape of the model can be read."""
    from litgpt.store.load_model import load_config

    config = load_config(recipe.checkpoint_dir)
    sizes = ("n_layer", "n_embd", "n_head", "padded_vocab_size")
    return f"{config.name or 'unnamed'}, " + ", ".join(f"{size} {getattr(config, size)}" for size in sizes)


def check_tokenizer(recipe: Validate) -> str:
    """Whether a text comes back from its tokens, and every token has a row in the embedding."""
    from litgpt.data.tokenizer import Tokenizer
    from litgpt.store.load_model import load_config

    tokenizer = Tokenizer(recipe.checkpoint_dir)
    tokens = tokenizer.encode(TEXT, bos=False)
    if tokenizer.decode(tokens).strip() != TEXT:
        raise UserError(f"{TEXT!r} becomes {tokens.tolist()} and comes back as {tokenizer.decode(tokens)!r}")
    rows = load_config(recipe.checkpoint_dir).padded_vocab_size
    assert rows is not None
    if tokenizer.id_limit > rows:
        raise UserError(f"it has tokens up to {tokenizer.id_limit - 1}, but the embedding {rows} rows")
    return f"{tokenizer.vocab_size} tokens, {TEXT!r} becomes {tokens.tolist()} and comes back"


def check_tensors(recipe: Validate) -> str:
    """Whether the weights have the names, shapes and types of the model."""
    from litgpt.store.load_model import load_config
    from litgpt.store.tensor_audit import audit_folder

    ledger = audit_folder(weights_of(recipe), load_config(recipe.checkpoint_dir))
    if not ledger.balanced:
        wrong = [f"lacks {name}" for name in ledger.missing] + [f"{name}: no such tensor" for name in ledger.unknown]
        wrong += ledger.misshapen
        raise UserError("; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
    return f"all {len(ledger.read)} fit the model" + (f", {len(ledger.left_out)} left out" * bool(ledger.left_out))


def check_memory(recipe: Validate) -> str:
    """Whether the model fits into the GPU, if there is one."""
    from litgpt.store.load_model import load_config

    found = estimate_model_memory(load_config(recipe.checkpoint_dir), recipe.dtype, recipe.training)
    needs = f"{found['param_count']:,} parameters, {found['estimated_total_gb']:.2f} GiB in {recipe.dtype}"
    needs += " with gradients and moments" if recipe.training else ""
    if found["available_gpu_memory_gb"] is None:
        return f"{needs}; no GPU to compare with"
    if not found["fits_in_memory"]:
        raise UserError(f"{needs}, but {found['available_gpu_memory_gb']:.2f} GiB are free on the GPU")
    return f"{needs} of {found['available_gpu_memory_gb']:.2f} free on the GPU"


STEPS = {
    "files": check_files,
    "shape": check_shape,
    "tokenizer": check_tokenizer,
    "tensors": check_tensors,
    "memory": check_memory,
}
