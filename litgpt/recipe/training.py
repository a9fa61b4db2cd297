"""What every training run sets, whatever it minimises: how long, on what, with which numbers and devices."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Seed, check_numbers
from litgpt.recipe.data import DataModule
from litgpt.recipe.optimizer import AdamW, Optimizer
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.recompute import RecomputeArgs
from litgpt.recipe.train import CheckpointArgs, EvalArgs, GuardArgs, LogArgs, LossArgs, TrainArgs


@dataclass(frozen=True, kw_only=True)
class Training:
    """The settings that pretraining and finetuning share."""

    out_dir: Path
    """Folder for checkpoints, logs and the finished model."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true"] | None = None
    """Numbers to compute with; null for the best that the device has."""
    resume: bool | Literal["auto"] | Path = False
    """Go on from the newest checkpoint in out_dir (true), if there is one (auto), or from this one (a path)."""
    data: DataModule | None = None
    """Where the text comes from."""
    train: TrainArgs = field(default_factory=TrainArgs)
    eval: EvalArgs = field(default_factory=EvalArgs)
    log: LogArgs = field(default_factory=LogArgs)
    optimizer: Optimizer = field(default_factory=AdamW)
    """The update rule and its settings."""
    devices: int | Literal["auto"] = "auto"
    """Processes on this node, one a device; auto or -1 for as many as there are GPUs, or 1."""
    num_nodes: Count = 1
    """Machines that run this together."""
    logger_name: Literal["csv", "tensorboard", "wandb", "mlflow"] = "csv"
    """Where the curves go."""
    seed: Seed
    """Of the first weights and of the order of the data."""
    compile: bool | None = None
    """Compile the model with torch.compile; null where it pays."""
    parallel: ParallelArgs = field(default_factory=ParallelArgs)
    recompute: RecomputeArgs = field(default_factory=RecomputeArgs)
    loss: LossArgs = field(default_factory=LossArgs)
    checkpoint: CheckpointArgs = field(default_factory=CheckpointArgs)
    guard: GuardArgs = field(default_factory=GuardArgs)

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.train.lr_decay_style != "constant" and self.train.min_lr > self.optimizer.lr:
            raise UserError(
                f"train.min_lr: {self.train.min_lr} is above the optimizer's lr: {self.optimizer.lr}; "
                "set train.min_lr: 0"
            )
        if self.compile and self.recompute.offload:
            raise UserError("recompute.offload: true and compile: true exclude each other; set compile: false")
        self._check_layout()

    def _check_layout(self) -> None:
        """Refuse devices that do not exist and, where their number is given, degrees and batches that do not fit."""
        if self.devices == "auto" or self.devices == -1:
            return
        if not 1 <= self.devices <= 2**16:
            raise UserError(f"devices: {self.devices} will not do; give auto or a number from 1")
        self.train.accumulation(self.parallel.resolve_dims(self.devices * self.num_nodes).data_ranks)
