"""The groups of settings of a training run: train, eval, log, loss, checkpoint and guard."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from litgpt.errors import UserError
from litgpt.recipe.bounds import BatchSize, Count, Fraction, Position, Positive, Rate, TokenCount, check_numbers
from litgpt.recipe.effect import check_effects
from litgpt.recipe.object_url import find_url

LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow", "trackio", "swanlab"]
NAMED_RUNS = ("wandb", "mlflow", "trackio", "swanlab")  # loggers with projects, and names of runs
LOWER_IS_BETTER = ("val_loss", "val_ppl")


@dataclass(frozen=True)
class TrainArgs:
    """The length of training, the batch size and the learning rate schedule."""

    save_interval: Count | None = 1000
    """Number of optimizer steps between checkpoints; null saves only at the end."""
    log_interval: Count = 1
    """Number of optimizer steps between log entries; the last step is always logged."""
    global_batch_size: BatchSize = 64
    """Number of samples per optimizer step, over all devices."""
    micro_batch_size: BatchSize = 4
    """Number of samples per forward pass on one device."""
    lr_warmup_steps: Position | None = 100
    """Number of optimizer steps of learning rate warmup from 0; null for no warmup."""
    lr_warmup_fraction: Fraction | None = None
    """Fraction of the run, or of lr_decay_steps if given, for learning rate warmup, instead of lr_warmup_steps."""
    epochs: Count | None = None
    """Maximum number of passes over the training data; by default no limit if max_steps or max_tokens is given."""
    max_tokens: TokenCount | None = None
    """Maximum number of training tokens, over all devices."""
    max_steps: Count | None = None
    """Maximum number of optimizer steps."""
    max_time: Positive | None = None
    """Maximum training time, in seconds; the learning rate decays until then if that is before the last step."""
    patience: Count | None = None
    """Stop after this number of validations without a better checkpoint.best.metric; null to never stop early."""
    max_seq_length: Count | None = None
    """Maximum sequence length of a sample, in tokens; null for the block_size of the model."""
    tie_embeddings: bool | None = None
    """Whether the output layer shares the weights of the embedding; null for the setting of the model."""
    max_norm: Positive | None = None
    """Maximum gradient norm over all parameters, for gradient clipping; null for no clipping."""
    min_lr: Rate | None = None
    """Learning rate at the end of the decay; null for 6e-5 (4e-5 when pretraining), or lr / 10 if that is above lr."""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-sqrt", "wsd"] = "cosine"
    """Learning rate schedule after warmup; wsd is warmup-stable-decay."""
    lr_decay_steps: Count | None = None
    """Optimizer step at which min_lr is reached; null for the end of training, by steps or by max_time."""
    wsd_decay_steps: Count | None = None
    """Number of optimizer steps in the decay phase of wsd; null for a tenth of the training steps."""
    wsd_decay_style: Literal["linear", "cosine", "exponential", "minus-sqrt"] = "linear"
    """Shape of the decay phase of wsd."""
    gc_interval: Position | None = None
    """Number of optimizer steps between garbage collections of Python, on all ranks at once; 0 for none; null to leave
    them to Python."""

    def __post_init__(self) -> None:
        check_numbers(self, "train.")
        if self.lr_warmup_steps and self.lr_warmup_fraction:
            raise UserError(
                f"train.lr_warmup_fraction: {self.lr_warmup_fraction} and train.lr_warmup_steps: "
                f"{self.lr_warmup_steps} are mutually exclusive; set one of them to null"
            )
        if self.micro_batch_size > self.global_batch_size:
            raise UserError(
                f"train.micro_batch_size: {self.micro_batch_size} is larger than train.global_batch_size: "
                f"{self.global_batch_size}; use at most {self.global_batch_size}"
            )
        style = self.lr_decay_style
        has_end, other, cure = style not in ("constant", "inverse-sqrt"), f"train.lr_decay_style: {style}", "set null"
        check_effects(self, "train.", "lr_decay_steps", have_effect=has_end, other=other, cure=cure)
        names, cure = ("wsd_decay_steps", "wsd_decay_style"), "set train.lr_decay_style: wsd"
        check_effects(self, "train.", *names, have_effect=style == "wsd", other=other, cure=cure)

    def accumulation(self, data_ranks: int) -> int:
        """Return the number of gradient accumulation steps: micro-batches per rank and optimizer step.

        Args:
            data_ranks: number of ranks over which the global batch is split.

        Raises:
            UserError: if global_batch_size is not divisible by micro_batch_size x data_ranks.
        """
        divisor = self.micro_batch_size * data_ranks
        floor = self.global_batch_size // divisor * divisor
        if floor != self.global_batch_size:
            sizes = " or ".join(str(size) for size in (floor, floor + divisor) if size)
            raise UserError(
                f"train.global_batch_size: {self.global_batch_size} is not divisible by micro_batch_size x data ranks "
                f"= {self.micro_batch_size} x {data_ranks} = {divisor}; use {sizes}"
            )
        return floor // divisor


def split_names(value: str | list[str] | None) -> list[str]:
    """The names in a list, or separated by commas."""
    names = value.split(",") if isinstance(value, str) else value or []
    return [name.strip() for name in names if name.strip()]


@dataclass(frozen=True)
class EvalArgs:
    """When to validate, and on how much data."""

    interval: Count = 600
    """Number of optimizer steps between validations."""
    max_new_tokens: Count | None = None
    """Number of tokens to generate for evaluate_example, when finetuning; use sample_tokens when pretraining."""
    max_iters: Count | Literal[-1] | None = 100
    """Maximum number of micro-batches per validation, over all devices; -1 or null for all validation data."""
    initial_validation: bool = False
    """Validate before the first step."""
    final_validation: bool = True
    """Validate after the last step."""
    evaluate_example: Literal["first", "random"] | Position = "first"
    """The sample to generate an answer for at every validation, when finetuning; of samples with images, the first of
    four, from the validation data if there are any. When pretraining, use sample_prompt."""
    sample_prompt: str | None = None
    """Prompt that the model completes at every validation; null for none."""
    sample_tokens: Count = 64
    """Number of tokens to generate for sample_prompt."""
    tasks: str | list[str] | None = None
    """Tasks of lm-eval to score at every validation, a list or separated by commas; null for none."""
    task_path: Path | None = None
    """Folder with tasks of your own: YAML files of lm-eval."""
    task_limit: Count | None = None
    """Number of samples of each task, from the first one; null for all."""

    def __post_init__(self) -> None:
        if self.max_iters == -1:
            object.__setattr__(self, "max_iters", None)
        check_numbers(self, "eval.")
        has_prompt, other = self.sample_prompt is not None, "eval.sample_prompt: null"
        cure = "set eval.sample_prompt"
        check_effects(self, "eval.", "sample_tokens", have_effect=has_prompt, other=other, cure=cure)
        has_tasks, other, cure = self.tasks is not None, "eval.tasks: null", "set eval.tasks"
        check_effects(self, "eval.", "task_path", "task_limit", have_effect=has_tasks, other=other, cure=cure)

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks."""
        return split_names(self.tasks)


@dataclass(frozen=True)
class LogArgs:
    """What is logged, where, and under which names in W&B, MLflow, trackio and SwanLab."""

    project: str | None = None
    """Project of W&B, trackio or SwanLab, or MLflow experiment."""
    run: str | None = None
    """Name of the run."""
    group: str | None = None
    """Group of the run."""
    save_dir: Path | None = None
    """Folder of the files of TensorBoard, W&B or SwanLab; null for logs in out_dir, WANDB_DIR or SWANLAB_LOG_DIR."""
    tensorboard_queue_size: Count = 10
    """Number of values that TensorBoard holds in memory before it writes them."""
    params_norm: bool = False
    """Log the L2 norm of all trained parameters."""
    timers: bool = False
    """Log the seconds per step of each phase of a step; the device is synchronized between them, which costs time."""
    teamspace: str | None = None
    """Only for litlogger, which is not supported."""
    metadata: dict[str, Any] | None = None
    """Only for litlogger, which is not supported."""
    log_model: bool = False
    """Only for litlogger, which is not supported."""
    save_logs: bool = True
    """Only for litlogger, which is not supported."""
    checkpoint_name: str | None = None
    """Only for litlogger, which is not supported."""

    def __post_init__(self) -> None:
        for key in ("teamspace", "metadata", "log_model", "checkpoint_name"):
            if value := getattr(self, key):
                raise UserError(f"log.{key}: {value!r} is a setting of litlogger, which is not supported; remove it")
        if not self.save_logs:
            raise UserError("log.save_logs: False is a setting of litlogger, which is not supported; remove it")


MODALITIES: tuple[Literal["text", "image"], ...] = ("text", "image")
"""What the tokens of a model are that writes images."""


@dataclass(frozen=True)
class LossArgs:
    """The loss function and its implementation."""

    type: Literal["ce", "dft"] = "ce"
    """Loss function: ce is cross-entropy; dft (dynamic fine-tuning) weights it by each token's probability."""
    normalize: Literal["token", "microbatch", "sample"] = "token"
    """What the loss of a global batch is averaged over: target tokens, micro-batches or samples."""
    impl: Literal["chunked", "plain"] = "chunked"
    """Implementation: chunked computes the logits in chunks of tokens; plain computes all logits at once."""
    chunk_rows: Count = 512
    """Number of tokens per chunk of logits in the chunked implementation."""
    prediction_weight: Rate = 0.1
    """Weight of the mean loss of the prediction layers, in models that have some; 0 leaves them as they are."""

    modalities: list[Literal["text", "image"]] = field(default_factory=lambda: list(MODALITIES))
    """Which tokens of a model that writes images are trained, of those that the data trains: text, images (their codes
    and the tokens around them), or both."""

    def __post_init__(self) -> None:
        check_numbers(self, "loss.")
        if not self.modalities:
            raise UserError("loss.modalities: empty trains nothing; set [text, image], [text] or [image]")
        other, cure = "loss.impl: plain", "set loss.impl: chunked"
        check_effects(self, "loss.", "chunk_rows", have_effect=self.impl == "chunked", other=other, cure=cure)


@dataclass(frozen=True)
class BestArgs:
    """By which metric a checkpoint is the best one."""

    metric: str = "val_loss"
    """Metric of the validations, as it is named in metrics.csv: val_loss, val_ppl or val_rewards/accuracies."""
    mode: Literal["min", "max"] | None = None
    """Whether the lowest (min) or the highest (max) value is the best; null is min for val_loss and val_ppl."""

    def __post_init__(self) -> None:
        if self.mode is None and self.metric not in LOWER_IS_BETTER:
            raise UserError(
                f"checkpoint.best.mode: null is valid for {' and '.join(LOWER_IS_BETTER)} only, not for "
                f"checkpoint.best.metric: {self.metric}; set min or max"
            )

    @property
    def direction(self) -> Literal["min", "max"]:
        """Whether the lowest or the highest value is the best."""
        return self.mode or "min"


@dataclass(frozen=True)
class CheckpointArgs:
    """How training checkpoints are saved, and how many are kept."""

    keep: Count = 2
    """Number of most recent checkpoints to keep; older ones are deleted."""
    asynchronous: bool = True
    """Save checkpoints in the background while training continues. Also accepted as `async`."""
    on_error: Literal["stop", "continue"] = "stop"
    """What to do if a checkpoint cannot be written, for example because the disk is full."""
    save_rng: bool = True
    """Save the states of the random number generators, without which a resumed run draws other dropout."""
    save_optimizer: bool = True
    """Save the optimizer state; without it, a checkpoint is a third as large, and a resumed run has new moments."""
    load_optimizer: bool = True
    """Load the optimizer state when resuming; false starts with new moments, and allows another optimizer."""
    load_rng: bool = True
    """Load the states of the random number generators when resuming."""
    best: BestArgs | None = None
    """Save a checkpoint at every validation that is the best so far, and keep the best one; null for none."""
    upload_to: str | None = None
    """Folder in an object store, such as s3://bucket/run or gs://bucket/run, that checkpoints are uploaded to in the
    background, and resumed from if the newest is there; null for none."""
    push_to_hub: str | None = None
    """Repository of the Hugging Face hub, org/name, that the model of each checkpoint is uploaded to in the background;
    null for none."""

    def __post_init__(self) -> None:
        check_numbers(self, "checkpoint.")
        if self.upload_to is not None and find_url(self.upload_to) is None:
            raise UserError(f"checkpoint.upload_to: {self.upload_to!r} is not valid; use a URL such as s3://bucket/run")


@dataclass(frozen=True)
class GuardArgs:
    """When to skip an optimizer step, to report a loss spike and to stop."""

    max_skipped: Count = 5
    """Maximum number of consecutive steps with a non-finite loss or gradient before training stops."""
    spike_window: Count = 100
    """Number of past optimizer steps over which the mean loss is computed for spike detection."""
    spike_sigma: Positive = 6.0
    """Report a loss that is this many standard deviations above the mean."""

    def __post_init__(self) -> None:
        check_numbers(self, "guard.")
