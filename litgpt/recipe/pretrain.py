"""Every setting of `litgpt pretrain`."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Seed, check_numbers
from litgpt.recipe.data import DataModule
from litgpt.recipe.optimizer import AdamW, Optimizer
from litgpt.recipe.parallel import ParallelArgs
from litgpt.recipe.train import CheckpointArgs, EvalArgs, GuardArgs, LogArgs, LossArgs, TrainArgs

DEFAULT_TOKENS = 3_000_000_000_000


@dataclass(frozen=True)
class TokenizerArgs:
    """A tokenizer that is made for the run from the run's own text."""

    kind: Literal["bpe", "bytes"] = "bpe"
    """bpe learns byte pairs; bytes has one token a byte."""
    vocab_size: Count = 4096
    """Tokens that bpe learns, special ones included."""

    def __post_init__(self) -> None:
        check_numbers(self, "tokenizer.")
        if self.kind == "bpe" and self.vocab_size <= 256:
            raise UserError(f"tokenizer.vocab_size: {self.vocab_size} is too few for bpe; give 512 or more")


@dataclass(frozen=True)
class Pretrain:
    """Pretrain a model on text, from scratch or from the weights of another."""

    model_name: str
    """A name from `litgpt pretrain list`, or one of your own with a whole model_config."""
    model_config: dict[str, Any] | None = None
    """Fields of the model's shape; on top of the named model's if the name is known."""
    out_dir: Path = Path("out/pretrain")
    """Folder for checkpoints, logs and the finished model."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true"] | None = None
    """Numbers to compute with; null for the best that the device has."""
    initial_checkpoint_dir: Path | None = None
    """A model folder to take the first weights from."""
    resume: bool | Literal["auto"] | Path = False
    """Go on from the newest checkpoint in out_dir (true), if there is one (auto), or from this one (a path)."""
    data: DataModule | None = None
    """Where the text comes from; null for TinyLlama's data."""
    train: TrainArgs = field(
        default_factory=lambda: TrainArgs(global_batch_size=512, lr_warmup_steps=2000, max_norm=1.0, min_lr=4e-5)
    )
    eval: EvalArgs = field(default_factory=lambda: EvalArgs(interval=1000))
    log: LogArgs = field(default_factory=LogArgs)
    optimizer: Optimizer = field(default_factory=AdamW)
    """The update rule and its settings."""
    devices: int | Literal["auto"] = "auto"
    """Processes on this node, one a device; auto or -1 for as many as there are GPUs, or 1."""
    num_nodes: Count = 1
    """Machines that run this together."""
    tokenizer_dir: Path | None = None
    """A folder with a tokenizer, which goes into the finished model as well."""
    tokenizer: TokenizerArgs | None = None
    """A tokenizer to be made from the run's own text, instead of tokenizer_dir."""
    logger_name: Literal["csv", "tensorboard", "wandb", "mlflow"] = "tensorboard"
    """Where the curves go."""
    seed: Seed = 42
    """Of the first weights and of the order of the data."""
    compile: bool | None = None
    """Compile the model with torch.compile; null where it pays."""
    parallel: ParallelArgs = field(default_factory=ParallelArgs)
    loss: LossArgs = field(default_factory=LossArgs)
    checkpoint: CheckpointArgs = field(default_factory=CheckpointArgs)
    guard: GuardArgs = field(default_factory=GuardArgs)

    def __post_init__(self) -> None:
        check_numbers(self)
        train = self.train
        if not (train.max_tokens or train.max_steps or train.epochs or train.max_time):
            object.__setattr__(self, "train", replace(train, max_tokens=DEFAULT_TOKENS))
        self._check_excluding()
        self._check_layout()

    def _check_excluding(self) -> None:
        """Refuse keys that contradict each other or that pretraining has no use for."""
        if self.resume and self.initial_checkpoint_dir:
            raise UserError(
                f"resume: {self.resume} and initial_checkpoint_dir: {self.initial_checkpoint_dir} exclude each other; "
                "set resume: false to start anew from those weights"
            )
        if self.tokenizer and self.tokenizer_dir:
            raise UserError(
                f"tokenizer: {self.tokenizer.kind} and tokenizer_dir: {self.tokenizer_dir} exclude each other; "
                "set one of them to null"
            )
        if self.eval.max_new_tokens is not None:
            raise UserError(
                f"eval.max_new_tokens: {self.eval.max_new_tokens} is not for pretraining; set eval.sample_prompt and "
                f"eval.sample_tokens: {self.eval.max_new_tokens}"
            )
        if self.eval.evaluate_example != "first":
            raise UserError(
                f"eval.evaluate_example: {self.eval.evaluate_example} is not for pretraining; set eval.sample_prompt"
            )
        if self.train.lr_decay_style != "constant" and self.train.min_lr > self.optimizer.lr:
            raise UserError(
                f"train.min_lr: {self.train.min_lr} is above the optimizer's lr: {self.optimizer.lr}; "
                "set train.min_lr: 0"
            )

    def _check_layout(self) -> None:
        """Refuse devices that do not exist and, where their number is given, degrees and batches that do not fit."""
        if self.devices == "auto" or self.devices == -1:
            return
        if not 1 <= self.devices <= 2**16:
            raise UserError(f"devices: {self.devices} will not do; give auto or a number from 1")
        replicate, shard = self.parallel.degrees(self.devices * self.num_nodes)
        self.train.accumulation(replicate * shard)
