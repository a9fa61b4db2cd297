"""The settings of `litgpt plan`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge, Le

from litgpt.errors import UserError
from litgpt.recipe.bounds import check_numbers
from litgpt.recipe.config_hub import find_config_file
from litgpt.recipe.from_yaml import read_yaml
from litgpt.recipe.training import Training

Gibibytes = Annotated[float, Ge(0.1), Le(1e5)]
PlannedCommand = Literal[
    "pretrain", "finetune", "finetune_lora", "finetune_full", "finetune_adapter", "finetune_adapter_v2"
]
Gpu = Literal[
    "A100-40GB", "A100-80GB", "A800-80GB", "H100-80GB", "H800-80GB", "H200", "B200", "L40S", "RTX-4090", "RTX-3090"
]
GPU_MEMORY: dict[str, float] = {
    "A100-40GB": 39.4,
    "A100-80GB": 79.2,
    "A800-80GB": 79.2,
    "H100-80GB": 79.1,
    "H800-80GB": 79.1,
    "H200": 139.8,
    "B200": 178.4,
    "L40S": 44.4,
    "RTX-4090": 23.6,
    "RTX-3090": 23.7,
}
"""GiB that a program can use, which is less than the size in the name."""


@dataclass(frozen=True)
class Plan:
    """Compute what a run will need, without a GPU and without weights; its recipe is given with --config."""

    command: PlannedCommand | None = None
    """Command of the recipe; null for pretrain, if the recipe has model_name."""
    gpu: Gpu | None = None
    """GPU whose memory the run should fit into."""
    gpu_memory: Gibibytes | None = None
    """GiB of memory of each GPU, for one that is not in the list."""
    json: bool = False
    """Print the plan as JSON."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.gpu is not None and self.gpu_memory is not None:
            raise UserError(f"gpu: {self.gpu} and gpu_memory: {self.gpu_memory} are the same setting; set one of them")

    @property
    def available_memory(self) -> float | None:
        """GiB of memory of each GPU; None if it was not given."""
        return self.gpu_memory if self.gpu is None else GPU_MEMORY[self.gpu]


@dataclass(frozen=True)
class RunToPlan:
    """A run that is planned, with the settings of the plan.

    Attributes:
        command: that would start the run.
    """

    settings: Plan
    command: str
    recipe: Training


def split_flags(flags: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Split flags into those of the plan and those of the recipe of the run."""
    plan_flags = {field.name for field in fields(Plan)}
    return [flag for flag in flags if flag.key in plan_flags], [flag for flag in flags if flag.key not in plan_flags]


def infer_command(configs: Sequence[str], flags: Sequence[Any]) -> str:
    """Find the command of a recipe by its keys.

    Raises:
        UserError: if that of several commands would accept them.
    """
    names = {name for source in configs for name in read_yaml(find_config_file(source))} | {flag.key for flag in flags}
    if "model_name" not in names:
        raise UserError(
            "command: missing; set that of the recipe, as in litgpt plan finetune_full --config x.yaml; the commands "
            f"are {', '.join(get_args(PlannedCommand))}"
        )
    return "pretrain"
