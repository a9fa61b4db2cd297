"""The settings of `litgpt finetune` and of its variants."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Fraction, Positive, Seed
from litgpt.recipe.effect import check_effects
from litgpt.recipe.freeze import FreezeArgs
from litgpt.recipe.part_rates import PartRates
from litgpt.recipe.preference import PreferenceArgs
from litgpt.recipe.train import EvalArgs, TrainArgs
from litgpt.recipe.training import Training
from litgpt.recipe.tuner import Adapter, AdapterV2, Full, LoRA, Tuner

TrainingQuantFormat = Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8-training", "torchao.nf4"]

# LitGPT's switches, and our layers that each selects.
LORA_SWITCHES = {
    "lora_query": ("q",),
    "lora_key": ("k",),
    "lora_value": ("v",),
    "lora_projection": ("attention.out",),
    "lora_mlp": ("mlp",),
    "lora_head": ("head",),
}
# LitGPT's other keys, and our settings of LoRA.
LORA_SETTINGS = {"lora_r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout"}


def train_defaults() -> TrainArgs:
    """The default training settings of finetuning."""
    return TrainArgs(global_batch_size=16, micro_batch_size=1, epochs=5)


@dataclass(frozen=True)
class Finetune(Training):
    """Settings of all kinds of finetuning."""

    default_data: ClassVar[str] = "Alpaca"
    task: ClassVar[str] = "finetune"
    requires_data: ClassVar[bool] = False

    checkpoint_dir: Path
    """The model to start from: a folder, or org/name on the hub, which is downloaded if necessary."""
    access_token: str | None = field(default=None, repr=False, kw_only=True)
    """Hugging Face access token, for gated models and data; null for HF_TOKEN."""
    model_config: dict[str, Any] | None = field(default=None, kw_only=True)
    """Fields of the model configuration that change no tensor, such as rope_adjustments or dropout; they override those
    of checkpoint_dir."""
    train: TrainArgs = field(default_factory=train_defaults, kw_only=True)
    eval: EvalArgs = field(default_factory=lambda: EvalArgs(interval=100, max_new_tokens=100), kw_only=True)
    devices: int | Literal["auto"] = field(default=1, kw_only=True)
    """Number of devices per node; auto or -1 for all GPUs, or one CPU process without GPUs."""
    seed: Seed = field(default=1337, kw_only=True)
    """Random seed of the tuner's initial weights, its draws of blocks, dropout, noise and generated samples.

    The data order and the validation split have data.seed.
    """
    freeze: FreezeArgs = field(default_factory=FreezeArgs, kw_only=True)
    rates: PartRates = field(default_factory=PartRates, kw_only=True)
    neftune_alpha: Positive | None = field(default=None, kw_only=True)
    """NEFTune: uniform noise on the embeddings, up to this over the root of sample length x model width."""

    @property
    def output(self) -> Literal["logits", "score"]:
        """What the model is trained to compute for each token: logits of the next one, or the score of the text."""
        return "logits"

    @property
    def quantization(self) -> str | None:
        """The format of the blocks' frozen matrices; None for no quantization."""
        return getattr(self, "quantize", None)

    @property
    def initial_weights(self) -> Path | None:
        """The model to start from."""
        return self.checkpoint_dir

    @property
    def initial_adapter(self) -> Path | None:
        """The folder of an adapter to train further; None to start a new one."""
        return getattr(self, "initial_adapter_dir", None)

    @property
    def preference_settings(self) -> PreferenceArgs | None:
        """The settings of preference training; None for other objectives."""
        return getattr(self, "preference", None)

    @property
    def resolved_tuner(self) -> Tuner:
        """The tuner that the settings select."""
        return getattr(self, "tuner", None) or Full()

    def list_dropout(self, tuner: Tuner) -> dict[str, float]:
        """The dropout of the tuner of the run by its key; empty if it is the default."""
        field, value = tuner.__dataclass_fields__.get("dropout"), getattr(tuner, "dropout", 0.0)
        return {} if field is None or value in (0.0, field.default) else {"tuner.dropout": value}

    def __post_init__(self) -> None:
        train = self.train
        if not (train.max_tokens or train.max_steps or train.epochs or train.max_time):
            raise UserError("train.epochs: null, and no other limit; set train.epochs: 1, or train.max_steps")
        if train.tie_embeddings is not None:
            raise UserError(f"train.tie_embeddings: {train.tie_embeddings} is not supported by finetuning; set null")
        super().__post_init__()
        has_samples, other = self.eval.max_new_tokens is not None, "eval.max_new_tokens: null"
        check_effects(
            self.eval, "eval.", "evaluate_example", have_effect=has_samples, other=other, cure="set it to 100"
        )
        self._check_splits()
        self._check_initialization()
        self._check_rates()

    def _check_initialization(self) -> None:
        """Raise a UserError if the adapter is initialized by what the run does not have."""
        init, quantized = getattr(self.resolved_tuner, "init", None), self.quantization
        if init == "loftq" and quantized is None:
            raise UserError("tuner.init: loftq has no effect without a quantized base; set quantize: bnb.nf4")
        if init != "lora_ga":
            return
        if quantized is not None:
            raise UserError(
                f"tuner.init: lora_ga needs gradients of the weights, which quantize: {quantized} freezes; set "
                "quantize: null, or tuner.init: loftq"
            )
        if self.preference_settings is not None:
            raise UserError("tuner.init: lora_ga is not supported for preferences; set tuner.init: pissa")
        for axis in ("tensor", "pipeline"):
            if (degree := getattr(self.parallel, axis)) > 1:
                raise UserError(
                    f"tuner.init: lora_ga is not supported with parallel.{axis}: {degree}; set parallel.{axis}: 1"
                )

    def _check_rates(self) -> None:
        """Raise a UserError for the learning rate of a part that is frozen."""
        self.rates.check_schedule(self.optimizer.lr)
        tuner = self.resolved_tuner
        exceptions = (getattr(tuner, f"trainable_parameters{end}", None) for end in ("", "_regex"))
        if self.initial_adapter is None and not any(exceptions):
            for part in sorted(self.rates.given.keys() & set(self.freeze.parts)):
                other, cure = f"freeze.{part}: true", f"set freeze.{part}: false"
                check_effects(self.rates, "rates.", part, have_effect=False, other=other, cure=cure)

    def _check_splits(self) -> None:
        """Raise a UserError for settings that do not support samples or blocks that are split over devices."""
        for axis in ("tensor", "context", "pipeline"):
            degree = getattr(self.parallel, axis)
            if self.neftune_alpha and degree > 1:
                raise UserError(
                    f"neftune_alpha: {self.neftune_alpha:g} is not supported with parallel.{axis}: {degree}; "
                    f"set parallel.{axis}: 1, or neftune_alpha: null"
                )
        if self.resolved_tuner.spans_blocks and self.parallel.pipeline > 1:
            raise UserError(
                f"tuner: {type(self.resolved_tuner).__name__} is not supported with parallel.pipeline: "
                f"{self.parallel.pipeline}; set parallel.pipeline: 1"
            )


@dataclass(frozen=True)
class FinetuneFull(Finetune):
    """Finetune the weights of a model, all or some of them."""

    out_dir: Path = field(default=Path("out/finetune/full"), kw_only=True)
    """Folder for checkpoints, logs and the final model."""
    eval: EvalArgs = field(default_factory=lambda: EvalArgs(interval=600, max_new_tokens=100), kw_only=True)
    tuner: Tuner = field(default_factory=Full, kw_only=True)
    """Which weights to train: the settings of Full, LISA or LLaMAPro."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tuner.adds:
            raise UserError(f"tuner: {type(self.tuner).__name__} adds to the model; use litgpt finetune, or Full")


@dataclass(frozen=True)
class FinetuneLora(Finetune):
    """Finetune a small adapter of a model with frozen weights."""

    out_dir: Path = field(default=Path("out/finetune/lora"), kw_only=True)
    """Folder for checkpoints, logs, the adapter and the final model."""
    lora_r: Count = 8
    """Rank of the updates."""
    lora_alpha: Positive = 16
    """Scale of the updates, which is lora_alpha / lora_r."""
    lora_dropout: Fraction = 0.05
    """Dropout probability of the updates' inputs."""
    lora_query: bool = True
    """Adapt the queries."""
    lora_key: bool = False
    """Adapt the keys."""
    lora_value: bool = True
    """Adapt the values."""
    lora_projection: bool = False
    """Adapt the output of attention."""
    lora_mlp: bool = False
    """Adapt the feed-forward layers."""
    lora_head: bool = False
    """Adapt the output layer."""
    quantize: TrainingQuantFormat | None = field(default=None, kw_only=True)
    """Quantize the frozen matrices of the blocks to 4 or 8 bits."""
    tuner: Tuner | None = field(default=None, kw_only=True)
    """A tuner of any kind, instead of the lora_ keys."""
    initial_adapter_dir: Path | None = field(default=None, kw_only=True)
    """Folder of an adapter of this model to train further, with its own settings and a new optimizer state."""

    def __post_init__(self) -> None:
        super().__post_init__()
        changed = [f.name for f in fields(self) if f.name.startswith("lora_") and getattr(self, f.name) != f.default]
        if self.tuner is not None and changed:
            key = LORA_SETTINGS.get(changed[0], "target_modules")
            raise UserError(f"{changed[0]}: not supported with tuner; set tuner.{key}, or remove tuner")
        if self.initial_adapter_dir and (self.tuner is not None or changed):
            key = changed[0] if changed else "tuner"
            raise UserError(f"{key}: not supported with initial_adapter_dir, which has its own settings; remove it")
        if self.initial_adapter_dir:
            names = [entry.name for entry in fields(FreezeArgs)]
            cure = "leave it out; the adapter has its own parts"
            check_effects(self.freeze, "freeze.", *names, have_effect=False, other="initial_adapter_dir", cure=cure)
        if self.tuner is not None and not self.tuner.adds and self.quantize:
            raise UserError(
                f"quantize: {self.quantize} is not supported with tuner: {type(self.tuner).__name__}, which trains the "
                "blocks; use LoRA, or null"
            )
        if self.tuner is None and not any(getattr(self, name) for name in LORA_SWITCHES):
            raise UserError("lora_query: false, and no other layer is adapted; set lora_query: true or another")

    def list_dropout(self, tuner: Tuner) -> dict[str, float]:
        """The dropout of the tuner of the run by the key that sets it; empty if it is the default."""
        if self.initial_adapter_dir:
            return {f"dropout of {self.initial_adapter_dir}": value for value in super().list_dropout(tuner).values()}
        if self.tuner is not None:
            return super().list_dropout(tuner)
        default = type(self).__dataclass_fields__["lora_dropout"].default
        return {} if self.lora_dropout in (0.0, default) else {"lora_dropout": self.lora_dropout}

    @property
    def resolved_tuner(self) -> Tuner:
        """The tuner, or LoRA by the lora_ keys."""
        if self.tuner is not None:
            return self.tuner
        targets = [layer for name, layers in LORA_SWITCHES.items() if getattr(self, name) for layer in layers]
        return LoRA(r=self.lora_r, alpha=self.lora_alpha, dropout=self.lora_dropout, target_modules=targets)


@dataclass(frozen=True)
class FinetuneAdapter(Finetune):
    """Finetune prompts for the attention of a model with frozen weights (LLaMA-Adapter)."""

    kind: ClassVar[type[Tuner]] = Adapter

    out_dir: Path = field(default=Path("out/finetune/adapter"), kw_only=True)
    """Folder for checkpoints, logs and the final adapter."""
    quantize: TrainingQuantFormat | None = field(default=None, kw_only=True)
    """Quantize the frozen matrices of the blocks to 4 or 8 bits."""
    tuner: Tuner = field(default_factory=Adapter, kw_only=True)
    """The settings of Adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.tuner) is not self.kind:
            raise UserError(
                f"tuner: {type(self.tuner).__name__} is not supported by this command; use litgpt finetune, or "
                f"tuner: {self.kind.__name__}"
            )


@dataclass(frozen=True)
class FinetuneAdapterV2(FinetuneAdapter):
    """Finetune prompts, and scales and shifts of all linear layers (LLaMA-Adapter v2)."""

    kind: ClassVar[type[Tuner]] = AdapterV2

    out_dir: Path = field(default=Path("out/finetune/adapter-v2"), kw_only=True)
    """Folder for checkpoints, logs and the final adapter."""
    tuner: Tuner = field(default_factory=AdapterV2, kw_only=True)
    """The settings of AdapterV2."""
