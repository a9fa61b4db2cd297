"""Positions and numbers of places of texts with images and videos, against transformers and published vectors."""

import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from litgpt.data.media.patches import count_places
from litgpt.data.media.positions import build_media_positions
from litgpt.model.tower_config import TowerShape
from litgpt.model.vision import order_by_windows

IMAGE, VIDEO, LAYOUTS = 90, 91, 200
SHAPE: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "mlp_size": 16, "blocks_run": 1, "patch": 4, "merge": 2}
SHAPE |= {"temporal": 2, "image_token": IMAGE, "video_token": VIDEO}


def draw_layout(draw: random.Random, shape: TowerShape) -> tuple[list[int], list[tuple[int, int, int]], list[int]]:
    """A text of one to seven images and videos, and the token of each, with text between them, as in transformers."""
    ids, grids, kinds = [1] * draw.randint(0, 3), list[tuple[int, int, int]](), list[int]()
    for _ in range(draw.randint(1, 7)):
        kind = draw.choice([IMAGE, VIDEO])
        steps = 1 if kind == IMAGE else draw.randint(1, 4)
        grids.append((steps, 2 * draw.randint(1, 6), 2 * draw.randint(1, 6)))
        runs = steps if shape.frame_runs else 1
        for _ in range(runs):
            ids += [kind] * (count_places(grids[-1], shape) // runs) + [1] * draw.randint(1, 5)
        kinds.append(kind)
    return ids, grids, kinds


def compute_rope_index(
    model: Any, ids: list[int], grids: list[tuple[int, int, int]], kinds: list[int], seconds: list[float]
) -> Tensor:
    """The positions (3, T) of transformers."""
    types = [{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in ids]
    pictures = [grid for grid, kind in zip(grids, kinds, strict=True) if kind == IMAGE]
    films = [grid for grid, kind in zip(grids, kinds, strict=True) if kind == VIDEO]
    times = [each for each, kind in zip(seconds, kinds, strict=True) if kind == VIDEO]
    positions, _ = model.get_rope_index(
        torch.tensor([ids]),
        mm_token_type_ids=torch.tensor([types]),
        image_grid_thw=torch.tensor(pictures) if pictures else None,
        video_grid_thw=torch.tensor(films) if films else None,
        second_per_grid_ts=times,
    )
    return positions[:, 0]


@pytest.mark.parametrize(
    ("kind", "speed"),
    [pytest.param("Qwen2VL", None, marks=pytest.mark.slow), ("Qwen2_5_VL", 2.0), ("Qwen3VL", None), ("Glm4v", None)],
)
def test_random_layouts(kind: str, speed: float | None) -> None:
    config = getattr(transformers, f"{kind}Config")(
        vision_config={"depth": 1, "tokens_per_second": 2, "spatial_merge_size": 2}
    )
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}Model")(config)
    values = {**SHAPE, "tokens_per_second": speed, "frame_runs": kind in ("Qwen3VL", "Glm4v")}
    shape, draw, moved = TowerShape.from_values(values), random.Random(0), 0
    for _ in range(LAYOUTS):
        ids, grids, kinds = draw_layout(draw, shape)
        seconds = [draw.choice([0.4, 1.0, 1.01, 2.3]) for _ in grids]
        expected = compute_rope_index(model, ids, grids, kinds, seconds)
        assert torch.equal(build_media_positions(shape, ids, grids, seconds=seconds, after_video="grid"), expected)
        moved += not torch.equal(build_media_positions(shape, ids, grids, seconds=seconds), expected)
    # time passes rows and columns more often at two positions a step, and never in runs of one step
    assert moved > 100 if speed else (moved == 0) == shape.frame_runs


def test_published_vector_and_time_of_videos() -> None:
    shape = TowerShape.from_values({**SHAPE, "tokens_per_second": 2.0})
    rows = build_media_positions(shape, [1, 1, 1, 1, *[IMAGE] * 6, 1], [(1, 4, 6)])
    assert rows.tolist() == [
        [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 7],
        [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 7],
        [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7],
    ]
    half = build_media_positions(shape, [VIDEO] * 4 + [1], [(4, 2, 2)], seconds=[0.75])
    assert half[0].tolist() == [0, 1, 3, 4, 5]


def test_neighbouring_images_are_told_apart_by_their_grids() -> None:
    rows = build_media_positions(TowerShape.from_values(SHAPE), [IMAGE] * 5, [(1, 4, 4), (1, 2, 2)])
    assert rows[:, 4].tolist() == [2, 2, 2]


def test_order_of_windows() -> None:
    order, lengths = order_by_windows([(1, 20, 12)], 2, 4)
    assert torch.tensor(lengths).cumsum(0).tolist() == [64, 96, 160, 192, 224, 240]
    first = [0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15, 18, 19, 20, 21, 4, 5, 10, 11]
    assert (order[::4] // 4)[:20].tolist() == first
