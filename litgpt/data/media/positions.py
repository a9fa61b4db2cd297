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
    tracked: Sequence[range] = (),
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
        tracked: the tokens of each video with its sound track, from that before its places to that after them.
        after_video: what text continues from after a video: the highest position, or as after an image of its grid, as
            transformers 5 does.
    """
    rows: list[Tensor] = []
    start, token, number = 0, 0, 0
    media_tokens, runs = set(shape.media_tokens), {run.start: run for run in tracked}
    if shape.frame_runs:
        grids = [(1, height, width) for steps, height, width in grids for _ in range(steps)]
        seconds = None  # a run of one step takes no time
    while token < len(ids):
        if ids[token] not in media_tokens and token not in runs:
            rows.append(torch.full((3, 1), start))
            start, token = start + 1, token + 1
            continue
        run = runs.get(token)
        is_video = run is not None or ids[token] == shape.video_token
        step = seconds[number] if seconds else 1.0
        places = list_grid_positions(shape, grids[number], step if is_video else None)
        if run is not None:
            # the tokens around a video have the positions of those around its sound, with which they are one each
            start -= token > 0 and ids[token - 1] == shape.start_token
            is_frame = [each == shape.video_token for each in ids[run.start + 1 : run.stop - 1]]
            places = add_track(places, torch.tensor(is_frame))
            after = token + places.shape[1]
            is_around = after < len(ids) and ids[after] == shape.end_token
            rows.append(places + start)
            start += int(places[0, -1]) + 1 - is_around
        else:
            rows.append(places + start)
            height, width = (side // shape.merge for side in grids[number][1:])
            by_grid = is_video and after_video == "grid"
            start += max(height, width) if by_grid else int(places.max()) + 1
        token, number = token + places.shape[1], number + 1
    return torch.cat(rows, dim=1)


def list_grid_positions(shape: TowerShape, grid: Grid, seconds: float | None) -> Tensor:
    """The positions (3, P) of the places of an image or video, from 0.

    Args:
        seconds: of a step of frames of a video; None for an image.
    """
    steps, height, width = grid
    times = torch.arange(steps)
    if seconds is not None and shape.tokens_per_second is not None:
        times = (times * seconds * shape.tokens_per_second).long()
    rows, columns = torch.arange(height // shape.merge), torch.arange(width // shape.merge)
    return torch.cartesian_prod(times, rows, columns).T


def add_track(places_3P: Tensor, is_frame_N: Tensor) -> Tensor:
    """The positions (3, N + 2) of a video with its sound and a token before and after, from 0.

    A place of the sound has the position of its number, from where the frames begin. The last token is after what the
    last place is of, as in Qwen2.5-Omni, also if the other goes on for longer.

    Args:
        places_3P: of the frames, from 0.
        is_frame_N: whether each place is of a frame; else it is of the sound.
    """
    inner_3N = torch.empty(3, len(is_frame_N), dtype=places_3P.dtype)
    inner_3N[:, is_frame_N] = places_3P
    inner_3N[:, ~is_frame_N] = torch.arange(int((~is_frame_N).sum())).expand(3, -1)
    last = int(inner_3N[:, is_frame_N == is_frame_N[-1]].max())
    around = torch.tensor([0, last + 2]).expand(3, -1)
    return torch.cat([around[:, :1], inner_3N + 1, around[:, 1:]], dim=1)
