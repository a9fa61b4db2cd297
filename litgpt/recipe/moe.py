"""The settings of training a mixture of experts."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from litgpt.recipe.bounds import Rate, check_numbers
from litgpt.recipe.effect import check_effects

CapacityFactor = Annotated[float, Ge(1e-3), Le(1e4)]


@dataclass(frozen=True)
class MoEArgs:
    """How the routers of a mixture of experts are trained; validation and inference drop no tokens.

    How scores are computed, and groups of experts, are fields of model_config. Losses do not change the reported loss.
    """

    router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"] = "aux_loss"
    """Balance of the experts: a loss per micro-batch, row or global batch, or Sinkhorn's assignment of tokens.

    aux_loss (Fedus et al. 2022) depends on the tokens of each micro-batch, seq_aux_loss (DeepSeek-V3) on those of each
    row, and global_aux_loss (Qiu et al. 2025) on those of the optimizer step up to the micro-batch, on all devices.
    """
    aux_loss_coeff: Rate = 0.0
    """Coefficient of the balance loss, which is 1 if the load is balanced; 0 for none."""
    z_loss_coeff: Rate = 0.0
    """Coefficient of the z-loss, the mean square of the routers' log-sum-exp (Zoph et al. 2022); 0 for none."""
    router_bias_update_rate: Rate = 0.0
    """Balance without a loss: change of the router_correction of each expert per step (DeepSeek-V3); 0 for none."""
    router_dtype: Literal["fp32", "fp64"] = "fp32"
    """Least precision of the routers in training."""
    expert_capacity_factor: CapacityFactor | None = None
    """Maximum number of tokens of a micro-batch per expert, relative to an equal share; null for no limit.

    An expert drops the others, which then skip it.
    """
    token_drop_policy: Literal["probs", "position"] = "probs"
    """Tokens that an expert keeps: those with the highest weights (probs), or the first ones (position)."""
    pad_expert_input_to_capacity: bool = False
    """Pad the tokens of every expert to its capacity, so that all shapes are constant."""

    def __post_init__(self) -> None:
        check_numbers(self, "moe.")
        kind = self.router_load_balancing_type
        has_loss, other = kind.endswith("aux_loss"), f"moe.router_load_balancing_type: {kind}"
        cure = "set moe.router_load_balancing_type: aux_loss"
        check_effects(self, "moe.", "aux_loss_coeff", have_effect=has_loss, other=other, cure=cure)
        has_effect, cure = not has_loss or self.aux_loss_coeff > 0, "set moe.aux_loss_coeff: 0.001"
        names, other = ["router_load_balancing_type"], "moe.aux_loss_coeff: 0"
        check_effects(self, "moe.", *names, have_effect=has_effect, other=other, cure=cure)
        names, cure = ["token_drop_policy", "pad_expert_input_to_capacity"], "set moe.expert_capacity_factor: 1.25"
        has_effect, other = self.expert_capacity_factor is not None, "moe.expert_capacity_factor: null"
        check_effects(self, "moe.", *names, have_effect=has_effect, other=other, cure=cure)
