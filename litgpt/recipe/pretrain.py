"""The settings of `litgpt pretrain`."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from litgpt.errors import UserError
from litgpt.recipe.bounds import Seed, VocabularySize, check_numbers
from litgpt.recipe.effect import check_effects
from litgpt.recipe.train import EvalArgs, LoggerName, TrainArgs
from litgpt.recipe.training import Training

DEFAULT_TOKENS = 3_000_000_000_000


@dataclass(frozen=True)
class TokenizerArgs:
    """A new tokenizer, trained on the training data."""

    kind: Literal["bpe", "bytes"] = "bpe"
    """Tokenizer type: bpe is byte-pair encoding; bytes has one token per byte."""
    vocab_size: VocabularySize = 4096
    """Vocabulary size of bpe, including special tokens."""

    def __post_init__(self) -> None:
        check_numbers(self, "tokenizer.")
        other, cure = "tokenizer.kind: bytes", "set tokenizer.kind: bpe"
        check_effects(self, "tokenizer.", "vocab_size", have_effect=self.kind == "bpe", other=other, cure=cure)


@dataclass(frozen=True)
class Pretrain(Training):
    """Pretrain a model on text, from scratch or from existing weights."""

    default_min_lr: ClassVar[float] = 4e-5

    model_name: str
    """A model name from `litgpt pretrain list`, or a new name with a complete model_config."""
    model_config: dict[str, Any] | None = None
    """Fields of the model configuration; they override those of a known model_name."""
    initial_checkpoint_dir: Path | None = None
    """Model folder with the initial weights."""
    tokenizer_dir: Path | None = None
    """Folder with the tokenizer, which is also copied to the final model."""
    tokenizer: TokenizerArgs | None = None
    """Train a new tokenizer on the training data, instead of tokenizer_dir."""
    out_dir: Path = field(default=Path("out/pretrain"), kw_only=True)
    """Output folder for checkpoints, logs and the final model."""
    train: TrainArgs = field(
        default_factory=lambda: TrainArgs(global_batch_size=512, lr_warmup_steps=2000, max_norm=1.0),
        kw_only=True,
    )
    eval: EvalArgs = field(default_factory=lambda: EvalArgs(interval=1000), kw_only=True)
    logger_name: LoggerName = field(default="tensorboard", kw_only=True)
    """Where the metrics of a run are logged."""
    seed: Seed = field(default=42, kw_only=True)
    """Random seed of the initial weights, dropout and generated samples; the data order has data.seed."""

    @property
    def initial_weights(self) -> Path | None:
        """The model to start from; None for random weights."""
        return self.initial_checkpoint_dir

    def __post_init__(self) -> None:
        train = self.train
        if not (train.max_tokens or train.max_steps or train.epochs or train.max_time):
            object.__setattr__(self, "train", replace(train, max_tokens=DEFAULT_TOKENS))
        super().__post_init__()
        self._check_conflicts()

    def _check_conflicts(self) -> None:
        """Raise a UserError for keys that are mutually exclusive or that pretraining does not support."""
        if self.resume and self.initial_checkpoint_dir:
            raise UserError(
                f"resume: {self.resume} and initial_checkpoint_dir: {self.initial_checkpoint_dir} are mutually "
                "exclusive; set resume: false to start a new run from these weights"
            )
        if self.tokenizer and self.tokenizer_dir:
            raise UserError(
                f"tokenizer: {self.tokenizer.kind} and tokenizer_dir: {self.tokenizer_dir} are mutually exclusive; "
                "set one of them to null"
            )
        if self.eval.max_new_tokens is not None:
            raise UserError(
                f"eval.max_new_tokens: {self.eval.max_new_tokens} is not supported for pretraining; set "
                f"eval.sample_prompt and eval.sample_tokens: {self.eval.max_new_tokens}"
            )
        if self.eval.evaluate_example != "first":
            raise UserError(
                f"eval.evaluate_example: {self.eval.evaluate_example} is not supported for pretraining; "
                "set eval.sample_prompt"
            )
