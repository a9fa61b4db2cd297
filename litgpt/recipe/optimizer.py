"""The settings of optimizers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Fraction, Positive, Rate, check_numbers
from litgpt.recipe.effect import check_effects

Betas = tuple[Fraction, Fraction]
StateFormatName = Literal["fp32", "bf16", "fp16", "fp8", "8bit", "4bit"]


@dataclass(frozen=True)
class Optimizer:
    """The settings of every optimizer."""

    lr: Rate = 1e-3
    """Peak learning rate, reached after warmup."""

    def __post_init__(self) -> None:
        check_numbers(self, "optimizer.")
        for name in ("betas", "adamw_betas"):
            betas = getattr(self, name, ())
            if any(not 0 <= beta < 1 for beta in betas):
                raise UserError(f"optimizer.{name}: {list(betas)} is not valid; use two numbers in [0, 1)")

    def check_run(self, precision: str | None, *, cpu_offload: bool) -> None:
        """Check the settings against `precision` and `parallel.cpu_offload` of a run.

        Raises:
            UserError: if they do not fit.
        """


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (torch.optim.AdamW)."""

    betas: Betas = (0.9, 0.999)
    """Decay rates of the first and second moments."""
    eps: Rate = 1e-8
    """Term added to the denominator for numerical stability."""
    weight_decay: Rate = 1e-2
    """Decoupled weight decay coefficient, applied to matrices only."""
    amsgrad: bool = False
    """Whether to use the AMSGrad variant."""
    fused: bool | None = None
    """Whether to use the fused implementation; null to use it where the device supports it."""


@dataclass(frozen=True)
class PrecisionAwareAdamW(Optimizer):
    """AdamW with float32 arithmetic and states in fewer bytes, also sharded and in host memory."""

    betas: Betas = (0.9, 0.999)
    """Decay rates of the first and second moments."""
    eps: Rate = 1e-8
    """Term added to the denominator for numerical stability."""
    weight_decay: Rate = 1e-2
    """Decoupled weight decay coefficient, applied to matrices only."""
    exp_avg_dtype: StateFormatName = "fp32"
    """Format of the first moment: bf16; fp16 and fp8 with scales of blocks; 8bit and 4bit codes of torchao."""
    exp_avg_sq_dtype: StateFormatName = "fp32"
    """Format of the second moment."""
    main_params_dtype: Literal["fp32", "fp16", "fp8"] | None = None
    """Format of master weights with precision: bf16-true; null for none, but stochastic rounding."""
    offload_fraction: Fraction = 0.0
    """Fraction of the parameters whose states are in host memory, and are updated there."""

    def check_run(self, precision: str | None, *, cpu_offload: bool) -> None:
        """Check that the formats fit the precision, and that there is something to offload."""
        other, cure = "parallel.cpu_offload: true", "set optimizer.offload_fraction: 0"
        check_effects(self, "optimizer.", "offload_fraction", have_effect=not cpu_offload, other=other, cure=cure)
        if precision == "64-true":
            raise UserError(
                "precision: 64-true is not supported with optimizer: PrecisionAwareAdamW; set optimizer: AdamW"
            )
        if self.main_params_dtype is not None and precision != "bf16-true":
            raise UserError(
                f"optimizer.main_params_dtype: {self.main_params_dtype} needs precision: bf16-true, because the "
                f"weights of precision: {precision or 'null'} are in float32; set optimizer.main_params_dtype: null"
            )


@dataclass(frozen=True)
class AdamW8bit(Optimizer):
    """AdamW with moments in 8 bits (bitsandbytes.optim.AdamW8bit)."""

    betas: Betas = (0.9, 0.999)
    """Decay rates of the first and second moments."""
    eps: Rate = 1e-8
    """Term added to the denominator for numerical stability."""
    weight_decay: Rate = 1e-2
    """Decoupled weight decay coefficient, applied to matrices only."""


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent (torch.optim.SGD)."""

    momentum: Fraction = 0.0
    """Momentum factor."""
    dampening: Fraction = 0.0
    """Dampening of the momentum."""
    weight_decay: Rate = 0.0
    """L2 penalty coefficient, applied to matrices only."""
    nesterov: bool = False
    """Whether to use Nesterov momentum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        other, cure = "optimizer.momentum: 0", "set optimizer.momentum: 0.9"
        names = ("dampening", "nesterov")
        check_effects(self, "optimizer.", *names, have_effect=self.momentum > 0, other=other, cure=cure)
        if self.nesterov and self.dampening:
            raise UserError(
                f"optimizer.nesterov: true is not supported with optimizer.dampening: {self.dampening:g}; "
                "set optimizer.dampening: 0"
            )


@dataclass(frozen=True)
class Muon(Optimizer):
    """Muon for the matrices inside blocks, those of experts too, and AdamW for all other parameters."""

    momentum: Fraction = 0.95
    """Momentum factor."""
    nesterov: bool = True
    """Whether to use Nesterov momentum."""
    weight_decay: Rate = 0.1
    """Decoupled weight decay coefficient, applied to matrices only."""
    ns_steps: Count = 5
    """Number of Newton-Schulz iterations."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = "match_rms_adamw"
    """How the learning rate is adjusted to the shape of a matrix."""
    adamw_lr: Rate | None = None
    """Peak learning rate of the AdamW parameters; null for lr."""
    adamw_betas: Betas = (0.9, 0.95)
    """Decay rates of the moments of the AdamW parameters."""
    adamw_eps: Positive = 1e-8
    """eps of the AdamW parameters."""


@dataclass(frozen=True)
class GaLore(Optimizer):
    """GaLore (arXiv 2403.03507) with AdamW for the matrices inside blocks, and AdamW for all other parameters."""

    betas: Betas = (0.9, 0.999)
    """Decay rates of the first and second moments."""
    eps: Rate = 1e-8
    """Term added to the denominator for numerical stability."""
    weight_decay: Rate = 1e-2
    """Decoupled weight decay coefficient, applied to matrices only."""
    rank: Count = 128
    """Rank of the gradient projection; matrices with a side of at most this size use plain AdamW."""
    update_proj_gap: Count = 50
    """Number of optimizer steps between updates of the projection."""
    scale: Positive = 1.0
    """Factor on the updates that are projected back."""
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    """Projected side of a matrix: the shorter (std), the longer (reverse_std), rows (left), columns (right) or both."""


@dataclass(frozen=True)
class Custom(Optimizer):
    """Any other optimizer class."""

    path: str = ""
    """Dotted path of the optimizer class, such as torch.optim.Adagrad."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Constructor arguments other than the parameters and lr."""


OPTIMIZERS: dict[str, type[Optimizer]] = {
    cls.__name__: cls for cls in (AdamW, PrecisionAwareAdamW, AdamW8bit, SGD, Muon, GaLore)
}
OPTIMIZER_ALIASES = {
    "torch.optim.AdamW": "AdamW",
    "torch.optim.SGD": "SGD",
    "torch.optim.Muon": "Muon",
    "bitsandbytes.optim.AdamW8bit": "AdamW8bit",
}
