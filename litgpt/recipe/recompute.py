"""What of a forward pass is kept for the backward pass, and what is computed again."""

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
ALIASES = {
    "core_attn": "core_attention",
    "layernorm": "norms",
    "moe_act": "expert_activation",
    "mla_up_proj": "up_projection",
}


def default_modules() -> list[RecomputePart]:
    """What selective recomputing takes unless told."""
    return ["core_attention"]


@dataclass(frozen=True)
class RecomputeArgs:
    """Memory for time: what backward needs is computed a second time (Chen et al. 2016), or kept in host memory."""

    granularity: Literal["none", "selective", "full"] = "none"
    """Compute again: nothing; some parts of every layer (modules); whole layers."""
    method: Literal["uniform", "block"] = "uniform"
    """With full: all layers, num_layers at a time (uniform), or only the first num_layers of each stage (block)."""
    num_layers: Count = 1
    """With full: layers that are computed again in one go, or that are computed again at all."""
    modules: list[RecomputePart] = field(default_factory=default_modules)
    """With selective: the parts, out of core_attention, mlp, moe, norms, activation, expert_activation, up_projection.

    Of norms, activations and up-projections (those of latent attention) the results are not kept either.
    """
    offload: bool = False
    """Keep in host memory, and not on the device, what layers still keep for backward."""

    def __post_init__(self) -> None:
        check_numbers(self, "recompute.")
        for key, value, usual in (("method", self.method, "uniform"), ("num_layers", self.num_layers, 1)):
            if value != usual and self.granularity != "full":
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
            raise UserError("recompute.modules: names nothing; name a part, or set recompute.granularity: none")

    @property
    def parts(self) -> set[str]:
        """The modules by our names."""
        return {ALIASES.get(part, part) for part in self.modules}
