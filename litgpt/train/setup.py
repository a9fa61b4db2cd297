"""Set up a run: launch its processes, then build data, model and optimizers, and load the checkpoint."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from litgpt.data.stream.batch import to_batch
from litgpt.data.stream.windows import WindowDataset
from litgpt.data.tokenizer import Tokenizer, train_tokenizer
from litgpt.errors import UserError
from litgpt.files import write_json, write_text
from litgpt.model.gpt import GPT
from litgpt.parallel.fabric import Fabric, Logger
from litgpt.parallel.fp8 import describe_fp8
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import build_precision, default_precision
from litgpt.parallel.processes import count_processes
from litgpt.parallel.reduce import all_gather_objects
from litgpt.parallel.strategy import MeshStrategy, is_rank_zero
from litgpt.recipe.data import BatchShape, Stream
from litgpt.recipe.effect import describe_no_effect
from litgpt.recipe.parallel import ParallelDims
from litgpt.recipe.to_yaml import dump_recipe
from litgpt.recipe.training import Training
from litgpt.store.checkpoint_save import Checkpoints
from litgpt.store.collectives_io import share_first_message
from litgpt.train import header
from litgpt.train.build_state import build_train_state
from litgpt.train.data_report import DATA_REPORT_FILE
from litgpt.train.early_checks import check_resumption, check_trained_model, check_vocabulary
from litgpt.train.history import choose_version
from litgpt.train.image_questions import ImageQuestion, list_image_questions
from litgpt.train.launch import launch
from litgpt.train.loggers import build_logger
from litgpt.train.resumed_recipe import describe_changes
from litgpt.train.run_checkpoints import open_checkpoints, restore
from litgpt.train.run_lock import lock_run
from litgpt.train.run_spec import RunSpec, check_token_range
from litgpt.train.run_uploads import find_resumed, open_uploads
from litgpt.train.schedule import Schedule, count_steps, count_warmup_steps
from litgpt.train.torch_backends import check_attention_kernel
from litgpt.train.train_state import TrainState

Notify = Callable[[str], None]


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        sequence_length: tokens per sample.
        ranks: number of ranks that read different data.
        micro_batches: micro-batches per data rank and optimizer step.
        example_prompt: token ids of a prompt from the data, to generate from; empty for none.
        image_questions: those with images to answer, from the validation data if there are any.
        stop_ids: tokens that end a generated text.
        prompt_files: the files of the prompt format of the data, text by name; None for that of the tokenizer.
    """

    train: Stream
    validation: Stream | None
    tokenizer: Tokenizer | None
    tokenizer_dir: Path | None
    sequence_length: int
    ranks: int
    micro_batches: int
    example_prompt: list[int]
    image_questions: tuple[ImageQuestion, ...]
    stop_ids: tuple[int, ...]
    prompt_files: dict[str, str] | None


@dataclass(frozen=True)
class Run:
    """A run that is ready for its first step.

    Attributes:
        steps: optimizer steps of the whole run; None if it has no limit on steps.
        progress: counters from the checkpoint; empty for a new run.
        ranks: number of processes.
    """

    recipe: Training
    spec: RunSpec
    train_state: TrainState
    data: RunData
    schedule: Schedule
    steps: int | None
    checkpoints: Checkpoints
    loggers: list[Logger]
    progress: dict[str, Any]
    ranks: int


def build(recipe: Training, spec: RunSpec, notify: Notify, ends: ExitStack) -> Run:
    """Build a run that is ready for its first optimizer step.

    Args:
        notify: prints a line.
        ends: closed at the end of the run, which releases the lock of its folder.

    Raises:
        UserError: on all ranks.
    """
    length = check_trained_model(recipe, spec.config, adapted=spec.adapted)
    check_resumption(recipe)
    announced = print_setup(recipe, spec, notify)
    fabric = launch(recipe)
    if recipe.add_version:
        recipe = replace(recipe, out_dir=create_version(recipe.out_dir), add_version=False)
        notify(header.format_rows([("Version", str(recipe.out_dir))]))
    ends.enter_context(lock_run(recipe.out_dir, notify))
    mesh = cast(MeshStrategy, fabric.strategy).mesh
    recipe.check_tasks(ParallelDims() if mesh is None else mesh.dims)
    precision = build_precision(recipe.precision, recipe.parallel.reduce_dtype)
    check_attention_kernel(recipe.attention, spec.config, fabric.device, precision.compute or precision.storage)
    resumed_from = find_resumed(recipe, notify)
    print_resumption(recipe, spec, resumed_from, announced, notify)
    data = open_data(recipe, spec, fabric, mesh, length, resumed=resumed_from is not None)
    for warning in data.tokenizer.warnings if data.tokenizer else ():
        notify(warning)
    answers = spec.data.answers_per_sample
    steps = count_steps(recipe.train, length, data.train.samples_per_epoch, answers=answers)
    warmup = count_warmup_steps(recipe.train, steps)
    streams = (data.train, data.validation)
    sizes = header.describe_data(recipe, streams, length=length * answers, steps=steps, warmup=warmup)
    notify(header.format_rows(sizes))
    for line in list_warnings(recipe, spec, data, steps, fabric):
        notify(line)
    resumed = resumed_from is not None
    train_state = build_train_state(recipe, spec, mesh, fabric.device, resumed=resumed, steps=steps)
    progress = restore(recipe, spec, train_state, resumed_from, notify) if resumed_from else {}
    checkpoints = open_checkpoints(recipe, spec, train_state, resumed_step=progress.get("step", 0), notify=notify)
    checkpoints.uploads = open_uploads(recipe, spec, checkpoints, resumed_from, notify)
    if "stream" in progress:
        data.train.load_state_dict(progress["stream"])
    if fabric.global_rank == 0:
        write_run_files(recipe, spec)
    return Run(
        recipe=recipe,
        spec=spec,
        train_state=train_state,
        data=data,
        schedule=Schedule.from_args(recipe.train, peak=recipe.optimizer.lr, warmup=warmup, steps=steps),
        steps=steps,
        checkpoints=checkpoints,
        loggers=build_loggers(recipe, f"{spec.task}-{spec.config.name}", progress.get("step")),
        progress=progress,
        ranks=fabric.world_size,
    )


def create_version(out_dir: Path) -> Path:
    """Create the next folder `version_N`, on the first rank; returns it on all of them."""
    name = ""
    while is_rank_zero() and not name:
        name = f"version_{choose_version(out_dir, resumed=False)}"
        try:
            (out_dir / name).mkdir(parents=True)
        except FileExistsError:  # another run has created it in the meantime
            name = ""
    return out_dir / share_first_message(name)


def print_setup(recipe: Training, spec: RunSpec, notify: Notify) -> str | None:
    """Print the rows of the header that need no other process; returns the start, if it is known."""
    early = header.find_start(recipe)  # which the command line has printed
    start = early if recipe.resume else header.describe_origin(recipe, spec.weights, spec.adapter, None)
    rows = [("Start", start)] if start and start != early else []
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    world = count_processes(recipe.devices, recipe.num_nodes)
    dims = recipe.parallel.resolve_dims(world, num_nodes=recipe.num_nodes)
    rows += header.describe_setup(spec, dims, device, recipe.precision or default_precision())
    notify(header.format_rows(rows))
    return start


def print_resumption(
    recipe: Training, spec: RunSpec, resumed_from: Path | None, announced: str | None, notify: Notify
) -> None:
    """Print where the run starts, if it is not what `print_setup` announced, and which settings have changed since."""
    start = header.describe_origin(recipe, spec.weights, spec.adapter, resumed_from)
    rows = [("Start", start)] if start != announced else []  # a damaged checkpoint was left out, or there is none
    if resumed_from is not None and (changes := describe_changes(recipe, resumed_from)):
        rows.append(("Changed", changes))
    if rows:
        notify(header.format_rows(rows))


def list_warnings(recipe: Training, spec: RunSpec, data: RunData, steps: int | None, fabric: Fabric) -> list[str]:
    """List what has no effect or is not trained in this run; one line each, empty on ranks other than the first."""
    if not is_rank_zero():
        return []
    dims = recipe.parallel.resolve_dims(fabric.world_size)
    lines = recipe.list_unused_settings(dims)
    if recipe.fp8.recipe is not None:
        lines += describe_fp8(GPT.on_meta(spec.config), recipe.fp8, dims, fabric.device)
    warmup = recipe.train.lr_warmup_steps or 0
    if steps is not None and warmup > steps:
        lines.append(
            f"train.lr_warmup_steps: {warmup} is more than the {steps} steps of the run, so the learning rate rises to "
            f"the end; set at most {max(1, steps // 10)}"
        )
    if recipe.eval.initial_validation and data.validation is None:
        lines.append("eval.initial_validation: true has no effect without validation data; set false")
    bias = getattr(spec.tuner, "bias", "none")
    if bias != "none" and not any(name.endswith("bias") for name, _ in GPT.on_meta(spec.config).named_parameters()):
        lines.append(describe_no_effect("tuner.bias", bias, "a model without biases", "set none"))
    in_host_memory = recipe.parallel.cpu_offload or not torch.accelerator.is_available()
    if spec.preference is not None and spec.preference.reference_offload and in_host_memory:
        other, cure = "a model in host memory", "set false"
        lines.append(describe_no_effect("preference.reference_offload", True, other, cure))
    for key, value in spec.disabled_dropout.items():
        cure = "set preference.disable_dropout: false"
        lines.append(describe_no_effect(key, value, "preference.disable_dropout: true", cure))
    layers = spec.config.n_prediction_layers
    if layers and recipe.loss.prediction_weight and not spec.count_trained_predictions():
        lines.append(f"n_prediction_layers: {layers} of the model are not trained here, and saved as they are")
    if spec.config.router_correction and not spec.adapted and not recipe.moe.router_bias_update_rate:
        lines.append(
            "moe.router_bias_update_rate: 0 leaves the model's router_correction at its values; set 0.001 to balance "
            "the load of experts by it"
        )
    return lines


def open_data(
    recipe: Training, spec: RunSpec, fabric: Fabric, mesh: Mesh | None, length: int, *, resumed: bool
) -> RunData:
    """Prepare the data on the first rank, and open its streams on all.

    Raises:
        UserError: if tokenizer, data and model do not match.
    """
    folder = train_or_find_tokenizer(recipe, spec, fabric, resumed=resumed)
    tokenizer = Tokenizer(folder) if folder else None
    if tokenizer:
        check_vocabulary(tokenizer, spec.config, has_weights=spec.weights is not None)
        tokenizer.check_rows(spec.config.padded_vocab_size or 0, spec.get_vocabulary_cure(tokenizer.id_limit))
    spec.data.connect(tokenizer, batch_size=recipe.train.micro_batch_size, max_seq_length=length)
    with fabric.rank_zero_first():
        spec.data.prepare_data()
    spec.data.setup()
    for key in ("sample_prompt", "tasks") if tokenizer is None else ():
        if getattr(recipe.eval, key) is not None:
            raise UserError(f"eval.{key}: needs a tokenizer; set tokenizer_dir, or eval.{key}: null")
    shape = BatchShape(
        micro_batch_size=recipe.train.micro_batch_size,
        global_batch_size=recipe.train.global_batch_size,
        max_seq_length=length,
        rank=0 if mesh is None else mesh.rank("data"),
        ranks=1 if mesh is None else mesh.dims.data_ranks,
        seed=recipe.seed,
        gather=all_gather_objects,
    )
    files = spec.data.prompt_files()
    settings = recipe.eval
    prompt = spec.data.encode_example_prompt(settings.evaluate_example, recipe.seed) if settings.max_new_tokens else []
    train, validation = spec.data.train_stream(shape), spec.data.val_stream(shape)
    asked = getattr(validation or train, "samples", None) if settings.max_new_tokens else None
    questions = list_image_questions(asked, settings.evaluate_example, recipe.seed)
    if recipe.checkpoint.best and validation is None:
        metric = recipe.checkpoint.best.metric
        raise UserError(
            f"checkpoint.best.metric: {metric} needs validation data; add some, or set checkpoint.best: null"
        )
    for samples in (getattr(opened, "samples", None) for opened in (train, validation)):
        if isinstance(samples, WindowDataset):  # known before the model is loaded; all others when they are read
            check_token_range(to_batch(samples.micro_batch(0, shape.micro_batch_size)), spec)
    return RunData(
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        tokenizer_dir=folder,
        sequence_length=length,
        ranks=shape.ranks,
        micro_batches=recipe.train.accumulation(shape.ranks),
        example_prompt=prompt,
        image_questions=questions,
        stop_ids=list_stop_ids(tokenizer, files),
        prompt_files=files,
    )


def list_stop_ids(tokenizer: Tokenizer | None, prompt_files: dict[str, str] | None) -> tuple[int, ...]:
    """The tokens that end a text: those of the tokenizer, and those of the prompt format of the data."""
    ends = json.loads((prompt_files or {}).get("generation_config.json", "{}")).get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    return tuple(dict.fromkeys([*(tokenizer.stop_ids if tokenizer else ()), *ends]))


def train_or_find_tokenizer(recipe: Training, spec: RunSpec, fabric: Fabric, *, resumed: bool) -> Path | None:
    """The folder of the tokenizer, which the first rank trains if the spec says so; None without a tokenizer."""
    if spec.tokenizer is None:
        return spec.tokenizer_dir
    folder = recipe.out_dir / "tokenizer"
    with fabric.rank_zero_first():
        if fabric.global_rank == 0 and not (resumed and folder.exists()):
            shutil.rmtree(folder, ignore_errors=True)  # of a run without a checkpoint, possibly trained on other text
            train_tokenizer(spec.data.training_documents(), spec.tokenizer.kind, spec.tokenizer.vocab_size, folder)
    return folder


def write_run_files(recipe: Training, spec: RunSpec) -> None:
    """Write the recipe and the report on the data into `out_dir`."""
    write_text(recipe.out_dir / "recipe.yaml", dump_recipe(recipe))
    if report := spec.data.report():
        write_json(recipe.out_dir / DATA_REPORT_FILE, report)


def build_loggers(recipe: Training, project: str, resumed_step: int | None) -> list[Logger]:
    """Build the CSV logger, which the report reads, and the one that the recipe names."""
    names = dict.fromkeys(("csv", recipe.logger_name))
    return [build_logger(name, recipe.out_dir, recipe.log, resumed_step, project=project) for name in names]
