"""What a run says before its first step: at once what the recipe says, and the rest when the data is ready."""

import textwrap
from pathlib import Path
from typing import Any

import torch

from litgpt.parallel.precision import default_precision
from litgpt.recipe.columns import WIDTH
from litgpt.recipe.data import Stream
from litgpt.recipe.parallel import ParallelDims
from litgpt.recipe.to_yaml import get_class_name, read_arguments
from litgpt.recipe.training import Training
from litgpt.train.console import format_trained
from litgpt.train.run_spec import RunSpec

NAMES_WIDTH = 10
SOURCE_KEYS = ("train_data_path", "data_path", "json_path", "sources", "repo_id", "download_dir")
"""The settings of data modules that say where the data is; the first one is shown."""


def format_rows(rows: list[tuple[str, str]]) -> str:
    """Format names and values, one a line, longer values in several lines of at most `WIDTH` columns."""
    indent = " " * NAMES_WIDTH
    return "\n".join(
        textwrap.fill(
            value,
            WIDTH - 1,
            initial_indent=f"{name:<{NAMES_WIDTH}}",
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, value in rows
    )


def describe_setup(recipe: Training, spec: RunSpec, dims: ParallelDims) -> str:
    """Describe the model, the device, the layout and, unless that depends on checkpoints, the start of a run."""
    total, trained = count_parameters(spec)
    tuner = f" with {get_class_name(spec.tuner)}" if spec.tuner and spec.adapted else ""
    rows = [("Model", f"{spec.config.name}{tuner}: {total:,} parameters, {format_trained(trained, total)}")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    quantized = f", base in {spec.quantize}" if spec.quantize else ""
    rows.append(("Device", f"{dims.world_size} x {device}, {recipe.precision or default_precision()}{quantized}"))
    degrees = {name: degree for name, degree in vars(dims).items() if degree > 1}
    if degrees:
        rows.append(("Layout", ", ".join(f"{name} {degree}" for name, degree in degrees.items())))
    if recipe.resume is False:
        rows.append(describe_origin(recipe, spec, None, 0))
    return format_rows(rows)


def describe_origin(recipe: Training, spec: RunSpec, checkpoint: Path | None, step: int) -> tuple[str, str]:
    """Describe what a run starts from."""
    if checkpoint is not None:
        return "Start", f"Resuming training from {checkpoint}, after step {step:,}"
    adapter = f", adapter of {spec.adapter}" if spec.adapter else ""
    return "Start", (f"weights of {spec.weights}" if spec.weights else f"random weights, seed {recipe.seed}") + adapter


def describe_data(
    recipe: Training,
    spec: RunSpec,
    streams: tuple[Stream, Stream | None],
    *,
    length: int,
    steps: int | None,
    warmup: int,
) -> str:
    """Describe the data, the batches and the steps of a run.

    Args:
        streams: for training and for validation.
        length: maximum number of tokens per sample.
    """
    train, validation = streams
    samples, batch = train.samples_per_epoch, recipe.train.global_batch_size
    tokens = getattr(train, "tokens_per_epoch", None)
    at_most = "" if samples and tokens == samples * length else "at most "
    text = f"{describe_source(spec.data)}: {format_count(samples)} samples of {at_most}{length:,} tokens"
    if tokens:
        text += f", {tokens:,} tokens in all"
    rows = [("Data", text), ("", describe_validation(samples, validation))]
    epochs = f" = {steps * batch / samples:.2f} epochs" if steps and samples else ""
    limits = [f"{format_count(steps)} of {batch:,} samples, {at_most}{batch * length:,} tokens{epochs}"]
    if steps is None or (recipe.train.lr_warmup_steps or 0) <= steps:  # a longer one is warned of
        limits.append(f"warm-up {warmup:,} steps")
    if recipe.train.max_time is not None:
        limits.append(f"at most {recipe.train.max_time:g} s")
    return format_rows([*rows, ("Steps", ", ".join(limits))])


def describe_validation(samples: int | None, validation: Stream | None) -> str:
    """Describe how much there is for validation."""
    if validation is None:
        return "no validation"
    count = validation.samples_per_epoch
    share = f" ({count / (count + samples):.1%} of all)" if count and samples else ""
    return f"validation: {format_count(count)} samples{share}"


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


def count_parameters(spec: RunSpec) -> tuple[int, int]:
    """Count the parameters of the whole model with its adapter, all and trained; tied ones once."""
    parameters = list(spec.build_whole_model().parameters())
    return sum(item.numel() for item in parameters), sum(item.numel() for item in parameters if item.requires_grad)
