"""The settings of activation recomputation and offloading."""

from dataclasses import dataclass, field
from typing import Literal

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, check_numbers

RecomputePart = Literal[
    "core_attention",
    "core_attn",
    "mlp",
    "moe",
    "norms",
    "layernorm",
    "activation",
    "expert_activation",
    "moe_act",
    "up_projection",
    "mla_up_proj",
]
# Megatron's names
MODULE_ALIASES = {
    "core_attn": "core_attention",
    "layernorm": "norms",
    "moe_act": "expert_activation",
    "mla_up_proj": "up_projection",
}


def default_modules() -> list[RecomputePart]:
    """Return the default modules of selective recomputation."""
    return ["core_attention"]


@dataclass(frozen=True)
class RecomputeArgs:
    """Activation recomputation in backward (Chen et al. 2016), and offloading to host memory."""

    granularity: Literal["none", "selective", "full"] = "none"
    """What to recompute: nothing (none), some modules of every layer (selective), or whole layers (full).

    Full recomputes every layer of a trained vision tower too; selective none.
    """
    method: Literal["uniform", "block"] = "uniform"
    """With full: recompute all layers, in segments of num_layers, or the first num_layers of each stage (block)."""
    num_layers: Count = 1
    """With full: number of layers per recomputed segment (uniform), or of recomputed layers per stage (block)."""
    modules: list[RecomputePart] = field(default_factory=default_modules)
    """With selective: any of core_attention, mlp, moe, norms, activation, expert_activation, up_projection.

    The outputs of norms, activations and up-projections (of latent attention) are not stored either.
    """
    offload: bool = False
    """Offload the activations that layers store for backward to host memory."""

    def __post_init__(self) -> None:
        check_numbers(self, "recompute.")
        for key, value, default in (("method", self.method, "uniform"), ("num_layers", self.num_layers, 1)):
            if value != default and self.granularity != "full":
                raise UserError(
                    f"recompute.{key}: {value} has no effect with recompute.granularity: {self.granularity}; "
                    "set recompute.granularity: full"
                )
        if self.modules != default_modules() and self.granularity != "selective":
            raise UserError(
                f"recompute.modules: {', '.join(self.modules)} has no effect with recompute.granularity: "
                f"{self.granularity}; set recompute.granularity: selective"
            )
        if self.granularity == "selective" and not self.modules:
            raise UserError("recompute.modules: empty; set a module, or set recompute.granularity: none")

    @property
    def parts(self) -> set[str]:
        """The modules by litgpt's names."""
        return {MODULE_ALIASES.get(part, part) for part in self.modules}
