"""Plans of models with towers: the memory of rows with images, videos and sounds is that of real steps."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from litgpt.data.stream.batch import Batch
from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.parallel.fake_group import fake_mesh
from litgpt.parallel.mesh import Mesh
from litgpt.plan.accelerator_paths import accelerator_paths
from litgpt.plan.allocations import AllocationRecorder
from litgpt.plan.batches import build_batches
from litgpt.plan.build_spec import build_spec
from litgpt.plan.memory import plan_step_memory, record_step
from litgpt.plan.planned_media import PlannedMedia, PlannedPictures, choose_media
from litgpt.plan.ranks import plan_run
from litgpt.recipe.build import build_recipe, merge_settings
from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.gpu import build_gpu
from litgpt.recipe.plan import RowMedia
from litgpt.train.build_state import build_train_state
from litgpt.train.objectives import build_objective
from litgpt.train.run_spec import RunSpec
from tests.audio_model import write_audio_model
from tests.omni_model import write_omni_model
from tests.plan.test_memory import CPU
from tests.processes import join_ranks, start_ranks
from tests.vision_model import write_vision_model

TOKENS = 128
TRAINED: dict[str, Any] = {"vision": False, "aligner": False}
MEDIA = {"audio": RowMedia(sounds=2, seconds=0.8), "qwen2_vl-videos": RowMedia(videos=1, frames=6, size=32)}
MEDIA["llava_onevision"] = RowMedia(images=1, videos=1, frames=3)
MEDIA["omni"] = RowMedia(images=2, size=32, sounds=2, seconds=0.8)
"""Of the rows of models, by the names of their folders."""
LAYOUTS: dict[str, dict[str, Any]] = {"zero": {}, "context": {"context": 2}, "pipeline": {"pipeline": 2}}


def build_run(folder: Path, freeze: dict[str, Any], **changes: Any) -> tuple[Any, RunSpec, PlannedMedia]:
    """A recipe, its spec and the media of its rows, as `MEDIA` has them, or two images in each."""
    train = {"micro_batch_size": 2, "global_batch_size": 8, "max_seq_length": TOKENS, "max_norm": 1.0}
    data = {"class_path": "Conversations", "init_args": {"sources": "rows.jsonl"}}
    tree = {"checkpoint_dir": str(folder), "out_dir": "unused", "data": data, "train": train, "precision": "32-true"}
    cls = COMMANDS["finetune_full"].import_recipe()
    recipe = build_recipe(cls, merge_settings(cls, {}, tree | {"freeze": freeze} | changes, trusted=True))
    usual = RowMedia(2, 32 if "qwen" in folder.name else None)
    spec = build_spec("finetune_full", recipe, MEDIA.get(folder.name, usual))
    media = choose_media(spec, TOKENS)
    assert media is not None
    return recipe, spec, media


def fill_batches(recipe: Any, spec: RunSpec, media: PlannedMedia, ranks: int = 1) -> list[Batch]:
    """The micro-batches of a step, with two media, or one video, in the middle of each row."""
    batches = build_batches(recipe, spec, TOKENS, recipe.train.accumulation(ranks), media)
    ids = torch.randint(1, 250, batches[0].ids.shape, generator=torch.Generator().manual_seed(1))
    start = (TOKENS - media.places) // 2
    for part in media.parts:
        is_video = isinstance(part, PlannedPictures) and bool(part.videos)
        number = (part.videos or part.images) if isinstance(part, PlannedPictures) else part.number
        places = part.places // number
        for _ in range(number):
            ids[:, start : start + places] = part.shape.media_tokens[-1 if is_video else 0]
            start += places + 1
    return [replace(batches[0], ids=ids, labels=ids.roll(-1, 1))] * len(batches)


def record(run: tuple[Any, RunSpec, PlannedMedia], mesh: Mesh | None) -> dict[str, int]:
    """What a real step holds at its peak."""
    recipe, spec, media = run
    recorder = AllocationRecorder()
    with accelerator_paths(), recorder:
        state = build_train_state(recipe, spec, mesh, CPU, resumed=False, steps=10)
        batches = fill_batches(recipe, spec, media, 1 if mesh is None else mesh.dims.data_ranks)
        return record_step(recorder, state, batches, build_objective(recipe, spec, ()), max_norm=1.0).parts


def check_parts(planned: dict[str, int], real: dict[str, int], rel: float = 0.03) -> None:
    for kind in ("parameters", "gradients", "optimizer", "activations", "logits", "other"):
        assert planned[kind] == pytest.approx(real[kind], rel=rel, abs=4096), kind
    assert sum(planned.values()) == pytest.approx(sum(real.values()), rel=rel)


@pytest.mark.parametrize(
    ("kind", "freeze", "changes"),
    [
        ("llava", {}, {}),
        ("qwen2_vl", TRAINED, {}),
        pytest.param("audio", {"audio": False, "aligner": False}, {}, marks=pytest.mark.slow),
        pytest.param("qwen2_vl-videos", TRAINED, {}, marks=pytest.mark.slow),
        pytest.param("omni", {**TRAINED, "audio": False}, {}, marks=pytest.mark.slow),
        pytest.param("llava_onevision", TRAINED, {}, marks=pytest.mark.slow),
        pytest.param("gemma3", TRAINED, {"recompute": {"granularity": "full"}}, marks=pytest.mark.slow),
        pytest.param("qwen3_vl", {"llm": True, "aligner": False}, {}, marks=pytest.mark.slow),
    ],
)
def test_rows_with_media_need_what_a_real_step_needs(
    kind: str, freeze: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    usual = partial(write_vision_model, kind=kind.removesuffix("-videos"))
    write = {"audio": write_audio_model, "omni": write_omni_model}.get(kind, usual)
    run = build_run(write(tmp_path / kind), freeze, **changes)
    recipe, spec, media = run
    planned = plan_step_memory(recipe, spec, None, length=TOKENS, steps=10, micro_batches=4, media=media)
    check_parts(planned.parts, record(run, None))
    text = plan_step_memory(recipe, spec, None, length=TOKENS, steps=10, micro_batches=4)
    more = planned.parts["activations"] - text.parts["activations"]
    assert more > 0 or not (freeze or changes), "a frozen tower keeps none"


def test_answers_of_a_pair_share_the_images_of_its_row(tmp_path: Path) -> None:
    _, _, planned = build_run(write_vision_model(tmp_path / "llava", "llava"), {})
    media = planned.build_media(2, answers=2)
    assert len(media.grids) == 4 and len(media.patches_NP) == 4 * 16
    assert media.uses == [0, 1, 0, 1, 2, 3, 2, 3] and media.answers == [0, 0, 1, 1, 2, 2, 3, 3]
    assert media.select_answers([1, 2]).uses == [0, 1, 2, 3]


@pytest.mark.slow
def test_preferences_about_images_are_planned(tmp_path: Path) -> None:
    folder = write_vision_model(tmp_path / "qwen2_vl", "qwen2_vl")
    data = {"class_path": "Preferences", "init_args": {"sources": "pairs.jsonl"}}
    train = {"micro_batch_size": 2, "global_batch_size": 4, "max_seq_length": TOKENS}
    cls = COMMANDS["kto"].import_recipe()
    tree = {"checkpoint_dir": str(folder), "out_dir": "unused", "data": data, "train": train, "precision": "32-true"}
    recipe = build_recipe(cls, merge_settings(cls, {}, tree, trusted=True))
    seen, text = (plan_run(recipe, build_spec("kto", recipe, asked)) for asked in (RowMedia(2, 32), RowMedia(0)))
    assert seen.ranks[0].parts["other"] > text.ranks[0].parts["other"]


def record_ranks() -> None:
    """Write what each of two ranks holds, by layout."""
    dist.init_process_group("gloo")
    parts = {}
    for name, parallel in LAYOUTS.items():
        run = build_run(Path("qwen2_vl"), TRAINED, devices=2, parallel=parallel)
        # gloo does not tell that it has sent a tensor, as NCCL does, before it is asked to wait for that
        with patch.object(dist.Work, "is_completed", return_value=True):
            parts[name] = record(run, Mesh(run[0].parallel.resolve_dims(2), "cpu"))
    Path(f"parts-{dist.get_rank()}.json").write_text(json.dumps(parts))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_with_images_need_what_two_real_ranks_need(tmp_path: Path) -> None:
    write_vision_model(tmp_path / "qwen2_vl", "qwen2_vl")
    assert join_ranks(start_ranks(record_ranks, folder=tmp_path, ranks=2), timeout=200) == [0, 0]
    for name, parallel in LAYOUTS.items():
        recipe, spec, media = build_run(tmp_path / "qwen2_vl", TRAINED, devices=2, parallel=parallel)
        dims = recipe.parallel.resolve_dims(2)
        for rank in range(2):
            micro_batches = recipe.train.accumulation(dims.data_ranks)
            settings: dict[str, Any] = {"length": TOKENS, "steps": 10, "micro_batches": micro_batches}
            with fake_mesh(dims, rank) as mesh:
                planned = plan_step_memory(recipe, spec, mesh, media=media, **settings)
            real = json.loads((tmp_path / f"parts-{rank}.json").read_text())[name]
            check_parts(planned.parts, real)


def test_the_tower_takes_time(tmp_path: Path) -> None:
    folder = write_vision_model(tmp_path / "llava", "llava")
    plans = []
    for freeze, images in (({}, 0), ({}, 1), (TRAINED, 1)):
        recipe, spec, _ = build_run(folder, freeze, precision="bf16-true")
        plans.append(plan_run(recipe, replace(spec, row_media=RowMedia(images)), build_gpu("H100-80GB")))
    times = [plan.time for plan in plans]
    assert times[0] is not None and times[1] is not None and times[2] is not None
    assert times[0].seconds < times[1].seconds < times[2].seconds
    assert plans[0].media is None and str(plans[1].media) == "1 image of 16 x 16 pixels, 16 of these tokens"


@pytest.mark.parametrize(
    ("kind", "asked", "message"),
    [
        ("llava", RowMedia(1, 32), "image_size: 32 is not a size that the vision tower reads; set 16"),
        ("llava_onevision", RowMedia(1, 16), "image_size: 16 is not a size that the vision tower reads; set 18"),
        ("qwen2_vl", RowMedia(0, 32), "image_size: 32 has no effect with images_per_row: 0; set images_per_row: 1"),
        ("qwen2_vl", RowMedia(1, 30), "use a multiple of 8, such as 448"),
        ("qwen2_vl", RowMedia(3, 64), "images_per_row: 3 with 192 tokens do not fit into rows of 128"),
        (None, RowMedia(2), "images_per_row: 2 has no effect on a model without a vision tower; leave it out"),
        ("llava", RowMedia(videos=1), "videos_per_row: 1 has no effect on a model that reads no videos; leave it out"),
        ("qwen2_vl", RowMedia(frames=8), "video_frames: 8 has no effect with videos_per_row: 0; set videos_per_row: 1"),
        (
            "qwen2_vl",
            RowMedia(videos=2, frames=64, size=16),
            "videos_per_row: 2 with 256 tokens do not fit into rows of",
        ),
        ("qwen2_vl", RowMedia(sounds=1), "sounds_per_row: 1 has no effect on a model without an audio tower; leave it"),
        ("audio", RowMedia(seconds=31.0), "sound_seconds: 31.0 is not a length that the audio tower reads; set 1"),
        ("audio", RowMedia(sounds=0, seconds=1.0), "sound_seconds: 1.0 has no effect with sounds_per_row: 0; set"),
        ("audio", RowMedia(sounds=9), "sounds_per_row: 9 with 225 tokens do not fit into rows of 128"),
    ],
)
def test_media_that_no_row_has_are_refused(kind: str | None, asked: RowMedia, message: str, tmp_path: Path) -> None:
    write = write_audio_model if kind == "audio" else partial(write_vision_model, kind=kind or "")
    config = Config.from_name("pythia-14m") if kind is None else Config.from_checkpoint(write(tmp_path / kind))
    spec = RunSpec("", config, None, None, None)  # type: ignore[arg-type]  # whose data is not read
    with pytest.raises(UserError, match=message):
        choose_media(replace(spec, row_media=asked), TOKENS)
    if kind == "qwen2_vl":
        assert choose_media(spec, TOKENS) is None, "448 pixels do not fit, and are not asked for"
