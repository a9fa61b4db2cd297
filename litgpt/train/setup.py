"""Build a run in the one right order: processes, data, model on meta, layout, weights, optimizer, checkpoint."""

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from litgpt import adapt
from litgpt.adapt import quantization
from litgpt.adapt.llama_pro import load_expanded
from litgpt.adapt.neftune import add_embedding_noise
from litgpt.data.tokenizer import Tokenizer, train_tokenizer
from litgpt.errors import UserError
from litgpt.files import write_json, write_text
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.parallel.apply import apply_ddp, copy_full_tensor, init_mixed_precision, parallelize
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import PRECISIONS, default_precision
from litgpt.parallel.reduce import all_gather_objects
from litgpt.parallel.strategy import MeshStrategy
from litgpt.recipe.data import BatchShape, Stream
from litgpt.recipe.to_yaml import dump_recipe
from litgpt.recipe.training import Training
from litgpt.store.adapters.folder import load_adapter_folder
from litgpt.store.checkpoint_load import find_checkpoint, list_checkpoints, load_checkpoint
from litgpt.store.checkpoint_save import Checkpoints
from litgpt.store.load_model import iter_tensors, load_config, load_model
from litgpt.train import loggers, optimizer
from litgpt.train.guard import LossScale
from litgpt.train.objective import Objective
from litgpt.train.run_spec import RunSpec
from litgpt.train.schedule import Schedule
from litgpt.train.step import TrainState

Say = Callable[[str], None]


@dataclass
class Run:
    """Everything that the loop works with."""

    recipe: Training
    fabric: Fabric
    config: Config
    train_state: TrainState
    objective: Objective
    schedule: Schedule
    steps: int
    micro_batches: int
    sequence_length: int
    stream: Stream
    validation: Stream | None
    tokenizer: Tokenizer | None
    tokenizer_dir: Path | None
    adapted: bool
    notes: dict[str, str]
    question: list[int]
    channels: list[str]
    checkpoints: Checkpoints
    loggers: list[Logger]
    progress: dict[str, Any]

    @property
    def ranks(self) -> int:
        """All processes of the run."""
        return int(self.fabric.world_size)

    @property
    def data_ranks(self) -> int:
        """Ranks that read data of their own."""
        mesh = self.train_state.mesh
        return 1 if mesh is None else mesh.dims.data_ranks


def sequence_length(recipe: Training, config: Config) -> int:
    """Tokens in a sample.

    Raises:
        UserError: if the model cannot read so many.
    """
    length = recipe.train.max_seq_length or config.block_size
    if length > config.block_size:
        raise UserError(
            f"train.max_seq_length: {length} is more than the model's block_size; give at most {config.block_size}"
        )
    return length


def processes(recipe: Training) -> int:
    """Processes of the run: those that torchrun or SLURM started, or `devices` on each of `num_nodes`."""
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect():
            world = environment().world_size()
            asked = recipe.devices if isinstance(recipe.devices, int) else -1
            if asked > 0 and asked * recipe.num_nodes != world:
                raise UserError(
                    f"devices x num_nodes: {asked} x {recipe.num_nodes} is not {world}, the number of processes that "
                    "were started; set devices: auto"
                )
            return world
    if recipe.devices in ("auto", -1):
        return max(1, torch.cuda.device_count()) * recipe.num_nodes
    return int(recipe.devices) * recipe.num_nodes


def launch(recipe: Training) -> Fabric:
    """Start the processes of a run and give each its seed.

    Raises:
        UserError: if the layout does not fit the number of processes.
    """
    world = processes(recipe)
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    dims = recipe.parallel.resolve_dims(world)
    recipe.train.accumulation(dims.data_ranks)
    per_node, rest = divmod(world, recipe.num_nodes)
    if rest:
        raise UserError(f"num_nodes: {recipe.num_nodes} does not divide the {world} processes that were started")
    if accelerator == "cuda" and per_node > torch.cuda.device_count():
        raise UserError(f"devices: {per_node} is more than there are; give at most {torch.cuda.device_count()}")
    both = accelerator == "cuda" and recipe.parallel.cpu_offload  # norms are summed where gradients are
    backend = "cpu:gloo,cuda:nccl" if both else None
    fabric = Fabric(
        accelerator=accelerator,
        devices=per_node,
        num_nodes=recipe.num_nodes,
        strategy=MeshStrategy(dims, timeout=timedelta(minutes=recipe.parallel.timeout_minutes), backend=backend),
        precision="32-true",  # number formats are ours: FSDP2 and autocast apply them
    )
    fabric.launch()
    # each rank draws its own dropout, but those that hold the same tokens; first weights and data order have
    # generators of their own
    alike = 1 if recipe.parallel.sequence else dims.tensor
    fabric.seed_everything(recipe.seed + fabric.global_rank // alike, verbose=False)
    if accelerator == "cuda":
        torch.set_float32_matmul_precision("high")
    return fabric


def connect_data(
    recipe: Training, spec: RunSpec, fabric: Fabric, length: int, *, resumed: bool
) -> tuple[Tokenizer | None, Path | None]:
    """Prepare the run's data by the first rank and open it on all; the tokenizer, and its folder."""
    data = spec.data
    folder = spec.tokenizer_dir
    if made := spec.tokenizer:
        folder = recipe.out_dir / "tokenizer"
        with fabric.rank_zero_first():
            if fabric.global_rank == 0 and not (resumed and folder.exists()):
                shutil.rmtree(folder, ignore_errors=True)  # of a run that left no checkpoint, maybe of other text
                train_tokenizer(data.training_documents(), made.kind, made.vocab_size, folder)
    tokenizer = Tokenizer(folder) if folder else None
    data.connect(tokenizer, batch_size=recipe.train.micro_batch_size, max_seq_length=length)
    with fabric.rank_zero_first():
        data.prepare_data()
    data.setup()
    return tokenizer, folder


def on_meta(recipe: Training, spec: RunSpec, mesh: Mesh | None, device: torch.device) -> GPT:
    """The model as it will lie on this rank's device: adapted, split and sharded, without memory yet."""
    precision = PRECISIONS[recipe.precision or default_precision()]
    model = GPT.on_meta(spec.config).to(precision.storage)
    if spec.quantize:
        quantization.quantize(model, spec.quantize)
    if spec.tuner:
        adapt.attach(model, spec.tuner)
    if spec.noise:
        add_embedding_noise(model, spec.noise)
    parallelize(
        model,
        mesh,
        recipe.parallel,
        precision=precision,
        compile_blocks=compiles(recipe, device),
        recompute=recipe.recompute,
    )
    return model


def build_model(recipe: Training, spec: RunSpec, fabric: Fabric, *, weights_follow: bool) -> TrainState:
    """The model, laid out and with its first weights, and its optimizers.

    Args:
        weights_follow: a checkpoint will be loaded, so first weights would be thrown away.
    """
    strategy = fabric.strategy
    assert isinstance(strategy, MeshStrategy)
    precision = PRECISIONS[recipe.precision or default_precision()]
    model = on_meta(recipe, spec, strategy.mesh, fabric.device)
    model.to_empty(device="cpu" if recipe.parallel.cpu_offload else fabric.device)
    if spec.weights and (spec.adapted or not weights_follow):
        load_weights(model, spec, fabric.device)
    elif not weights_follow:
        initialize(model, recipe.seed, write=copy_full_tensor)
    if spec.adapter and not weights_follow:
        adapt.load_adapter(model, load_adapter_folder(spec.adapter, spec.config).tensors, write=copy_full_tensor)
    elif spec.tuner and not weights_follow:
        adapt.initialize_adapter(model, spec.tuner, recipe.seed, write=copy_full_tensor)
    optimizers = optimizer.build(recipe.optimizer, model, factor=spec.learning_rate_factor)
    schedule = adapt.build_schedule(model, spec.tuner, recipe.seed) if spec.tuner else None
    if schedule:
        init_mixed_precision(model)
        schedule.set_active(0)
    return TrainState(
        model=apply_ddp(model, strategy.mesh),
        optimizers=optimizers,
        device=fabric.device,
        precision=precision,
        mesh=strategy.mesh,
        scale=LossScale(active=precision.scaled),
        lisa_schedule=schedule,
    )


def compiles(recipe: Training, device: torch.device) -> bool:
    """Whether blocks are compiled: if the recipe says so, else where it pays and what they keep stays on the device."""
    return (device.type == "cuda" and not recipe.recompute.offload) if recipe.compile is None else recipe.compile


def load_weights(model: GPT, spec: RunSpec, device: torch.device) -> None:
    """Fill a model, which may be quantized, with the weights that the run starts from."""
    assert spec.weights is not None
    if spec.quantize:
        tensors = iter_tensors(spec.weights, spec.config)
        quantization.load_quantized(model, tensors, device=device, write=copy_full_tensor)
        return
    base = load_config(spec.weights)
    order = spec.tuner.get_block_order(base.n_layer) if spec.tuner else None
    if order:
        load_expanded(model, iter_tensors(spec.weights, base), order, write=copy_full_tensor)
    else:
        load_model(model, spec.weights)


def steps_of(recipe: Training, length: int, samples_per_epoch: int | None) -> int:
    """The optimizer steps after which a run ends, by whichever limit on steps, tokens or epochs comes first.

    Raises:
        UserError: if an epoch's length is needed and the data cannot tell it, or the limits leave no step.
    """
    train = recipe.train
    limits = [train.max_steps] if train.max_steps else []
    if train.max_tokens:
        limits.append(train.max_tokens // (train.global_batch_size * length))
        if not limits[-1]:
            raise UserError(
                f"train.max_tokens: {train.max_tokens} is less than one step of global_batch_size x max_seq_length = "
                f"{train.global_batch_size * length} tokens"
            )
    if train.epochs:
        if samples_per_epoch is None:
            raise UserError(
                f"train.epochs: {train.epochs}, but this data cannot tell its length; set train.epochs: null, and "
                "train.max_steps"
            )
        limits.append(math.ceil(train.epochs * samples_per_epoch / train.global_batch_size))
    return min(limits, default=2**62)


def warmup_of(recipe: Training, samples_per_epoch: int | None, steps: int) -> int:
    """Optimizer steps of warm-up, at most all of them."""
    train = recipe.train
    if train.lr_warmup_fraction is None:
        return min(train.lr_warmup_steps or 0, steps)
    if samples_per_epoch is None:
        raise UserError("train.lr_warmup_fraction: this data cannot tell its length; set train.lr_warmup_steps")
    return min(math.ceil(train.lr_warmup_fraction * samples_per_epoch / train.global_batch_size), steps)


def refuse_second_run(recipe: Training) -> None:
    """Refuse a folder that holds another run's checkpoints, which a fresh run would mix with its own."""
    steps = [folder for _, folder in list_checkpoints(recipe.out_dir)]
    if recipe.resume is False and steps:
        raise UserError(
            f"out_dir: {recipe.out_dir} holds a run already ({steps[0].name}); set resume: auto to go on with it, or "
            "another out_dir"
        )


def build(recipe: Training, spec: RunSpec, objective: Objective, say: Say) -> Run:
    """Build a run, up to the point where the first step can be made.

    Raises:
        UserError: for whatever the user can mend; on all ranks alike.
    """
    config, data = spec.config, spec.data
    length = sequence_length(recipe, config)
    refuse_second_run(recipe)
    fabric = launch(recipe)
    resumed = find_checkpoint(recipe.resume, recipe.out_dir, say)
    tokenizer, tokenizer_dir = connect_data(recipe, spec, fabric, length, resumed=resumed is not None)
    if tokenizer and tokenizer.id_limit > (config.padded_vocab_size or 0):
        raise UserError(
            f"tokenizer_dir: {tokenizer.id_limit} tokens, but the model has {config.padded_vocab_size} rows; "
            f"set model_config.padded_vocab_size: {-(-tokenizer.id_limit // 64) * 64}"
        )
    if recipe.eval.sample_prompt is not None and tokenizer is None:
        raise UserError("eval.sample_prompt: needs a tokenizer to be read; set tokenizer_dir, or sample_prompt: null")
    train_state = build_model(recipe, spec, fabric, weights_follow=resumed is not None)
    assert isinstance(train_state.core, GPT)
    kept = set(adapt.get_adapter_parameters(train_state.core)) if spec.adapted else None  # the rest is the spec's
    mesh = train_state.mesh
    layout = {} if mesh is None else asdict(mesh.dims)
    shape = BatchShape(
        micro_batch_size=recipe.train.micro_batch_size,
        global_batch_size=recipe.train.global_batch_size,
        max_seq_length=length,
        rank=0 if mesh is None else mesh.rank("data"),
        ranks=1 if mesh is None else mesh.dims.data_ranks,
        seed=recipe.seed,
        gather=all_gather_objects,
    )
    stream = data.train_stream(shape)
    steps = steps_of(recipe, length, stream.samples_per_epoch)
    warmup = warmup_of(recipe, stream.samples_per_epoch, steps)
    progress: dict[str, Any] = {}
    if resumed is not None:
        progress = load_checkpoint(
            resumed,
            train_state.core,
            train_state.optimizers,
            restore_rng=recipe.checkpoint.save_rng,
            saved_names=kept,
            layout=layout,
            warn=say,
        )
        stream.load_state_dict(progress["stream"])
        say(f"Resuming training from {resumed}")
    if fabric.global_rank == 0:
        write_text(recipe.out_dir / "recipe.yaml", dump_recipe(recipe))
        data.save_prompt_format(recipe.out_dir)
        if report := data.report():
            write_json(recipe.out_dir / "data_report.json", report)
    return Run(
        recipe=recipe,
        fabric=fabric,
        config=config,
        train_state=train_state,
        objective=objective,
        schedule=Schedule.of(recipe.train, peak=recipe.optimizer.lr, warmup=warmup, steps=steps),
        steps=steps,
        micro_batches=recipe.train.accumulation(shape.ranks),
        sequence_length=length,
        stream=stream,
        validation=data.val_stream(shape),
        tokenizer=tokenizer,
        tokenizer_dir=tokenizer_dir,
        adapted=spec.adapted,
        notes=spec.notes(),
        question=data.encode_example_prompt(recipe.eval.evaluate_example, recipe.seed)
        if recipe.eval.max_new_tokens
        else [],
        channels=list(stream.channels),
        checkpoints=Checkpoints(
            recipe.out_dir,
            keep=recipe.checkpoint.keep,
            asynchronous=recipe.checkpoint.asynchronous,
            on_error=recipe.checkpoint.on_error,
            save_rng=recipe.checkpoint.save_rng,
            resumed_step=progress.get("step", 0),
            saved_names=kept,
            layout=layout,
            warn=say,
        ),
        loggers=build_loggers(recipe, f"{spec.task}-{config.name}", progress.get("step")),
        progress=progress,
    )


def build_loggers(recipe: Training, project: str, resumed_step: int | None) -> list[Logger]:
    """CSV, which the report reads, and what the recipe names."""
    chosen = dict.fromkeys(("csv", recipe.logger_name))
    return [loggers.build(name, recipe.out_dir, recipe.log, resumed_step, project=project) for name in chosen]
