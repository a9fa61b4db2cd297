"""The settings of tuners: which numbers of a model a run trains, and what it adds to the model to that end."""

import re
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Fraction, Position, Positive, Seed, check_numbers

Ratio = Annotated[float, Ge(1e-3), Le(1e6)]
BlockOrder = list[tuple[int, bool]]
"""For each block: the block of the base that it is or copies, and whether it is inserted."""


def all_linear() -> list[str]:
    """The targets of a tuner that is told of none."""
    return ["all-linear"]


@dataclass(frozen=True)
class Tuner:
    """What a run trains: whether it adds to the model, and whether that can be folded into the model's own weights."""

    adds: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(self, "tuner.")
        for name in ("freeze_parameters_regex", "trainable_parameters_regex", "target_regex"):
            check_regex(f"tuner.{name}", getattr(self, name, None))

    def get_block_order(self, _layers: int) -> BlockOrder | None:
        """The blocks of the model that is trained, given the number of the base's; None if they are the same."""
        return None

    def get_lr_multiplier(self, _name: str) -> float:
        """The factor on the learning rate of the parameter of this name."""
        return 1.0


def check_regex(key: str, text: str | None) -> None:
    """Refuse a text that is no regular expression."""
    try:
        re.compile(text or "")
    except re.error as error:
        raise UserError(f"{key}: {text!r} is no regular expression ({error}); such as 'blocks\\.[0-3]\\..*'") from None


@dataclass(frozen=True)
class Full(Tuner):
    """Train the weights themselves, all or some; the order of the parts is embedding, blocks, norm, head."""

    adds: ClassVar[bool] = False

    freeze_parameters: list[str] = field(default_factory=list)
    """Parts that stay as they are, by the start of their names: ours (blocks.0) or published (model.layers.0)."""
    freeze_parameters_regex: str | None = None
    """Names with a match of this stay as they are too."""
    freeze_parameters_ratio: Fraction = 0.0
    """This share of all numbers stays as it is, from the embedding upwards; whole tensors only."""
    trainable_parameters: list[str] = field(default_factory=list)
    """Parts that are trained though the settings above freeze them."""
    trainable_parameters_regex: str | None = None
    """Names with a match of this are trained too."""


@dataclass(frozen=True)
class LISA(Tuner):
    """Train the weights themselves, but of the blocks a few at a time, drawn anew now and then (Pan et al. 2024)."""

    adds: ClassVar[bool] = False

    activated_layers: Count = 2
    """Blocks that are trained at a time; embedding, last norm and head always are."""
    step_interval: Count = 20
    """Optimizer steps after which they are drawn anew."""


@dataclass(frozen=True)
class LLaMAPro(Tuner):
    """Add blocks between the model's own, copies without effect at first, and train them alone (Wu et al. 2024)."""

    adds: ClassVar[bool] = False

    new_blocks: Count = 4
    """Blocks that are added; the finished model has so many more."""
    groups: Count | None = None
    """Equal groups of blocks after each of which as many are added; null for one block in each place."""

    def get_block_order(self, layers: int) -> BlockOrder:
        """Copies of the last blocks of each group are inserted after it.

        Raises:
            UserError: if the blocks cannot be divided into equal groups, or a group has too few to copy.
        """
        new, groups = self.new_blocks, self.groups or self.new_blocks
        if new > layers:
            raise UserError(f"tuner.new_blocks: {new} is more than the model's {layers} blocks; set at most {layers}")
        if new % groups or layers % groups:
            fit = " or ".join(str(count) for count in range(1, layers + 1) if not layers % count and not new % count)
            raise UserError(f"tuner.groups: {layers} and {new} new blocks are not divisible by {groups}; set {fit}")
        size, copies = layers // groups, new // groups
        order = []
        for end in range(size, layers + 1, size):
            order += [(layer, False) for layer in range(end - size, end)]
            order += [(layer, True) for layer in range(end - copies, end)]
        return order


@dataclass(frozen=True)
class LoRA(Tuner):
    """Low-rank updates beside frozen matrices, y = W x + s B A x (Hu et al. 2021)."""

    r: Count = 8
    """Rank of the updates."""
    alpha: Positive = 32.0
    """Scale s = alpha / r, or alpha / sqrt(r) with rslora."""
    dropout: Fraction = 0.05
    """Share of the inputs of A that are left out at random while training."""
    target_modules: list[str] = field(default_factory=all_linear)
    """Layers by the end of their names, ours (q, attention.out) or published (q_proj); mlp; all-linear, all-router."""
    target_regex: str | None = None
    """Layers whose whole name, ours or published, is this; takes the place of target_modules."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules of which a copy is trained in full, such as embedding or norm."""
    bias: Literal["none", "all"] = "none"
    """Whether copies of all biases are trained."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (Kalajdzievski 2023)."""
    dora: bool = False
    """Train the length of each row of a matrix apart from its direction (Liu et al. 2024)."""
    init: Literal["default", "gaussian", "pissa", "olora"] = "default"
    """First values: random A and zero B, or principal parts of W (Meng et al. 2024) or of its QR (Büyükakyüz 2024)."""
    lora_plus: Ratio = 1.0
    """Learning rate of B over that of A (Hayou et al. 2024)."""

    @property
    def scale(self) -> float:
        """The factor on B A."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

    def get_lr_multiplier(self, name: str) -> float:
        """LoRA+: the B of every pair has a learning rate of its own."""
        return self.lora_plus if name.endswith("lora_b") else 1.0


@dataclass(frozen=True)
class IA3(Tuner):
    """Trained scales of the outputs of some layers and the inputs of others (Liu et al. 2022)."""

    target_modules: list[str] = field(default_factory=lambda: ["k", "v", "down"])
    """Linear layers, named as for LoRA."""
    feedforward_modules: list[str] = field(default_factory=lambda: ["down"])
    """Those of them whose inputs are scaled, not their outputs."""


@dataclass(frozen=True)
class VeRA(Tuner):
    """Trained scales of one pair of random matrices that all layers share (Kopiczko et al. 2024)."""

    r: Count = 256
    """Rank of the pair."""
    target_modules: list[str] = field(default_factory=all_linear)
    """Linear layers, named as for LoRA."""
    dropout: Fraction = 0.0
    """Share of the inputs of the pair that are left out at random while training."""
    d_initial: Fraction = 0.1
    """First value of the scales between the two matrices."""
    projection_seed: Seed = 0
    """Seed of the pair."""


@dataclass(frozen=True)
class BOFT(Tuner):
    """Inputs turned by trained orthogonal matrices in blocks (Liu et al. 2024)."""

    block_size: Count = 4
    """Inputs that are turned among themselves."""
    butterfly_factors: Annotated[int, Ge(1), Le(16)] = 1
    """Sparse matrices whose product is the rotation; each one more doubles what is mixed."""
    target_modules: list[str] = field(default_factory=all_linear)
    """Linear layers, named as for LoRA."""


@dataclass(frozen=True)
class Adapter(Tuner):
    """LLaMA-Adapter: trained prompts that attention sees through a gate (Zhang et al. 2023)."""

    merges: ClassVar[bool] = False

    prompt_length: Count = 10
    """Rows of each block's prompt."""
    start_layer: Position = 2
    """The first block that has one."""


@dataclass(frozen=True)
class AdapterV2(Adapter):
    """LLaMA-Adapter v2: also scales and shifts of all linear layers, and the norms (Gao et al. 2023)."""


@dataclass(frozen=True)
class ReFT(Tuner):
    """LoReFT: hidden states edited in a subspace of low rank after each block, at every position (Wu et al. 2024)."""

    merges: ClassVar[bool] = False

    r: Count = 4
    """Rank of the subspace."""
    layers: list[Position] | None = None
    """Numbers of the blocks, from 0; null for all."""
    dropout: Fraction = 0.0
    """Share of an edit that is left out at random while training."""


KINDS: tuple[type[Tuner], ...] = (Full, LISA, LLaMAPro, LoRA, IA3, VeRA, BOFT, Adapter, AdapterV2, ReFT)
TUNERS = {cls.__name__: cls for cls in KINDS}
