"""The settings of tuners: which parameters of a model a run trains, and what it adds to the model."""

import re
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Fraction, Position, Positive, Rate, Seed, check_numbers
from litgpt.recipe.effect import check_effects

Ratio = Annotated[float, Ge(1e-3), Le(1e6)]
Bias = Literal["none", "all", "lora_only"]
BlockOrder = list[tuple[int, bool]]
"""For each block: the block of the base that it is or copies, and whether it is inserted."""


def all_linear() -> list[str]:
    """The default targets of a tuner."""
    return ["all-linear"]


@dataclass(frozen=True)
class Tuner:
    """What a run trains.

    Attributes:
        adds: whether it adds to the model.
        merges: whether that can be merged into the base.
        spans_blocks: whether it selects what it trains among all blocks, so that a rank needs them all.
    """

    adds: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    spans_blocks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_numbers(self, "tuner.")
        for name in ("freeze_parameters_regex", "trainable_parameters_regex", "target_regex"):
            check_regex(f"tuner.{name}", getattr(self, name, None))

    def get_block_order(self, _layers: int) -> BlockOrder | None:
        """The blocks of the model to train, given the number of blocks of the base model; None if they are the same."""
        return None

    def get_active_share(self, _layers: int) -> float:
        """The share of the blocks that are trained at a time, given the number of blocks."""
        return 1.0

    def get_lr_multiplier(self, _name: str) -> float:
        """The factor on the learning rate of the parameter of this name."""
        return 1.0

    def train_module(self, name: str) -> "Tuner":
        """The settings that also train a module that the base model does not have.

        Raises:
            UserError: if the tuner trains nothing of the model itself.
        """
        raise UserError(f"tuner: {type(self).__name__} does not train the new module {name}; use LoRA, LISA or Full")


def check_regex(key: str, text: str | None) -> None:
    """Check that a text is a regular expression."""
    try:
        re.compile(text or "")
    except re.error as error:
        raise UserError(f"{key}: {text!r} is not a regular expression ({error}); set 'blocks\\.[0-3]\\..*'") from None


@dataclass(frozen=True)
class Full(Tuner):
    """Train all or some of the model's weights; their order is embedding, blocks, norm, head."""

    adds: ClassVar[bool] = False

    freeze_parameters: list[str] = field(default_factory=list)
    """Parameters to freeze, by prefixes of their names: ours (blocks.0) or published (model.layers.0)."""
    freeze_parameters_regex: str | None = None
    """Also freeze parameters whose names have a match of this regular expression."""
    freeze_parameters_ratio: Fraction = 0.0
    """Also freeze this fraction of all parameters, from the embedding upwards; whole tensors only."""
    trainable_parameters: list[str] = field(default_factory=list)
    """Parameters to train although the settings above freeze them."""
    trainable_parameters_regex: str | None = None
    """Also train parameters whose names have a match of this regular expression."""

    def train_module(self, _name: str) -> Tuner:
        """These settings, which train all that they do not freeze."""
        return self

    def __post_init__(self) -> None:
        super().__post_init__()
        freezes = bool(self.freeze_parameters or self.freeze_parameters_regex or self.freeze_parameters_ratio)
        other, cure = "nothing frozen", "set tuner.freeze_parameters_ratio: 1, or leave it out"
        names = ("trainable_parameters", "trainable_parameters_regex")
        check_effects(self, "tuner.", *names, have_effect=freezes, other=other, cure=cure)


@dataclass(frozen=True)
class LISA(Tuner):
    """Train the model's weights, but only a few blocks at a time, redrawn at an interval (Pan et al. 2024)."""

    adds: ClassVar[bool] = False
    spans_blocks: ClassVar[bool] = True

    activated_layers: Count = 2
    """Blocks trained at a time; embedding, last norm and head are always trained."""
    step_interval: Count = 20
    """Optimizer steps after which the blocks are redrawn."""

    def train_module(self, _name: str) -> Tuner:
        """These settings, which always train what is in no block."""
        return self

    def get_active_share(self, layers: int) -> float:
        """The activated layers out of all."""
        return self.activated_layers / layers


@dataclass(frozen=True)
class LLaMAPro(Tuner):
    """Insert blocks that are initialized to the identity, and train only these (Wu et al. 2024)."""

    adds: ClassVar[bool] = False

    new_blocks: Count = 4
    """Number of blocks to insert."""
    groups: Count | None = None
    """Number of equal groups of blocks, after each of which equally many are inserted; null for `new_blocks`."""

    def get_block_order(self, layers: int) -> BlockOrder:
        """Copies of the last blocks of each group are inserted after it.

        Raises:
            UserError: if the blocks cannot be divided into equal groups, or a group has too few to copy.
        """
        new, groups = self.new_blocks, self.groups or self.new_blocks
        if new > layers:
            raise UserError(f"tuner.new_blocks: {new} is more than the model's {layers} blocks; set at most {layers}")
        if new % groups or layers % groups:
            valid = " or ".join(str(count) for count in range(1, layers + 1) if not layers % count and not new % count)
            raise UserError(f"tuner.groups: {layers} and {new} new blocks are not divisible by {groups}; set {valid}")
        size, copies = layers // groups, new // groups
        order = []
        for end in range(size, layers + 1, size):
            order += [(layer, False) for layer in range(end - size, end)]
            order += [(layer, True) for layer in range(end - copies, end)]
        return order


@dataclass(frozen=True)
class LoRA(Tuner):
    """Low-rank updates of frozen matrices, y = W x + s B A x (Hu et al. 2021)."""

    r: Count = 8
    """Rank of the updates."""
    alpha: Positive = 32.0
    """Scale s = alpha / r, or alpha / sqrt(r) with rslora."""
    dropout: Fraction = 0.05
    """Dropout probability of the inputs of A."""
    target_modules: list[str] = field(default_factory=all_linear)
    """Layers by suffixes of their names, ours (q, attention.out) or published (q_proj); mlp; all-linear, all-router."""
    target_regex: str | None = None
    """Regular expression for whole names of layers, ours or published; used instead of target_modules."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules whose parameters are trained as full copies, such as embedding or norm."""
    bias: Bias = "none"
    """Whether to train copies of all biases, or of those of the target layers."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (Kalajdzievski 2023)."""
    dora: bool = False
    """Train the magnitude and the direction of each row of a matrix separately (Liu et al. 2024)."""
    init: Literal["default", "gaussian", "pissa", "olora", "loftq", "lora_ga"] = "default"
    """Initialization: random A and zero B; from the SVD (Meng et al. 2024) or QR (Büyükakyüz 2024) of W; loftq: from
    the error of its quantization (Li et al. 2023); lora_ga: from its gradient (Wang et al. 2024)."""
    loftq_iterations: Count = 1
    """Rounds of quantization and SVD of loftq; with more than one, the base is quantized for the update."""
    ga_batches: Count = 1
    """Global batches whose mean gradient lora_ga decomposes."""
    ga_direction: Literal["ArBr", "A2rBr", "ArB2r"] = "ArB2r"
    """Singular vectors of lora_ga: A has the odd ones, the second or the first r, and B the others of the first 2 r."""
    ga_scale: Literal["stable", "unit"] = "stable"
    """Scale of the vectors of lora_ga: out^(1/4) / gamma^(1/2), or 1."""
    ga_gamma: Positive = 16.0
    """The gamma of the stable scale."""
    lora_plus: Ratio = 1.0
    """Ratio of the learning rate of B to that of A (Hayou et al. 2024)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        other, cure = "tuner.target_regex", "set one of them"
        check_effects(self, "tuner.", "target_modules", have_effect=not self.target_regex, other=other, cure=cure)
        for init, names in {
            "loftq": ("loftq_iterations",),
            "lora_ga": ("ga_batches", "ga_direction", "ga_scale", "ga_gamma"),
        }.items():
            other, cure, is_set = f"tuner.init: {self.init}", f"set tuner.init: {init}", self.init == init
            check_effects(self, "tuner.", *names, have_effect=is_set, other=other, cure=cure)
        if self.dora and self.init in ("loftq", "lora_ga"):
            raise UserError(f"tuner.dora: true is not supported with tuner.init: {self.init}; set tuner.init: pissa")

    @property
    def stores_first(self) -> bool:
        """Whether the first values of A and B are stored, because their update is subtracted from W."""
        return self.init in ("pissa", "olora", "lora_ga") or self.loftq_iterations > 1

    @property
    def scale(self) -> float:
        """The factor on B A."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

    def train_module(self, name: str) -> Tuner:
        """These settings, with the module among `modules_to_save`."""
        return replace(self, modules_to_save=list(dict.fromkeys((*self.modules_to_save, name))))

    def get_lr_multiplier(self, name: str) -> float:
        """LoRA+: B has a larger learning rate."""
        return self.lora_plus if name.endswith("lora_b") else 1.0


@dataclass(frozen=True)
class IA3(Tuner):
    """Trained scales of the outputs of some layers and the inputs of others (Liu et al. 2022)."""

    target_modules: list[str] = field(default_factory=lambda: ["k", "v", "down"])
    """Linear layers, named as for LoRA."""
    feedforward_modules: list[str] = field(default_factory=lambda: ["down"])
    """Targets whose inputs are scaled rather than their outputs."""


@dataclass(frozen=True)
class VeRA(Tuner):
    """Trained scales of one pair of random matrices shared by all layers (Kopiczko et al. 2024)."""

    r: Count = 256
    """Rank of the pair."""
    target_modules: list[str] = field(default_factory=all_linear)
    """Linear layers, named as for LoRA."""
    dropout: Fraction = 0.0
    """Dropout probability of the inputs of the pair."""
    d_initial: Fraction = 0.1
    """Initial value of the scales between the two matrices."""
    projection_seed: Seed = 0
    """Seed of the pair."""


@dataclass(frozen=True)
class BOFT(Tuner):
    """Inputs rotated by trained block-diagonal orthogonal matrices (Liu et al. 2024)."""

    block_size: Count = 4
    """Size of a block of inputs that is rotated."""
    butterfly_factors: Annotated[int, Ge(1), Le(16)] = 1
    """Number of sparse matrices whose product is the rotation; each doubles the number of mixed inputs."""
    target_modules: list[str] = field(default_factory=all_linear)
    """Linear layers, named as for LoRA."""


@dataclass(frozen=True)
class AdaLoRA(Tuner):
    """Low-rank updates in the form of an SVD, whose ranks are allocated by importance (Zhang et al. 2023)."""

    spans_blocks: ClassVar[bool] = True

    target_r: Count = 8
    """Mean rank of the updates at the end."""
    init_r: Count = 12
    """Rank of each update at the beginning."""
    alpha: Positive = 32.0
    """Scale of the updates, which is alpha / init_r."""
    dropout: Fraction = 0.05
    """Dropout probability of the inputs of the updates."""
    tinit: Position = 0
    """Steps before the first pruning."""
    tfinal: Position = 0
    """Last steps, in which the ranks stay."""
    total_steps: Count | None = None
    """Steps in all; null for those of the run."""
    delta_t: Count = 1
    """Steps between prunings; a pruned singular value may grow again until the next one."""
    beta1: Fraction = 0.85
    """Decay rate of the mean sensitivity of each parameter."""
    beta2: Fraction = 0.85
    """Decay rate of the mean change of its sensitivity."""
    orth_reg_weight: Rate = 0.5
    """Weight of the loss that keeps the singular vectors orthonormal."""
    target_modules: list[str] = field(default_factory=all_linear)
    """Linear layers, named as for LoRA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_r > self.init_r:
            raise UserError(f"tuner.target_r: {self.target_r} is more than tuner.init_r; set at most {self.init_r}")


@dataclass(frozen=True)
class FourierFT(Tuner):
    """Matrices changed by the inverse Fourier transform of a few trained frequencies (Gao et al. 2024)."""

    n_frequency: Count = 2000
    """Number of trained frequencies of each matrix."""
    scaling: Positive = 300.0
    """Factor on the inverse transform."""
    frequency_seed: Seed = 777
    """Seed of the choice of frequencies."""
    init: Literal["normal", "zero"] = "normal"
    """Initial values: a standard normal distribution, as in the paper; or zeros, to start as the base."""
    target_modules: list[str] = field(default_factory=all_linear)
    """Linear layers, named as for LoRA."""


@dataclass(frozen=True)
class Bone(Tuner):
    """Bone, now MiSS: one trained block that is added to all shards of a matrix (Kang and Yin 2024)."""

    r: Count = 64
    """Columns of a shard."""
    variant: Literal["bone", "bat", "mini"] = "bone"
    """The block is added to each shard; bat: square blocks are also multiplied by it; mini: it has mini_r columns."""
    mini_r: Count = 1
    """Columns of the block of mini, which is repeated for all outputs."""
    dropout: Fraction = 0.0
    """Dropout probability of the inputs of the block."""
    target_modules: list[str] = field(default_factory=all_linear)
    """Linear layers, named as for LoRA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        other, is_mini = f"tuner.variant: {self.variant}", self.variant == "mini"
        check_effects(self, "tuner.", "mini_r", have_effect=is_mini, other=other, cure="set tuner.variant: mini")
        has_dropout = self.variant != "bat"
        check_effects(self, "tuner.", "dropout", have_effect=has_dropout, other=other, cure="set tuner.dropout: 0")


@dataclass(frozen=True)
class Adapter(Tuner):
    """LLaMA-Adapter: trained prompts that attention attends to through a gate (Zhang et al. 2023)."""

    merges: ClassVar[bool] = False

    prompt_length: Count = 10
    """Length of each block's prompt."""
    start_layer: Position = 2
    """The first block with a prompt."""


@dataclass(frozen=True)
class AdapterV2(Adapter):
    """LLaMA-Adapter v2: also scales and shifts of all linear layers, and the norms (Gao et al. 2023)."""


@dataclass(frozen=True)
class ReFT(Tuner):
    """LoReFT: hidden states edited in a low-rank subspace after each block, at every position (Wu et al. 2024)."""

    merges: ClassVar[bool] = False

    r: Count = 4
    """Rank of the subspace."""
    layers: list[Position] | None = None
    """Indices of the blocks, from 0; null for all."""
    dropout: Fraction = 0.0
    """Dropout probability of the edits."""


TUNERS: dict[str, type[Tuner]] = {
    cls.__name__: cls
    for cls in (Full, LISA, LLaMAPro, LoRA, AdaLoRA, IA3, VeRA, BOFT, FourierFT, Bone, Adapter, AdapterV2, ReFT)
}
