"""The vision tower: a transformer over the patches of images, and a projector to the width of the decoder.

Which norms, biases, positions and windows it has are fields of a `TowerShape`; there is no class per family. Images
and videos of any sizes are one packed sequence of patches. Patches of a merge block are neighbours, row by row within
the block, and blocks follow each other row by row: merging is a reshape.

Axes: N patches (and class tokens), P numbers of a patch, C width of the tower, M merged features, D width of the
decoder.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.errors import UserError
from litgpt.model.feature_order import FeatureOrder
from litgpt.model.media import Grid, Media
from litgpt.model.rotary import spread_pairs
from litgpt.model.tower_block import NORMS, TOWER_ACTIVATIONS, TowerBlock
from litgpt.model.tower_config import TowerShape

MERGING_MATRICES = ("matrix", "convolution")


class Projector(nn.Module):
    """Features of a tower to the decoder's width, one for each merge block; (N, C) -> (M, D).

    Args:
        norm_at: as `projector_norm_at`.
    """

    def __init__(self, shape: TowerShape, width: int, norm_at: str) -> None:
        super().__init__()
        norm, eps, hidden = shape.projector_norm, shape.projector_eps or shape.eps, shape.projector_hidden
        kind, block, is_gated = shape.projector_merge, shape.width * shape.merge**2, shape.projector_form == "gated"
        merged = {"concat": block, "convolution": width}.get(kind, shape.width)
        build_linear = partial(nn.Linear, bias=shape.projector_bias)
        first = width if is_gated else hidden or width
        size = {"patch": shape.width, "block": merged, "hidden": first}[norm_at]
        self.norm = None if norm == "none" else NORMS[norm](size, eps=eps)
        self.merger = nn.Linear(block, merged, bias=kind == "convolution") if kind in MERGING_MATRICES else None
        self.linear_1 = build_linear(merged, first)
        self.gate, self.up = (build_linear(width, hidden or 0) if is_gated else None for _ in range(2))
        is_triple = shape.projector_form == "triple"
        self.middle = build_linear(hidden or 0, hidden or 0) if is_triple else None
        self.linear_2 = build_linear(hidden, width) if hidden else None
        self.line_break = nn.Parameter(torch.zeros(width)) if shape.line_break else None
        self.merge, self.kind, self.norm_at = shape.merge, kind, norm_at
        self.act, self.gate_act = TOWER_ACTIVATIONS[shape.projector_act], TOWER_ACTIVATIONS[shape.act]

    def forward(self, x_NC: Tensor, order: FeatureOrder | None = None) -> Tensor:
        """(N, C) -> (M, D): one feature for each merge block, or with an order one for each place of texts."""
        features_MD = self._project(x_NC)
        if order is None:
            return features_MD
        assert self.line_break is not None, "orders are of models whose rows of features end with a learned one"
        return order.arrange(features_MD, self.line_break)

    def _project(self, x_NC: Tensor) -> Tensor:
        if self.norm is not None and self.norm_at == "patch":
            x_NC = self.norm(x_NC)
        merged = self._merge_blocks(x_NC)
        if self.norm is not None and self.norm_at == "block":
            merged = self.norm(merged)
        hidden = self.linear_1(merged)
        if self.norm is not None and self.norm_at == "hidden":
            hidden = self.norm(hidden)
        if self.linear_2 is None:
            return hidden
        hidden = self.act(hidden)
        if self.middle is not None:
            hidden = self.act(self.middle(hidden))
        if self.gate is not None and self.up is not None:
            hidden = self.gate_act(self.gate(hidden)) * self.up(hidden)
        return self.linear_2(hidden)

    def _merge_blocks(self, x_NC: Tensor) -> Tensor:
        """The features of blocks, (M, C), or (M, merge^2 C) if they are side by side."""
        blocks_MPC = x_NC.unflatten(0, (-1, self.merge**2))
        if self.kind == "mean":
            return blocks_MPC.mean(1)
        return blocks_MPC.flatten(1) if self.merger is None else self.merger(blocks_MPC.mT.flatten(1))


class FeaturePlaces(nn.Module):
    """Writes features of a tower to their places among the embeddings of tokens; all gradients are defined, also if no
    token of a rank has a feature."""

    def forward(self, features_MD: Tensor, hidden_BTD: Tensor, sources_BT: Tensor) -> Tensor:
        """(B, T, D), wider if features are, with zeros beside the embeddings; `sources_BT` as in `Media`."""
        hidden_BTD = F.pad(hidden_BTD, (0, features_MD.shape[-1] - hidden_BTD.shape[-1]))
        is_place_BT = sources_BT >= 0
        features_MD = features_MD[select_sources(sources_BT)].to(hidden_BTD.dtype)
        return hidden_BTD.masked_scatter(is_place_BT[..., None], features_MD)


def select_sources(sources_BT: Tensor) -> Tensor:
    """The numbers of the features at the places of a rank, in their order, (M,)."""
    return sources_BT[sources_BT >= 0]


class PoolingHead(nn.Module):
    """The weights of SigLIP's attention pooling (Zhai et al. 2023), which decoders do not read; kept to be written."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.attention = nn.MultiheadAttention(shape.width, shape.heads)
        self.norm = nn.LayerNorm(shape.width, eps=shape.eps)
        self.up, self.down = nn.Linear(shape.width, shape.mlp_size), nn.Linear(shape.mlp_size, shape.width)


class Tower(nn.Module):
    """A vision tower with its projector.

    Args:
        width: of the decoder, D.
    """

    def __init__(self, shape: TowerShape, width: int) -> None:
        super().__init__()
        self.shape = shape
        self.patches = nn.Linear(shape.patch_numbers, shape.width, bias=shape.patch_bias)
        self.class_token = nn.Parameter(torch.zeros(shape.width)) if shape.class_token else None
        self.mask_token = nn.Parameter(torch.zeros(shape.width), requires_grad=False) if shape.mask_token else None
        places = (shape.side or 0) ** 2 + shape.class_token
        self.positions = nn.Embedding(places, shape.width) if shape.positions != "none" else None
        build_norm = partial(NORMS[shape.norm], shape.width, eps=shape.eps)
        self.norm_patches = build_norm() if shape.patch_norm else None
        self.norm_first = build_norm() if shape.first_norm else None
        self.blocks = nn.ModuleList(TowerBlock(shape) for _ in range(shape.layers))
        self.norm_final = build_norm() if shape.final_norm != "none" else None
        self.pooling = PoolingHead(shape) if shape.pooling else None
        self.projector = Projector(shape, width, shape.projector_norm_at)
        self.deep_projectors = nn.ModuleList(Projector(shape, width, "block") for _ in shape.deep_layers or [])
        unused = [*self.blocks[shape.blocks_run :], *([self.pooling] if self.pooling else [])]
        unused += [self.norm_final] if self.norm_final is not None and shape.final_norm == "unused" else []
        for module in unused:  # published and kept as they are
            module.requires_grad_(False)

    @property
    def is_trained(self) -> bool:
        """Whether any of its parameters has gradients."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def compute_zero(self) -> Tensor:
        """Zero, (), with gradients of zero for all parameters that run."""
        shape = self.shape
        sides = (shape.side, shape.side) if shape.positions == "learned" else (shape.merge, shape.merge)
        grid = (1, sides[0] or 0, sides[1] or 0)
        weight = self.patches.weight
        blank = torch.zeros(grid[1] * grid[2], shape.patch_numbers, dtype=weight.dtype, device=weight.device)
        # the learned feature and the first other one, so that both have gradients
        order = FeatureOrder(torch.arange(-1, 1)[:, None], None, (2,), 1) if shape.line_break else None
        return self(Media(blank, (grid,), order=order)).sum() * 0

    def forward(self, media: Media) -> Tensor:
        """Features (M, D) of all images and videos, in order; after them those of `deep_layers`, (M, (1 + layers) D).

        Raises:
            UserError: if an image has a size that the tower has no positions for, or sides that cannot be merged.
        """
        shape, grids = self.shape, media.grids
        check_grids(shape, grids)
        weight = self.patches.weight
        x_NC = self.patches(media.patches_NP.to(weight.device, weight.dtype))
        if self.norm_patches is not None:
            x_NC = self.norm_patches(x_NC)
        places_N2 = list_places(grids, shape.merge).to(x_NC.device)
        if self.positions is not None:
            x_NC = x_NC + self._embed_positions(places_N2, grids)
        frames = [height * width for frames, height, width in grids for _ in range(frames)]
        if self.class_token is not None:
            x_NC, places_N2 = self._insert_class_tokens(x_NC, frames), insert_class_places(places_N2, frames)
            frames = [length + 1 for length in frames]
        if self.norm_first is not None:
            x_NC = self.norm_first(x_NC)
        features = self._run_blocks(x_NC, places_N2, frames, grids)
        if self.class_token is not None:
            features = [torch.cat([frame[1:] for frame in x_NC.split(frames)]) for x_NC in features]
        if self.norm_final is not None and shape.final_norm == "applied":
            features[0] = self.norm_final(features[0])
        deep = [project(x_NC) for project, x_NC in zip(self.deep_projectors, features[1:], strict=True)]
        return torch.cat([self.projector(features[0], media.order), *deep], -1)

    def _embed_positions(self, places_N2: Tensor, grids: Sequence[Grid]) -> Tensor:
        """The learned positions of every patch, (N, C)."""
        side = self.shape.side
        assert side is not None and self.positions is not None
        if self.shape.positions == "interpolated":
            indices_N4, weights_N4 = find_neighbors(places_N2, grids, side)
            embedded_N4C: Tensor = self.positions(indices_N4)
            return (embedded_N4C * weights_N4[..., None]).sum(1).to(embedded_N4C.dtype)
        if self.shape.positions == "bicubic":
            table_SC = self.positions(torch.arange(side * side, device=places_N2.device))
            return sample_positions(table_SC, places_N2, list_image_sizes(grids, places_N2.device))
        if self.shape.positions == "bucket":
            places_N2 = find_buckets(places_N2, grids, side)
        first = int(self.shape.class_token and not self.shape.class_last)
        embedded_NC: Tensor = self.positions(places_N2[:, 0] * side + places_N2[:, 1] + first)
        return embedded_NC

    def _insert_class_tokens(self, x_NC: Tensor, frames: Sequence[int]) -> Tensor:
        assert self.class_token is not None
        token = self.class_token
        if self.positions is not None:
            index = (self.shape.side or 0) ** 2 if self.shape.class_last else 0
            token = token + self.positions(torch.full((), index, dtype=torch.long, device=x_NC.device))
        return insert_first(x_NC, token, frames)

    def _run_blocks(
        self, x_NC: Tensor, places_N2: Tensor, frames: Sequence[int], grids: Sequence[Grid]
    ) -> list[Tensor]:
        """What the last block returns, and after it those of `deep_layers`, (N, C) each."""
        shape, order, windows = self.shape, None, list(frames)
        if shape.window is not None:
            order, windows = order_by_windows(grids, shape.merge, shape.window // shape.merge // shape.patch)
            order = order.to(x_NC.device)
            x_NC, places_N2 = x_NC[order], places_N2[order]
        angles = None
        if shape.rope_base is not None:
            frequencies = list_frequencies(shape.width // shape.heads, shape.rope_base, shape.rope_frequencies)
            in_order_N2 = places_N2.flip(-1) if shape.rope_first == "columns" else places_N2
            angles = build_grid_angles(in_order_N2, frequencies.to(x_NC.device), interleave=shape.rope_interleave)
        deep = list[Tensor]()
        for layer in range(shape.blocks_run):
            is_full = shape.window is None or layer in (shape.full_layers or [])
            x_NC = self.blocks[layer](x_NC, frames if is_full else windows, angles)
            if layer in (shape.deep_layers or []):
                deep.append(x_NC)
        return [x_NC if order is None else x_NC[order.argsort()] for x_NC in (x_NC, *deep)]


def check_grids(shape: TowerShape, grids: Sequence[Grid]) -> None:
    """Check that a tower can encode images of these sizes in patches.

    Raises:
        UserError: with the first size that it cannot.
    """
    for grid in grids:
        _, height, width = grid
        if shape.positions == "learned" and (height, width) != (shape.side, shape.side):
            size = f"{height * shape.patch} x {width * shape.patch}"
            read = f"{shape.image_size} x {shape.image_size}"
            raise UserError(f"image of {size} pixels: the vision tower reads {read}; resize to that")
        if height % shape.merge or width % shape.merge:
            raise UserError(f"grid of {height} x {width} patches: sides must be multiples of {shape.merge}")


def list_places(grids: Sequence[Grid], merge: int) -> Tensor:
    """Row and column of every patch in its image, (N, 2), in the order of patches."""
    parts = []
    for frames, height, width in grids:
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([rows, columns], -1).unflatten(1, (-1, merge)).unflatten(0, (-1, merge))
        parts.append(places.transpose(1, 2).flatten(0, 3).repeat(frames, 1))
    return torch.cat(parts)


def insert_first(x_NX: Tensor, first_X: Tensor, lengths: Sequence[int]) -> Tensor:
    """Segments of these lengths, (N, X) in all, each after a row of its own."""
    return torch.cat([part for segment_NX in x_NX.split(list(lengths)) for part in (first_X[None], segment_NX)])


def insert_class_places(places_N2: Tensor, frames: Sequence[int]) -> Tensor:
    """The places of class tokens, which are 0 and 0, and of the patches after each, from 1 and 1 (Llama 4)."""
    return insert_first(places_N2 + 1, places_N2.new_zeros(2), frames)


def list_image_sizes(grids: Sequence[Grid], device: torch.device) -> Tensor:
    """The height and width, in patches, of the image of every patch, (N, 2)."""
    counts = [frames * height * width for frames, height, width in grids]
    sides = torch.tensor([grid[1:] for grid in grids], device=device)
    return sides.repeat_interleave(torch.tensor(counts, device=device), 0, output_size=sum(counts))


def find_buckets(places_N2: Tensor, grids: Sequence[Grid], side: int) -> Tensor:
    """The nearest row and column in an image of `side` by `side` patches, (N, 2) (Dehghani et al. 2023, NaViT, 2.1)."""
    boundaries = torch.arange(1 / side, 1.0, 1 / side, device=places_N2.device)
    fractions = (places_N2.float() * (1.0 / list_image_sizes(grids, places_N2.device))).clamp(max=1 - 1e-6)
    return torch.bucketize(fractions, boundaries, right=True)


def find_neighbors(places_N2: Tensor, grids: Sequence[Grid], side: int) -> tuple[Tensor, Tensor]:
    """The indices (N, 4) of the places around each patch in an image of `side` by `side`, and their weights (N, 4).

    Both images have the same corners; weights are bilinear and float32.
    """
    exact_N2 = places_N2.float() * (side - 1) / (list_image_sizes(grids, places_N2.device) - 1).clamp(min=1)
    below_N2 = exact_N2.floor()
    near_N22 = torch.stack([below_N2, below_N2 + 1], -1)  # row or column, below or above
    weights_N22 = 1 - (exact_N2[..., None] - near_N22).abs()
    rows, columns = near_N22.long().clamp(max=side - 1).unbind(1)
    indices_N4 = (rows[:, :, None] * side + columns[:, None, :]).flatten(1)
    return indices_N4, (weights_N22[:, 0, :, None] * weights_N22[:, 1, None, :]).flatten(1)


def sample_positions(table_SC: Tensor, places_N2: Tensor, sizes_N2: Tensor) -> Tensor:
    """The embeddings of places (N, C) in images of these sizes, between those of the places of a square image.

    Both images have the same edges; the interpolation is bicubic, in float32.
    """
    side = math.isqrt(len(table_SC))
    table_1CSS = table_SC.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
    points_N2 = (places_N2 + 0.5) / sizes_N2 * 2 - 1  # column and row from -1 to 1, as grid_sample takes them
    points_1N12 = points_N2.flip(-1)[None, :, None]
    sampled = F.grid_sample(table_1CSS, points_1N12, mode="bicubic", padding_mode="border", align_corners=False)
    return sampled[0, :, :, 0].T.to(table_SC.dtype)


def list_frequencies(head_size: int, base: float, kind: str) -> Tensor:
    """The frequencies of rows and of columns, (2, head_size / 4).

    `shared` are base^(-4i / head_size) for both (Wang et al. 2024, Qwen2-VL, section 2.1); `in_turn` are those of
    base^(-2i / head_size) with even i for rows and odd i for columns (Agrawal et al. 2024, Pixtral, section 2.1).
    """
    numbers = head_size // 2 if kind == "shared" else head_size
    frequencies = 1.0 / (base ** (torch.arange(0, numbers, 2, dtype=torch.float32) / numbers))
    return frequencies.expand(2, -1) if kind == "shared" else frequencies.unflatten(0, (-1, 2)).T


def build_grid_angles(places_N2: Tensor, frequencies: Tensor, *, interleave: bool = False) -> tuple[Tensor, Tensor]:
    """Cosine and sine (N, head_size) for `apply_rotary`: of the first half of the pairs by the first of each place.

    Args:
        places_N2: row and column, or column and row.
        frequencies: as of `list_frequencies`.
    """
    radians = (places_N2.float()[..., None] * frequencies).flatten(1)
    return spread_pairs(radians.cos(), radians.sin(), interleave=interleave)


def order_by_windows(grids: Sequence[Grid], merge: int, side: int) -> tuple[Tensor, list[int]]:
    """The indices (N,) of patches window by window, and the lengths of the windows.

    Windows of `side` by `side` merge blocks are cut from the top left of every frame; the last ones are smaller.
    """
    blocks, lengths, first = [], [], 0
    for frames, height, width in grids:
        rows, columns = height // merge, width // merge
        numbers = torch.arange(first, first + frames * rows * columns).view(frames, rows, columns)
        first += frames * rows * columns
        for frame in numbers:
            for band in frame.split(side, 0):
                windows = [window.flatten() for window in band.split(side, 1)]
                blocks += windows
                lengths += [len(window) * merge**2 for window in windows]
    order = torch.cat(blocks)[:, None] * merge**2 + torch.arange(merge**2)
    return order.flatten(), lengths
