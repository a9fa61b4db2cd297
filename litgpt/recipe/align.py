"""The settings of `litgpt align` and of its variants."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from litgpt.errors import UserError
from litgpt.recipe.bounds import Fraction, Seed
from litgpt.recipe.data import DataModule
from litgpt.recipe.effect import check_effects
from litgpt.recipe.finetune import FinetuneLora
from litgpt.recipe.optimizer import AdamW, Optimizer
from litgpt.recipe.preference import PreferenceArgs
from litgpt.recipe.train import EvalArgs, TrainArgs

OWN_OBJECTIVES = {"kto": "kto", "reward": "reward"}
"""The objectives of the losses that are not of pairs of answers relative to each other."""


@dataclass(frozen=True)
class Align(FinetuneLora):
    """Train a model on preferences between answers."""

    default_data: ClassVar[str] = "Preferences"
    task: ClassVar[str] = "align"
    requires_data: ClassVar[bool] = True
    only_loss: ClassVar[str | None] = None
    """The loss of a command that has no other one."""

    out_dir: Path = field(default=Path("out/align"), kw_only=True)
    """Folder for checkpoints, logs, the adapter and the final model."""
    lora_dropout: Fraction = 0.0
    """Dropout probability of the updates' inputs; it needs preference.disable_dropout: false."""
    preference: PreferenceArgs = field(default_factory=PreferenceArgs, kw_only=True)
    data: DataModule | None = field(default=None, kw_only=True)
    """Data module: Preferences, with data.sources."""
    train: TrainArgs = field(
        default_factory=lambda: TrainArgs(global_batch_size=16, micro_batch_size=1, epochs=1), kw_only=True
    )
    eval: EvalArgs = field(default_factory=lambda: EvalArgs(interval=100), kw_only=True)
    optimizer: Optimizer = field(default_factory=lambda: AdamW(lr=5e-5), kw_only=True)
    """Optimizer and its settings."""
    seed: Seed = field(default=1337, kw_only=True)
    """Random seed of the tuner's initial weights, dropout and generated samples.

    The data order and the validation split have data.seed.
    """

    @property
    def objective(self) -> str:
        """The row of the table of objectives."""
        return OWN_OBJECTIVES.get(self.preference.types[0], "pairs")

    @property
    def output(self) -> Literal["logits", "score"]:
        """Scores for a reward model, which replace the logits of a language model."""
        return "score" if self.objective == "reward" else "logits"

    def __post_init__(self) -> None:
        if self.only_loss not in (None, *self.preference.types):
            raise UserError(
                f"preference.loss_type: {', '.join(self.preference.types)} is not the loss of this command, which is "
                f"{self.only_loss}; leave it out, or run `litgpt align`"
            )
        cure, other = "leave it out", f"preference.loss_type: {', '.join(self.preference.types)}"
        check_effects(
            self.loss,
            "loss.",
            "type",
            "normalize",
            "prediction_weight",
            "modalities",
            have_effect=False,
            other=other,
            cure=cure,
        )
        has_logits = self.output == "logits"
        check_effects(self.loss, "loss.", "impl", "chunk_rows", have_effect=has_logits, other=other, cure=cure)
        names = ("max_new_tokens", "sample_prompt", "evaluate_example", "tasks")
        check_effects(self.eval, "eval.", *names, have_effect=has_logits, other=other, cure=cure)
        super().__post_init__()  # whose cures may be these settings


@dataclass(frozen=True)
class AlignKTO(Align):
    """Train a model on answers that are rated as desirable or not (KTO)."""

    only_loss: ClassVar[str | None] = "kto"

    preference: PreferenceArgs = field(default_factory=lambda: PreferenceArgs(loss_type="kto"), kw_only=True)
    out_dir: Path = field(default=Path("out/kto"), kw_only=True)
    """Folder for checkpoints, logs, the adapter and the final model."""


@dataclass(frozen=True)
class AlignReward(Align):
    """Train a reward model on preferences between answers."""

    only_loss: ClassVar[str | None] = "reward"

    preference: PreferenceArgs = field(default_factory=lambda: PreferenceArgs(loss_type="reward"), kw_only=True)
    out_dir: Path = field(default=Path("out/reward"), kw_only=True)
    """Folder for checkpoints, logs, the adapter and the final model."""
