"""Every setting of `litgpt finetune` and its relatives."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Fraction, Positive, Seed
from litgpt.recipe.train import EvalArgs, TrainArgs
from litgpt.recipe.training import Training
from litgpt.recipe.tuner import LISA, Adapter, AdapterV2, Full, LoRA, Tuner

TrainingQuantFormat = Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8-training", "torchao.nf4"]

# LitGPT's switches, and the layers of ours that each stands for.
LORA_SWITCHES = {
    "lora_query": ("q",),
    "lora_key": ("k",),
    "lora_value": ("v",),
    "lora_projection": ("attention.out",),
    "lora_mlp": ("mlp",),
    "lora_head": ("head",),
}


def train_defaults() -> TrainArgs:
    """How long a finetuning run trains unless told."""
    return TrainArgs(global_batch_size=16, micro_batch_size=1, epochs=5)


@dataclass(frozen=True)
class Finetune(Training):
    """What all kinds of finetuning set."""

    checkpoint_dir: Path
    """The model to start from: a folder, or the name of a repository, which is downloaded if it is not there."""
    access_token: str | None = field(default=None, repr=False, kw_only=True)
    """For models and data that ask for a licence to be accepted; null takes HF_TOKEN."""
    train: TrainArgs = field(default_factory=train_defaults, kw_only=True)
    eval: EvalArgs = field(default_factory=lambda: EvalArgs(interval=100, max_new_tokens=100), kw_only=True)
    devices: int | Literal["auto"] = field(default=1, kw_only=True)
    """Processes on this node, one a device; auto or -1 for as many as there are GPUs, or 1."""
    seed: Seed = field(default=1337, kw_only=True)
    """Of what the tuner adds and of the order of the data."""
    neftune_alpha: Positive | None = field(default=None, kw_only=True)
    """Noise on the embeddings while training, up to this over the root of a sample's length x the model's width."""

    @property
    def quantization(self) -> str | None:
        """How the frozen matrices of the blocks are kept; None for as they are."""
        return None

    @property
    def initial_adapter(self) -> Path | None:
        """The adapter whose training goes on; None to begin one."""
        return None

    @property
    def resolved_tuner(self) -> Tuner:
        """What is trained, and added to the model to that end."""
        return Full()

    def __post_init__(self) -> None:
        train = self.train
        if not (train.max_tokens or train.max_steps or train.epochs or train.max_time):
            raise UserError("train.epochs: null, and no other limit; set train.epochs: 1, or train.max_steps")
        if train.tie_embeddings is not None:
            raise UserError(
                f"train.tie_embeddings: {train.tie_embeddings} is not for finetuning; the model's own stays; set null"
            )
        super().__post_init__()
        self._check_splits()

    def _check_splits(self) -> None:
        """Refuse models split over devices where something needs whole samples or all blocks."""
        for axis in ("tensor", "context", "pipeline"):
            degree = getattr(self.parallel, axis)
            if self.neftune_alpha and degree > 1:
                raise UserError(
                    f"neftune_alpha: {self.neftune_alpha:g} is for whole samples, not with parallel.{axis}: {degree}; "
                    f"set parallel.{axis}: 1, or neftune_alpha: null"
                )
        if isinstance(self.resolved_tuner, LISA) and self.parallel.pipeline > 1:
            raise UserError(
                f"tuner: LISA draws among all blocks, not with parallel.pipeline: {self.parallel.pipeline}; "
                "set parallel.pipeline: 1"
            )


@dataclass(frozen=True)
class FinetuneFull(Finetune):
    """Finetune the weights of a model, all or some of them."""

    out_dir: Path = field(default=Path("out/finetune/full"), kw_only=True)
    """Folder for checkpoints, logs and the finished model."""
    eval: EvalArgs = field(default_factory=lambda: EvalArgs(interval=600, max_new_tokens=100), kw_only=True)
    tuner: Tuner = field(default_factory=Full, kw_only=True)
    """Which weights are trained: the settings of Full, LISA or LLaMAPro."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tuner.adds:
            raise UserError(f"tuner: {type(self.tuner).__name__} adds to the model; use litgpt finetune, or Full")

    @property
    def resolved_tuner(self) -> Tuner:
        """Which weights are trained."""
        return self.tuner


@dataclass(frozen=True)
class FinetuneLora(Finetune):
    """Finetune a model through a small adapter beside its frozen weights."""

    out_dir: Path = field(default=Path("out/finetune/lora"), kw_only=True)
    """Folder for checkpoints, logs, the adapter and the finished model."""
    lora_r: Count = 8
    """Rank of the updates."""
    lora_alpha: Positive = 16
    """Their scale is lora_alpha / lora_r."""
    lora_dropout: Fraction = 0.05
    """Share of an update's inputs that are left out at random."""
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
    """Keep the frozen matrices of the blocks in 4 or 8 bits."""
    tuner: Tuner | None = field(default=None, kw_only=True)
    """A tuner of any kind, instead of the lora_ keys."""
    initial_adapter_dir: Path | None = field(default=None, kw_only=True)
    """An adapter for this model to train further, by the settings that it has; the optimizer begins anew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [one.name for one in fields(self) if one.name.startswith("lora_") and self._was_set(one.name)]
        if self.tuner is not None and given:
            raise UserError(f"{given[0]}: not beside tuner; give tuner.init_args, or leave tuner out")
        if self.initial_adapter_dir and (self.tuner is not None or given):
            key = given[0] if given else "tuner"
            raise UserError(
                f"{key}: not beside initial_adapter_dir, whose adapter has settings of its own; leave it out"
            )
        if self.tuner is not None and not self.tuner.adds and self.quantize:
            raise UserError(
                f"quantize: {self.quantize} keeps the blocks as they are, which tuner: {type(self.tuner).__name__} "
                "trains; use LoRA, or null"
            )
        if self.tuner is None and not any(getattr(self, name) for name in LORA_SWITCHES):
            raise UserError("lora_query: false, and no other layer is adapted; set lora_query: true or another")

    @property
    def quantization(self) -> str | None:
        """How the frozen matrices of the blocks are kept; None for as they are."""
        return self.quantize

    @property
    def initial_adapter(self) -> Path | None:
        """The adapter whose training goes on; None to begin one."""
        return self.initial_adapter_dir

    def _was_set(self, name: str) -> bool:
        default = next(one.default for one in fields(self) if one.name == name)
        return getattr(self, name) != default

    @property
    def resolved_tuner(self) -> Tuner:
        """The tuner that the settings stand for."""
        if self.tuner is not None:
            return self.tuner
        targets = [layer for name, layers in LORA_SWITCHES.items() if getattr(self, name) for layer in layers]
        return LoRA(r=self.lora_r, alpha=self.lora_alpha, dropout=self.lora_dropout, target_modules=targets)


@dataclass(frozen=True)
class FinetuneAdapter(Finetune):
    """Finetune a model through trained prompts that its attention sees, beside its frozen weights (LLaMA-Adapter)."""

    kind: ClassVar[type[Tuner]] = Adapter

    out_dir: Path = field(default=Path("out/finetune/adapter"), kw_only=True)
    """Folder for checkpoints, logs and the finished adapter."""
    quantize: TrainingQuantFormat | None = field(default=None, kw_only=True)
    """Keep the frozen matrices of the blocks in 4 or 8 bits."""
    tuner: Tuner = field(default_factory=Adapter, kw_only=True)
    """The settings of Adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.tuner) is not self.kind:
            raise UserError(
                f"tuner: {type(self.tuner).__name__} is not for this command; use litgpt finetune, or "
                f"tuner: {self.kind.__name__}"
            )

    @property
    def quantization(self) -> str | None:
        """How the frozen matrices of the blocks are kept; None for as they are."""
        return self.quantize

    @property
    def resolved_tuner(self) -> Tuner:
        """What is trained, and added to the model to that end."""
        return self.tuner


@dataclass(frozen=True)
class FinetuneAdapterV2(FinetuneAdapter):
    """Finetune a model through prompts, and scales and shifts of its linear layers (LLaMA-Adapter v2)."""

    kind: ClassVar[type[Tuner]] = AdapterV2

    out_dir: Path = field(default=Path("out/finetune/adapter-v2"), kw_only=True)
    """Folder for checkpoints, logs and the finished adapter."""
    tuner: Tuner = field(default_factory=AdapterV2, kw_only=True)
    """The settings of AdapterV2."""
