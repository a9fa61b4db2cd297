"""The groups of settings of a training run: train, eval, log, loss, checkpoint and guard."""

from dataclasses import dataclass
from typing import Any, Literal

from litgpt.errors import UserError
from litgpt.recipe.bounds import BatchSize, Count, Fraction, Position, Positive, Rate, TokenCount, check_numbers


@dataclass(frozen=True)
class TrainArgs:
    """How long to train, on how much at a time, and at which learning rate."""

    save_interval: Count | None = 1000
    """Optimizer steps between checkpoints; null saves only at the end."""
    log_interval: Count = 1
    """Optimizer steps between lines in the log."""
    global_batch_size: BatchSize = 64
    """Samples in one optimizer step, over all devices."""
    micro_batch_size: BatchSize = 4
    """Samples in one forward pass of one device."""
    lr_warmup_steps: Position | None = 100
    """Optimizer steps over which the learning rate rises from 0; null for none."""
    lr_warmup_fraction: Fraction | None = None
    """Share of one epoch over which the learning rate rises, instead of lr_warmup_steps."""
    epochs: Count | None = None
    """End after this many passes over the data."""
    max_tokens: TokenCount | None = None
    """End after this many tokens, counted over all devices."""
    max_steps: Count | None = None
    """End after this many optimizer steps."""
    max_time: Positive | None = None
    """End after this many seconds."""
    max_seq_length: Count | None = None
    """Tokens in a sample; null for the model's block_size."""
    tie_embeddings: bool | None = None
    """Let the output layer share the embedding's weights; null leaves it to the model."""
    max_norm: Positive | None = None
    """Clip the gradient's norm over all parameters to this; null for no clipping."""
    min_lr: Rate = 6e-5
    """The learning rate that the decay ends on."""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-sqrt", "wsd"] = "cosine"
    """How the learning rate falls after the warm-up; wsd is warm-up, stable, decay."""
    lr_decay_steps: Count | None = None
    """The optimizer step at which min_lr is reached; null for the end of the run."""
    wsd_decay_steps: Count | None = None
    """Optimizer steps of the decay of wsd; null for a tenth of the run."""
    wsd_decay_style: Literal["linear", "cosine", "exponential", "minus-sqrt"] = "linear"
    """How the learning rate falls in the decay of wsd."""

    def __post_init__(self) -> None:
        check_numbers(self, "train.")
        if self.lr_warmup_steps and self.lr_warmup_fraction:
            raise UserError(
                f"train.lr_warmup_fraction: {self.lr_warmup_fraction} and train.lr_warmup_steps: "
                f"{self.lr_warmup_steps} exclude each other; set one of them to null"
            )
        if self.micro_batch_size > self.global_batch_size:
            raise UserError(
                f"train.micro_batch_size: {self.micro_batch_size} is more than train.global_batch_size: "
                f"{self.global_batch_size}; give at most {self.global_batch_size}"
            )
        if self.wsd_decay_steps and self.lr_decay_style != "wsd":
            raise UserError(
                f"train.wsd_decay_steps: {self.wsd_decay_steps} has no effect with train.lr_decay_style: "
                f"{self.lr_decay_style}; set train.lr_decay_style: wsd"
            )

    def accumulation(self, data_ranks: int) -> int:
        """Micro-batches of one rank in one optimizer step, with the global batch cut over `data_ranks` ranks.

        Raises:
            UserError: if the cut leaves a remainder, naming the nearest global batches that do not.
        """
        at_once = self.micro_batch_size * data_ranks
        below = self.global_batch_size // at_once * at_once
        if below != self.global_batch_size:
            would_do = " or ".join(str(size) for size in (below, below + at_once) if size)
            raise UserError(
                f"train.global_batch_size: {self.global_batch_size} is no multiple of micro_batch_size x data ranks = "
                f"{self.micro_batch_size} x {data_ranks} = {at_once}; {would_do} would do"
            )
        return below // at_once


@dataclass(frozen=True)
class EvalArgs:
    """When to measure the validation loss, and on how much."""

    interval: Count = 600
    """Optimizer steps between validations."""
    max_new_tokens: Count | None = None
    """Belongs to finetuning; a pretraining run has sample_tokens."""
    max_iters: Count = 100
    """Micro-batches of one validation, counted on one device."""
    initial_validation: bool = False
    """Validate before the first step."""
    final_validation: bool = True
    """Validate after the last step."""
    evaluate_example: Literal["first", "random"] | Position = "first"
    """Belongs to finetuning; a pretraining run has sample_prompt."""
    sample_prompt: str | None = None
    """A text that the model continues at every validation; null for none."""
    sample_tokens: Count = 64
    """Tokens of that continuation."""

    def __post_init__(self) -> None:
        check_numbers(self, "eval.")


@dataclass(frozen=True)
class LogArgs:
    """What a run is called where it is logged (W&B, MLflow)."""

    project: str | None = None
    """The project, or experiment, that the run is filed under."""
    run: str | None = None
    """The name of the run."""
    group: str | None = None
    """The group of runs, in W&B."""
    teamspace: str | None = None
    """A setting of litlogger."""
    metadata: dict[str, Any] | None = None
    """A setting of litlogger."""
    log_model: bool = False
    """A setting of litlogger."""
    save_logs: bool = True
    """A setting of litlogger."""
    checkpoint_name: str | None = None
    """A setting of litlogger."""

    def __post_init__(self) -> None:
        for key in ("teamspace", "metadata", "log_model", "checkpoint_name"):
            if value := getattr(self, key):
                raise UserError(f"log.{key}: {value!r} is a setting of litlogger, which is not among the loggers here")
        if not self.save_logs:
            raise UserError("log.save_logs: False is a setting of litlogger, which is not among the loggers here")


@dataclass(frozen=True)
class LossArgs:
    """What the loss over the vocabulary is, and how it is computed."""

    type: Literal["ce", "dft"] = "ce"
    """ce is cross-entropy; dft multiplies each token's by its probability, so that unlikely tokens move less."""
    normalize: Literal["token", "microbatch", "sample"] = "token"
    """What counts alike in a global batch: every target token, every micro-batch, or every sample."""
    impl: Literal["chunked", "plain"] = "chunked"
    """chunked never holds the scores of all tokens at once; plain does."""
    chunk_rows: Count = 512
    """Tokens whose scores are held at once by chunked."""

    def __post_init__(self) -> None:
        check_numbers(self, "loss.")


@dataclass(frozen=True)
class CheckpointArgs:
    """How checkpoints are written and how many are kept."""

    keep: Count = 2
    """The newest so many stay, older ones are removed."""
    asynchronous: bool = True
    """Go on training while a checkpoint is being written. May be written `async`."""
    on_error: Literal["stop", "continue"] = "stop"
    """What to do when a checkpoint cannot be written, such as on a full disk."""
    save_rng: bool = True
    """Save the state of the random generators, so that a resumed run is the same run."""

    def __post_init__(self) -> None:
        check_numbers(self, "checkpoint.")


@dataclass(frozen=True)
class GuardArgs:
    """When not to step, and when to say or stop."""

    max_skipped: Count = 5
    """End the run after this many steps in a row whose loss or gradient is not finite."""
    spike_window: Count = 100
    """Optimizer steps whose losses a new loss is held against."""
    spike_sigma: Positive = 6.0
    """Report a loss this many standard deviations above their mean."""

    def __post_init__(self) -> None:
        check_numbers(self, "guard.")
