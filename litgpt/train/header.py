"""What a run says before its first step, in rows of a fixed order, each as soon as it is known.

Before torch is imported: where the data is, and what the run starts from, unless that has to be resolved or downloaded.
Then model and device; and when the data is open, its samples and the steps.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.files import extend_checkpoint_dir
from litgpt.recipe.choices import build_default_data
from litgpt.recipe.columns import format_columns
from litgpt.recipe.data import Stream
from litgpt.recipe.parallel import ParallelDims
from litgpt.recipe.to_yaml import get_class_name, read_arguments
from litgpt.recipe.training import Training
from litgpt.store.step_folders import STEP_FOLDER, list_checkpoints
from litgpt.train.console import format_trained
from litgpt.train.early_checks import has_adapter_config, is_base_model

if TYPE_CHECKING:
    from litgpt.train.run_spec import RunSpec  # which imports torch

NAMES_WIDTH = 10
SOURCE_KEYS = ("train_data_path", "data_path", "json_path", "sources", "repo_id", "download_dir")
"""The settings of data modules that say where the data is; the first one is shown."""
HeaderRows = list[tuple[str, str]]


def format_rows(rows: HeaderRows) -> str:
    """Format names and values, one a line, longer values in several lines."""
    return "\n".join(format_columns(rows, indent=0, start=NAMES_WIDTH))


def list_early_rows(recipe: Training) -> HeaderRows:
    """List the rows that are known before torch is imported: the data and, if `find_start` knows it, the start."""
    start = find_start(recipe)
    rows = [("Data", describe_source(recipe.data or build_default_data(recipe)))]
    return rows if start is None else [*rows, ("Start", start)]


def find_start(recipe: Training) -> str | None:
    """Describe what a run will start from; None if its model or checkpoint has to be found or downloaded to know it.

    The newest checkpoint is not verified yet, so that a run may start from an older one.
    """
    if isinstance(recipe.resume, Path):
        return describe_origin(recipe, None, None, recipe.resume)
    if recipe.resume and recipe.checkpoint.upload_to is not None:
        return None  # the store may have a newer one
    checkpoints = list_checkpoints(recipe.out_dir) if recipe.resume else []
    if checkpoints:
        return describe_origin(recipe, None, None, checkpoints[0][1])
    weights, adapter = (
        path and extend_checkpoint_dir(path) for path in (recipe.initial_weights, recipe.initial_adapter)
    )
    is_known = (weights is None or is_base_model(weights)) and (adapter is None or has_adapter_config(adapter))
    return describe_origin(recipe, weights, adapter, None) if is_known else None


def describe_origin(recipe: Training, weights: Path | None, adapter: Path | None, checkpoint: Path | None) -> str:
    """Describe what a run starts from: a checkpoint, or weights and an adapter, if any."""
    if checkpoint is not None:
        match = STEP_FOLDER.fullmatch(checkpoint.name)
        return f"Resuming training from {checkpoint}" + (f", after step {int(match[1]):,}" if match else "")
    source = f"weights of {weights}" if weights else f"random weights, seed {recipe.seed}"
    return source + (f", adapter of {adapter}" if adapter else "")


def describe_setup(spec: "RunSpec", dims: ParallelDims, device: str, precision: str) -> HeaderRows:
    """Describe the model, the device and the layout of a run.

    Args:
        device: name of the kind of devices.
    """
    total, trained = count_parameters(spec)
    tuner = f" with {get_class_name(spec.tuner)}" if spec.tuner and spec.adapted else ""
    quantized = f", base in {spec.quantize}" if spec.quantize else ""
    rows = [("Model", f"{spec.config.name}{tuner}: {total:,} parameters, {format_trained(trained, total)}")]
    if spec.preference is not None:
        rows.append(("Loss", spec.preference.describe()))
    rows.append(("Device", f"{dims.world_size} x {device}, {precision}{quantized}"))
    degrees = {name: degree for name, degree in vars(dims).items() if degree > 1}
    layout = [("Layout", ", ".join(f"{name} {degree}" for name, degree in degrees.items()))] if degrees else []
    return rows + layout


def describe_data(
    recipe: Training, streams: tuple[Stream, Stream | None], *, length: int, steps: int | None, warmup: int
) -> HeaderRows:
    """Describe the samples, the batches and the steps of a run.

    Args:
        streams: for training and for validation.
        length: maximum number of tokens per sample.
    """
    train, validation = streams
    samples, batch = train.samples_per_epoch, recipe.train.global_batch_size
    tokens = getattr(train, "tokens_per_epoch", None)
    at_most = "" if samples and tokens == samples * length else "at most "
    text = f"{format_count(samples)} of {at_most}{length:,} tokens"
    if tokens:
        text += f", {tokens:,} tokens in all"
    rows = [("Samples", text), ("", describe_validation(samples, validation))]
    epochs = f" = {steps * batch / samples:.2f} epochs" if steps and samples else ""
    limits = [f"{format_count(steps)} of {batch:,} samples, {at_most}{batch * length:,} tokens{epochs}"]
    if steps is None or (recipe.train.lr_warmup_steps or 0) <= steps:  # a longer one is warned of
        limits.append(f"warm-up {warmup:,} steps")
    if recipe.train.max_time is not None:
        limits.append(f"at most {recipe.train.max_time:g} s")
    return [*rows, ("Steps", ", ".join(limits))]


def describe_validation(samples: int | None, validation: Stream | None) -> str:
    """Describe how much there is for validation."""
    if validation is None:
        return "no validation"
    count = validation.samples_per_epoch
    share = f" ({count / (count + samples):.1%} of all)" if count and samples else ""
    return f"validation: {format_count(count)}{share}"


def describe_source(data: Any) -> str:
    """Name a data module and where its data is."""
    settings = read_arguments(data)
    source = next((settings[key] for key in SOURCE_KEYS if settings.get(key)), None)
    sources = source if isinstance(source, list) else [source] if source else []
    paths = [str(item.get("path", "") if isinstance(item, dict) else item) for item in sources]
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"{get_class_name(data)} {', '.join(paths[:3])}{more}".strip()


def format_count(count: int | None) -> str:
    """Format a number; a question mark if it is not known."""
    return "?" if count is None else f"{count:,}"


def count_parameters(spec: "RunSpec") -> tuple[int, int]:
    """Count the parameters of the whole model with its adapter, all and trained; tied ones once."""
    parameters = list(spec.whole_model.parameters())
    return sum(item.numel() for item in parameters), sum(item.numel() for item in parameters if item.requires_grad)
