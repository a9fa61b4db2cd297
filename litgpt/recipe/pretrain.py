"""Every setting of `litgpt pretrain`."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Seed, check_numbers
from litgpt.recipe.train import EvalArgs, TrainArgs
from litgpt.recipe.training import Training

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
class Pretrain(Training):
    """Pretrain a model on text, from scratch or from the weights of another."""

    model_name: str
    """A name from `litgpt pretrain list`, or one of your own with a whole model_config."""
    model_config: dict[str, Any] | None = None
    """Fields of the model's shape; on top of the named model's if the name is known."""
    initial_checkpoint_dir: Path | None = None
    """A model folder to take the first weights from."""
    tokenizer_dir: Path | None = None
    """A folder with a tokenizer, which goes into the finished model as well."""
    tokenizer: TokenizerArgs | None = None
    """A tokenizer to be made from the run's own text, instead of tokenizer_dir."""
    out_dir: Path = field(default=Path("out/pretrain"), kw_only=True)
    """Folder for checkpoints, logs and the finished model."""
    train: TrainArgs = field(
        default_factory=lambda: TrainArgs(global_batch_size=512, lr_warmup_steps=2000, max_norm=1.0, min_lr=4e-5),
        kw_only=True,
    )
    eval: EvalArgs = field(default_factory=lambda: EvalArgs(interval=1000), kw_only=True)
    logger_name: Literal["csv", "tensorboard", "wandb", "mlflow"] = field(default="tensorboard", kw_only=True)
    """Where the curves go."""
    seed: Seed = field(default=42, kw_only=True)
    """Of the first weights and of the order of the data."""

    def __post_init__(self) -> None:
        train = self.train
        if not (train.max_tokens or train.max_steps or train.epochs or train.max_time):
            object.__setattr__(self, "train", replace(train, max_tokens=DEFAULT_TOKENS))
        super().__post_init__()
        self._check_excluding()

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
