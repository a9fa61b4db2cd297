"""Estimate the floating-point operations of training with images."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn

from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.media import Grid, Media
from litgpt.model.tower_config import TowerShape
from litgpt.model.vision import Tower
from litgpt.model.weight_counts import count_block_weights, count_projector_weights


class EncodedImages(NamedTuple):
    """Sizes of images and videos that a tower encodes, of which its operations are a function.

    Attributes:
        patches: number of patches.
        tokens: patches and class tokens.
        pairs: pairs of tokens that attend to each other, within frames.
        window_pairs: the same within windows.
    """

    patches: float = 0
    tokens: float = 0
    pairs: float = 0
    window_pairs: float = 0


class TowerShares(NamedTuple):
    """The shares of the weights of a tower that are trained.

    Attributes:
        patches, projectors: of the first matrix, and of the projectors.
        blocks: of each block that runs.
        lowest: the first block that the backward pass reaches; the number of blocks if it reaches none.
        projected: whether it reaches the projectors.
    """

    patches: float
    blocks: tuple[float, ...]
    projectors: float
    lowest: int
    projected: bool

    @classmethod
    def measure(cls, model: GPT, factor: float) -> "TowerShares | None":
        """Measure a whole model, which may be on the meta device; None if it has no tower.

        Args:
            factor: of the shares, 0 if what requires gradients was added to the model.
        """
        tower = model.vision
        if tower is None:
            return None
        layers = tower.shape.blocks_run
        trained = [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
        projectors = nn.ModuleList([tower.projector, *tower.deep_projectors])
        return cls(
            factor * compute_trained_share(tower.patches),
            tuple(factor * compute_trained_share(block) for block in tower.blocks[:layers]),
            factor * compute_trained_share(projectors),
            min((find_tower_layer(name, tower) for name in trained), default=layers),
            bool(trained),
        )


def compute_trained_share(module: nn.Module) -> float:
    """The share of the weights of a module's matrices that requires gradients."""
    matrices = [p for name, p in module.named_parameters() if p.dim() > 1 and not name.endswith("bias")]
    return sum(p.numel() for p in matrices if p.requires_grad) / max(1, sum(p.numel() for p in matrices))


def find_tower_layer(name: str, tower: Tower) -> int:
    """The block of a parameter: 0 for what is before the blocks, their number for what is after them."""
    part, _, rest = name.partition(".")
    is_after = part in ("norm_final", "projector", "deep_projectors")
    return int(rest.partition(".")[0]) if part == "blocks" else tower.shape.blocks_run if is_after else 0


def measure_images(config: Config, media: Iterable[Media | None]) -> EncodedImages:
    """The sizes of all images and videos of some batches."""
    if config.vision is None:
        return EncodedImages()
    shape = TowerShape.from_values(config.vision)
    return measure_grids(shape, [grid for each in media if each is not None for grid in each.grids])


def measure_grids(shape: TowerShape, grids: Sequence[Grid]) -> EncodedImages:
    """The sizes of images and videos with these numbers of patches."""
    frames = [(steps, height * width + shape.class_token) for steps, height, width in grids]
    return EncodedImages(
        sum(steps * height * width for steps, height, width in grids),
        sum(steps * tokens for steps, tokens in frames),
        sum(steps * tokens**2 for steps, tokens in frames),
        sum(
            steps * count_window_pairs(shape, height) * count_window_pairs(shape, width)
            for steps, height, width in grids
        ),
    )


def count_window_pairs(shape: TowerShape, patches: int) -> int:
    """Pairs of patches along one side of an image that are in one window; 0 without windows."""
    if shape.window is None:
        return 0
    side = shape.window // shape.merge // shape.patch * shape.merge
    return patches // side * side**2 + (patches % side) ** 2


def compute_tower_flops(config: Config, images: EncodedImages, trained: TowerShares | None) -> float:
    """FLOPs of forward and backward of the tower for some images, counted as in `flops.compute_training_flops`.

    A matrix that reads pixels has no gradient of its input. Attention has 4 * width * keys per token in forward.
    """
    if config.vision is None or trained is None:
        return 0.0
    shape = TowerShape.from_values(config.vision)
    total = 2 * (1 + trained.patches) * images.patches * shape.patch_numbers * shape.width
    for layer, share in enumerate(trained.blocks):
        passes = 2 if layer >= trained.lowest else 1
        is_full = shape.window is None or layer in (shape.full_layers or [])
        total += 2 * (passes + share) * images.tokens * count_block_weights(shape)
        total += 4 * (2 * passes - 1) * shape.width * (images.pairs if is_full else images.window_pairs)
    first, second = count_projector_weights(shape, config.n_embd)
    is_reached = trained.lowest < len(trained.blocks)
    operations = (1 + is_reached + trained.projectors) * first + (1 + trained.projected + trained.projectors) * second
    return total + 2 * operations * images.patches / shape.merge**2
