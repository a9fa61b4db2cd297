"""The settings of optimizers: known ones field by field, any other class by its dotted path."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Fraction, Positive, Rate, check_numbers

Betas = tuple[Fraction, Fraction]


@dataclass(frozen=True)
class Optimizer:
    """What every optimizer has: a peak learning rate."""

    lr: Rate = 1e-3
    """The highest learning rate, reached after the warm-up."""

    def __post_init__(self) -> None:
        check_numbers(self, "optimizer.")
        for name in ("betas", "adamw_betas"):
            betas = getattr(self, name, ())
            if any(not 0 <= beta < 1 for beta in betas):
                raise UserError(f"optimizer.{name}: {list(betas)} will not do; give two numbers from 0 to 1")


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (torch.optim.AdamW)."""

    betas: Betas = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: Rate = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Rate = 1e-2
    """Share of a weight taken off per unit of learning rate; matrices only."""
    amsgrad: bool = False
    """Use the largest second moment seen."""
    fused: bool | None = None
    """One kernel for the whole update; null lets the device decide."""


@dataclass(frozen=True)
class AdamW8bit(Optimizer):
    """AdamW with moments in 8 bits (bitsandbytes.optim.AdamW8bit)."""

    betas: Betas = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: Rate = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Rate = 1e-2
    """Share of a weight taken off per unit of learning rate; matrices only."""


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent (torch.optim.SGD)."""

    momentum: Fraction = 0.0
    """Decay of the running gradient."""
    dampening: Fraction = 0.0
    """Share of a new gradient that does not enter the running one."""
    weight_decay: Rate = 0.0
    """Added to the gradient per unit of weight; matrices only."""
    nesterov: bool = False
    """Look ahead along the momentum."""


@dataclass(frozen=True)
class Muon(Optimizer):
    """Orthogonalised momentum for the matrices inside blocks (torch.optim.Muon), AdamW for all else."""

    momentum: Fraction = 0.95
    """Decay of the running gradient."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    weight_decay: Rate = 0.1
    """Share of a weight taken off per unit of learning rate; matrices only."""
    ns_steps: Count = 5
    """Newton-Schulz iterations."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = "match_rms_adamw"
    """How the learning rate is scaled by a matrix's shape."""
    adamw_lr: Rate | None = None
    """Peak learning rate of what AdamW trains; null for lr."""
    adamw_betas: Betas = (0.9, 0.95)
    """Moments of what AdamW trains."""
    adamw_eps: Positive = 1e-8
    """eps of what AdamW trains."""


@dataclass(frozen=True)
class GaLore(Optimizer):
    """AdamW with moments of low rank for the matrices inside blocks (Zhao et al. 2024), AdamW for all else."""

    betas: Betas = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: Rate = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Rate = 1e-2
    """Share of a weight taken off per unit of learning rate; matrices only."""
    rank: Count = 128
    """Rank that a gradient is brought down to; matrices with no side longer are left to AdamW."""
    update_proj_gap: Count = 50
    """Steps after which the subspace is found anew."""
    scale: Positive = 1.0
    """What steps within the subspace are multiplied by."""
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    """What is shortened of a matrix: its shorter side, its longer, its rows, its columns, or both sides."""


@dataclass(frozen=True)
class Custom(Optimizer):
    """Any other optimizer class, by its dotted path; `arguments` are those of its constructor, lr among them."""

    path: str = ""
    """Dotted path of the class, such as torch.optim.Adagrad."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Its constructor's arguments, without the parameters."""


OPTIMIZERS: dict[str, type[Optimizer]] = {cls.__name__: cls for cls in (AdamW, AdamW8bit, SGD, Muon, GaLore)}
OPTIMIZER_ALIASES = {
    "torch.optim.AdamW": "AdamW",
    "torch.optim.SGD": "SGD",
    "torch.optim.Muon": "Muon",
    "bitsandbytes.optim.AdamW8bit": "AdamW8bit",
}
