"""The settings of all training commands."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Seed, check_numbers
from litgpt.recipe.data import DataModule
from litgpt.recipe.effect import check_effects, describe_no_effect
from litgpt.recipe.fp8 import FP8Args
from litgpt.recipe.moe import MoEArgs
from litgpt.recipe.optimizer import AdamW, Optimizer
from litgpt.recipe.parallel import ParallelArgs, ParallelDims
from litgpt.recipe.profile import ProfileArgs
from litgpt.recipe.recompute import RecomputeArgs
from litgpt.recipe.train import (
    NAMED_RUNS,
    CheckpointArgs,
    EvalArgs,
    GuardArgs,
    LogArgs,
    LoggerName,
    LossArgs,
    TrainArgs,
)

SHARDED_DEFAULTS = {"zero": None, "reshard_after_forward": "auto", "prefetch": 0}
"""Settings of ParallelArgs that need parameters to be sharded."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The settings that pretraining and finetuning share; `default_min_lr` and `default_data` are used for null."""

    default_min_lr: ClassVar[float] = 6e-5
    default_data: ClassVar[str] = "TinyLlama"

    out_dir: Path
    """Output folder for checkpoints, logs and the final model."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true"] | None = None
    """Floating-point precision of training; null for the best that the device supports."""
    resume: bool | Literal["auto"] | Path = False
    """Resume from the latest checkpoint in out_dir (true), the latest one if any (auto), or a given one (a path)."""
    add_version: bool = False
    """Write into a new folder version_N in out_dir, so that each run has one of its own."""
    data: DataModule | None = None
    """Data module; null for Alpaca when finetuning, for TinyLlama when pretraining."""
    train: TrainArgs = field(default_factory=TrainArgs)
    eval: EvalArgs = field(default_factory=EvalArgs)
    log: LogArgs = field(default_factory=LogArgs)
    optimizer: Optimizer = field(default_factory=AdamW)
    """Optimizer and its settings."""
    devices: int | Literal["auto"] = "auto"
    """Number of devices per node; auto or -1 for all GPUs, or one CPU process without GPUs."""
    num_nodes: Count = 1
    """Number of nodes."""
    logger_name: LoggerName = "csv"
    """Where the metrics of a run are logged."""
    seed: Seed
    """Random seed of the initial weights, dropout and generated samples; the data order has data.seed."""
    compile: bool | None = None
    """Whether to compile the model with torch.compile; null for GPUs alone. Long runs on a CPU are faster with true."""
    deterministic: bool = False
    """Use deterministic algorithms only, so that runs on GPUs are equal to the bit; an operation without one is an
    error."""
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = "auto"
    """Kernel of attention without a mask: one of torch's scaled_dot_product_attention; auto for the fastest."""
    parallel: ParallelArgs = field(default_factory=ParallelArgs)
    recompute: RecomputeArgs = field(default_factory=RecomputeArgs)
    loss: LossArgs = field(default_factory=LossArgs)
    moe: MoEArgs = field(default_factory=MoEArgs)
    fp8: FP8Args = field(default_factory=FP8Args)
    checkpoint: CheckpointArgs = field(default_factory=CheckpointArgs)
    guard: GuardArgs = field(default_factory=GuardArgs)
    profile: ProfileArgs = field(default_factory=ProfileArgs)

    @property
    def objective(self) -> str:
        """The objective of the run, a row of the table in `train.run`."""
        return "next_token"

    @property
    def initial_weights(self) -> Path | None:
        """The model to start from; None for random weights."""
        return None

    @property
    def initial_adapter(self) -> Path | None:
        """The folder of an adapter to train further; None to start a new one."""
        return None

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.data is not None:
            self.data.set_objective(self.objective)
        self.optimizer.check_run(self.precision, cpu_offload=self.parallel.cpu_offload)
        self.fp8.check_run(self.precision, self.parallel)
        if self.add_version and self.resume in (True, "auto"):
            resume = str(self.resume).lower()
            raise UserError(
                f"add_version: true and resume: {resume} are mutually exclusive; to resume a version, set its folder "
                "as out_dir and add_version: false"
            )
        if self.add_version and self.checkpoint.upload_to is not None:
            raise UserError(
                f"checkpoint.upload_to: {self.checkpoint.upload_to} would hold the checkpoints of all versions; set "
                "add_version: false, and another URL for each run"
            )
        lr, min_lr = self.optimizer.lr, self.train.min_lr
        if min_lr is None:
            object.__setattr__(self, "train", replace(self.train, min_lr=self._get_default_min_lr()))
        elif self.train.lr_decay_style != "constant" and min_lr > lr:
            raise UserError(f"train.min_lr: {min_lr} is above the optimizer's lr: {lr}; set train.min_lr: 0")
        if self.compile and self.recompute.offload:
            raise UserError("recompute.offload: true and compile: true are mutually exclusive; set compile: false")
        has_best, other = self.checkpoint.best is not None, "checkpoint.best: null"
        cure = "set checkpoint.best.metric: val_loss"
        check_effects(self.train, "train.", "patience", have_effect=has_best, other=other, cure=cure)
        self._check_layout()

    def _get_default_min_lr(self) -> float:
        return self.default_min_lr if self.default_min_lr <= self.optimizer.lr else self.optimizer.lr / 10

    def list_unused_settings(self, dims: ParallelDims) -> list[str]:
        """List the settings without effect that LitGPT accepts, or that have one in another layout; one line each."""
        train, parallel = self.train, self.parallel
        unused = []
        if train.lr_decay_style == "constant" and train.min_lr != self._get_default_min_lr():
            style = "train.lr_decay_style: constant"
            unused.append(describe_no_effect("train.min_lr", train.min_lr, style, "set train.lr_decay_style: cosine"))
        for name in ("project", "run", "group") if self.logger_name not in NAMED_RUNS else ():
            if value := getattr(self.log, name):
                other, cure = f"logger_name: {self.logger_name}", "set logger_name: wandb or mlflow"
                unused.append(describe_no_effect(f"log.{name}", value, other, cure))
        if self.logger_name != "tensorboard" and self.log.tensorboard_queue_size != LogArgs.tensorboard_queue_size:
            name, other, cure = "tensorboard_queue_size", f"logger_name: {self.logger_name}", "set tensorboard"
            unused.append(describe_no_effect(f"log.{name}", self.log.tensorboard_queue_size, other, cure))
        if self.logger_name not in ("tensorboard", "wandb", "swanlab") and self.log.save_dir is not None:
            other, cure = f"logger_name: {self.logger_name}", "set logger_name: tensorboard or wandb"
            unused.append(describe_no_effect("log.save_dir", self.log.save_dir, other, cure))
        for name in ("load_optimizer", "load_rng") if self.resume is False else ():
            if not getattr(self.checkpoint, name):
                unused.append(describe_no_effect(f"checkpoint.{name}", False, "resume: false", "set resume: auto"))
        for name, default in SHARDED_DEFAULTS.items() if dims.shard == 1 else ():
            if (value := getattr(parallel, name)) != default:
                unused.append(describe_no_effect(f"parallel.{name}", value, "1 shard", "set parallel.data_shard: 2"))
        if parallel.reduce_dtype is not None and dims.shard * dims.data_replicate == 1:
            other, cure = "1 data rank", "set parallel.reduce_dtype: null"
            unused.append(describe_no_effect("parallel.reduce_dtype", parallel.reduce_dtype, other, cure))
        return unused

    def _check_layout(self) -> None:
        """Check the number of devices and, if it is given, that the parallel degrees and the batch size divide it."""
        if self.devices == "auto" or self.devices == -1:
            return
        if not 1 <= self.devices <= 2**16:
            raise UserError(f"devices: {self.devices} is not valid; use auto or a number from 1")
        dims = self.parallel.resolve_dims(self.devices * self.num_nodes, num_nodes=self.num_nodes)
        self.train.accumulation(dims.data_ranks)
        self.check_tasks(dims)

    def check_tasks(self, dims: ParallelDims) -> None:
        """Check that each rank has the whole model, if tasks are scored during training.

        Raises:
            UserError: naming the parallel degree that splits it.
        """
        for name in ("data_shard", "tensor", "context", "pipeline") if self.eval.tasks is not None else ():
            if (degree := getattr(dims, name)) > 1:
                raise UserError(
                    f"eval.tasks: {', '.join(self.eval.task_names)} is not supported with parallel.{name}: {degree}, "
                    f"because each rank scores a whole model; set parallel.data_replicate: {dims.world_size}, or "
                    "eval.tasks: null"
                )
