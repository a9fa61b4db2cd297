"""The settings of `litgpt plan`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge, Le

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Position, check_numbers
from litgpt.recipe.build import build_recipe, collect_settings
from litgpt.recipe.config_hub import find_config_file
from litgpt.recipe.effect import check_effects
from litgpt.recipe.from_yaml import read_yaml
from litgpt.recipe.gpu import Gibibytes, Gpu, GpuName, build_gpu
from litgpt.recipe.training import Training

Price = Annotated[float, Ge(0.0), Le(1e6)]
Skew = Annotated[float, Ge(1.0), Le(1e5)]
SoundSeconds = Annotated[float, Ge(0.01), Le(1e6)]
PlannedCommand = Literal[
    "pretrain",
    "finetune",
    "finetune_lora",
    "finetune_full",
    "finetune_adapter",
    "finetune_adapter_v2",
    "align",
    "dpo",
    "kto",
    "rm",
]


@dataclass(frozen=True)
class RowMedia:
    """The images, videos and sounds of each row of a planned run, for a model with towers that read them.

    Attributes:
        images, videos, sounds: their numbers; None for one image or sound, if a row has room for it, and no video.
        size: height and width in pixels; None for the size that the vision tower has positions for, or 448.
        frames: number of frames that are read of each video; None for 16.
        seconds: of each sound; None for the longest that the audio tower reads, or 30.
    """

    images: int | None = None
    size: int | None = None
    videos: int | None = None
    frames: int | None = None
    sounds: int | None = None
    seconds: float | None = None


USUAL_MEDIA = RowMedia()


@dataclass(frozen=True)
class Plan:
    """Compute what a run will need, without a GPU and without weights; its recipe is given with --config."""

    command: PlannedCommand | None = None
    """Command of the recipe; null for pretrain, if the recipe has model_name."""
    gpu: GpuName | None = None
    """GPU that the run should fit into, and whose time per step is estimated."""
    gpu_file: Path | None = None
    """YAML file with the figures of a GPU that is not in the list: memory in GiB, bf16_tflops, tf32_tflops, and
    memory_bandwidth, link_bandwidth and network_bandwidth in GB/s."""
    gpu_memory: Gibibytes | None = None
    """GiB of memory of each GPU, if nothing else of it matters."""
    price_per_hour: Price | None = None
    """Price of an hour of one GPU, for that of the whole run."""
    routing_skew: Skew = 1.0
    """With expert parallelism: tokens that the busiest device's experts get, relative to the mean; 1 for balanced."""
    rank: Position | None = None
    """Only rank whose memory is planned; null for one of each kind, of which the table shows the largest."""
    images_per_row: Position | None = None
    """For a model with a vision tower: number of images of each row; null for one, if there is room for it."""
    image_size: Count | None = None
    """Height and width in pixels of these images, and of the frames of videos; null for the size that the tower has
    positions for, or 448."""
    videos_per_row: Position | None = None
    """For a model that reads videos: number of videos of each row, instead of images unless these are set too; null for
    none."""
    video_frames: Count | None = None
    """Number of frames that are read of each of these videos; null for 16."""
    sounds_per_row: Position | None = None
    """For a model with an audio tower: number of sounds of each row; null for one, if there is room for it, and for a
    model that sees too none."""
    sound_seconds: SoundSeconds | None = None
    """Seconds of each of these sounds; null for the longest that the tower reads, or 30."""
    savings: bool = False
    """Also plan the run with one setting changed at a time, and list the changes that save memory."""
    search: bool = False
    """Search the layouts, recomputation and micro-batches of the run for the fastest ones that fit."""
    gpus: Count | None = None
    """With search: number of GPUs, in nodes of 8; null for devices x num_nodes."""
    layout_file: Path | None = None
    """With search: YAML file for the settings of the fastest layout, to give to the run with another --config."""
    page_file: Path | None = None
    """HTML page for the plan: memory of each rank and during a step, time, and with search the layouts."""
    check_step: bool = False
    """Instead of the plan, run a training step on fake tensors of a GPU, and print each operation that would fail there
    or that makes the host wait."""
    json: bool = False
    """Print the plan as JSON."""

    def __post_init__(self) -> None:
        check_numbers(self)
        for field in fields(self) if self.check_step else ():
            if field.name not in ("command", "check_step") and (value := getattr(self, field.name)) != field.default:
                shown = "true" if value is True else value
                raise UserError(f"{field.name}: {shown} has no effect with check_step: true; leave it out")
        given = {name: getattr(self, name) for name in ("gpu", "gpu_file", "gpu_memory")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            shown = " and ".join(f"{name}: {value}" for name, value in given.items())
            raise UserError(f"{shown} are the same setting; set one of them")
        if self.price_per_hour is not None and self.gpu is None and self.gpu_file is None:
            raise UserError(
                f"price_per_hour: {self.price_per_hour:g} has no effect without the time of a step; set gpu: H100-80GB"
            )

        if self.search and self.gpu is None and self.gpu_file is None:
            raise UserError("search: true needs the figures of a GPU; set gpu: H100-80GB")
        other, cure = "search: false", "set search: true"
        for name in ("gpus", "layout_file"):
            check_effects(self, "", name, have_effect=self.search, other=other, cure=cure)
        cures = {"routing_skew": "set routing_skew: 1", "rank": "leave it out", "savings": "set savings: false"}
        for name, cure in cures.items():
            check_effects(self, "", name, have_effect=not self.search, other="search: true", cure=cure)

    @property
    def row_media(self) -> RowMedia:
        """The media of each row."""
        visual = (self.images_per_row, self.image_size, self.videos_per_row, self.video_frames)
        return RowMedia(*visual, self.sounds_per_row, self.sound_seconds)

    @cached_property
    def figures(self) -> Gpu | None:
        """The figures of the GPU; None if it was not given.

        Raises:
            UserError: if `gpu_file` is not a file with them.
        """
        if self.gpu_file is not None:
            return build_recipe(Gpu, collect_settings(Gpu, [str(self.gpu_file)], []))
        return None if self.gpu is None else build_gpu(self.gpu)

    @property
    def gpu_label(self) -> str:
        """The name of the GPU, for messages."""
        return self.gpu or (self.gpu_file.stem if self.gpu_file else "the GPU")

    @property
    def available_memory(self) -> float | None:
        """GiB of memory of each GPU; None if it was not given."""
        return self.gpu_memory if self.figures is None else self.figures.memory


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
