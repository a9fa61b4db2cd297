"""Positions of time, row and column for texts with images and videos (Wang et al. 2024, Qwen2-VL, section 2.1)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from litgpt.model.media import Grid
from litgpt.model.tower_config import TowerShape


def build_media_positions(
    shape: TowerShape,
    ids: Sequence[int],
    grids: Sequence[Grid],
    *,
    seconds: Sequence[float] | None = None,
    after_video: Literal["highest", "grid"] = "highest",
) -> Tensor:
    """The positions (3, T) of a text.

    A token of text has the same position in all three rows, one more than the highest before it. The places of an image
    or video start from there: time advances by the step of its frames, row and column by the merge block.

    Args:
        ids: the tokens of the text, places written out.
        grids: the size in patches of each image and video, in order.
        seconds: of one step of frames, for each of `grids`; needed for videos where `tokens_per_second` is set, the
            value for images has no effect. None for one second.
        after_video: what text continues from after a video: the highest position, or as after an image of its grid, as
            transformers 5 does.
    """
    rows: list[Tensor] = []
    start, token, number = 0, 0, 0
    media_tokens = set(shape.media_tokens)
    if shape.frame_runs:
        grids = [(1, height, width) for steps, height, width in grids for _ in range(steps)]
        seconds = None  # a run of one step takes no time
    while token < len(ids):
        if ids[token] not in media_tokens:
            rows.append(torch.full((3, 1), start))
            start, token = start + 1, token + 1
            continue
        steps, height, width = grids[number]
        height, width = height // shape.merge, width // shape.merge
        is_video = ids[token] == shape.video_token
        speed = shape.tokens_per_second if is_video else None
        times = torch.arange(steps)
        if speed is not None:
            times = (times * (seconds[number] if seconds else 1.0) * speed).long()
        places = torch.cartesian_prod(times, torch.arange(height), torch.arange(width)).T + start
        rows.append(places)
        by_grid = is_video and after_video == "grid"
        start = start + max(height, width) if by_grid else int(places.max()) + 1
        token, number = token + places.shape[1], number + 1
    return torch.cat(rows, dim=1)
