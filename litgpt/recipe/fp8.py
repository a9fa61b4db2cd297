"""The settings of training with matrix products in FP8."""

from dataclasses import dataclass, field, fields
from typing import Literal

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Position, check_numbers
from litgpt.recipe.effect import check_effects
from litgpt.recipe.parallel import ParallelArgs

FP8Recipe = Literal["tensorwise", "rowwise", "blockwise", "mxfp8", "delayed"]
DEFAULT_FORMATS = {"tensorwise": "hybrid", "delayed": "hybrid"}
"""The formats of recipes; e4m3 for the others."""
E4M3_ONLY = ("blockwise", "mxfp8")
BF16_PRECISIONS = (None, "bf16-mixed", "bf16-true")


@dataclass(frozen=True)
class FP8Args:
    """Matrix products of the layers in FP8; weights, gradients and optimizer have the types of `precision`.

    All other products, such as those of attention, head and routers, stay as they are. Devices without FP8 emulate it.
    """

    recipe: FP8Recipe | None = None
    """How operands are scaled: one scale each (tensorwise), per row, per block, or from earlier steps (delayed).

    Null for no FP8. blockwise has blocks of 1x128 of activations and gradients, and of 128x128 of weights
    (DeepSeek-V3), and mxfp8 blocks of 32 values with powers of two (OCP Microscaling Formats).
    """
    format: Literal["e4m3", "hybrid"] | None = None
    """e4m3 for all operands, or e5m2 for gradients of outputs (hybrid); null for hybrid where there are large scales.

    These are tensorwise and delayed; the default of the others is e4m3.
    """
    amax_history_len: Count = 1024
    """With delayed: number of steps whose largest absolute values are kept."""
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    """With delayed: scale to the largest value of all these steps (max), or to that of the last step."""
    param_gather: bool = False
    """With tensorwise: all-gather sharded weights in FP8 (FSDP2); those of experts stay in bf16."""
    exclude: list[str] = field(default_factory=list)
    """Modules that stay in bf16, by parts of their names, such as attention, mlp.down, experts or blocks.0."""
    num_layers_at_start_in_bf16: Position = 0
    """Number of first layers that stay in bf16."""
    num_layers_at_end_in_bf16: Position = 0
    """Number of last layers that stay in bf16."""

    def __post_init__(self) -> None:
        check_numbers(self, "fp8.")
        names = [entry.name for entry in fields(self) if entry.name != "recipe"]
        cure = "set fp8.recipe: tensorwise"
        check_effects(self, "fp8.", *names, have_effect=self.recipe is not None, other="fp8.recipe: null", cure=cure)
        other, cure = f"fp8.recipe: {self.recipe}", "set fp8.recipe: delayed"
        names = ["amax_history_len", "amax_compute_algo"]
        check_effects(self, "fp8.", *names, have_effect=self.recipe == "delayed", other=other, cure=cure)
        if self.param_gather and self.recipe != "tensorwise":
            raise UserError(f"fp8.param_gather: true is not supported with {other}; set fp8.recipe: tensorwise")
        if self.format == "hybrid" and self.recipe in E4M3_ONLY:
            raise UserError(f"fp8.format: hybrid is not supported with {other}; set fp8.format: e4m3")

    @property
    def resolved_format(self) -> str:
        """The format, or the default of the recipe."""
        return self.format or DEFAULT_FORMATS.get(self.recipe or "", "e4m3")

    def check_run(self, precision: str | None, parallel: ParallelArgs) -> None:
        """Check the settings with others of the run.

        Raises:
            UserError: naming the other setting, and a value of it that would do.
        """
        if self.recipe is None:
            return
        if precision not in BF16_PRECISIONS:
            raise UserError(
                f"precision: {precision} is not supported with fp8.recipe: {self.recipe}; set precision: bf16-mixed"
            )
        conflicts = {"parallel.tensor": (parallel.tensor, 1), "parallel.cpu_offload": (parallel.cpu_offload, False)}
        for key, (value, other) in conflicts.items() if self.param_gather else ():
            if value != other:
                shown, cure = str(value).lower(), str(other).lower()
                raise UserError(f"fp8.param_gather: true is not supported with {key}: {shown}; set {key}: {cure}")
