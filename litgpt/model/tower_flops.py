"""Estimate the floating-point operations of training with images and sounds."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn

from litgpt.model.audio import KERNEL, AudioTower
from litgpt.model.audio_config import AudioShape
from litgpt.model.config import Config
from litgpt.model.media import Grid, Media
from litgpt.model.tower_config import TowerShape
from litgpt.model.vision import Tower
from litgpt.model.weight_counts import count_block_weights, count_projector_weights


class EncodedMedia(NamedTuple):
    """Sizes of images, videos and sounds that towers encode, of which their operations are a function.

    Attributes:
        patches: number of patches.
        tokens: patches and class tokens.
        pairs: pairs of tokens that attend to each other, within frames.
        window_pairs: the same within windows.
        frames: frames of sounds, with those after the end that the convolutions reach.
        places: places of sounds.
        place_pairs: pairs of places that attend to each other.
        features: features of sounds.
    """

    patches: float = 0
    tokens: float = 0
    pairs: float = 0
    window_pairs: float = 0
    frames: float = 0
    places: float = 0
    place_pairs: float = 0
    features: float = 0

    def list_idle_towers(self) -> list[str]:
        """The towers that encode nothing, `vision` or `audio` or both."""
        return [name for name, size in (("vision", self.patches), ("audio", self.frames)) if not size]


class TowerShares(NamedTuple):
    """The shares of the weights of a tower that are trained.

    Attributes:
        first, projectors: of the first matrix or the convolutions, and of the projectors.
        blocks: of each block that runs.
        lowest: the first block that the backward pass reaches; the number of blocks if it reaches none.
        projected: whether it reaches the projectors.
    """

    first: float
    blocks: tuple[float, ...]
    projectors: float
    lowest: int
    projected: bool

    @classmethod
    def measure(cls, tower: Tower | AudioTower | None, factor: float) -> "TowerShares | None":
        """Measure a tower, which may be on the meta device; None for none.

        Args:
            factor: of the shares, 0 if what requires gradients was added to the model.
        """
        if tower is None:
            return None
        layers = tower.shape.blocks_run
        trained = [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
        if isinstance(tower, Tower):
            projectors, first = nn.ModuleList([tower.projector, *tower.deep_projectors]), nn.ModuleList([tower.patches])
        else:
            projectors, first = nn.ModuleList([tower.projector]), nn.ModuleList([tower.conv_1, tower.conv_2])
        return cls(
            factor * compute_trained_share(first),
            tuple(factor * compute_trained_share(block) for block in tower.blocks[:layers]),
            factor * compute_trained_share(projectors),
            min((find_tower_layer(name, tower) for name in trained), default=layers),
            bool(trained),
        )


def compute_trained_share(module: nn.Module) -> float:
    """The share of the weights of a module's matrices that requires gradients."""
    matrices = [p for name, p in module.named_parameters() if p.dim() > 1 and not name.endswith("bias")]
    return sum(p.numel() for p in matrices if p.requires_grad) / max(1, sum(p.numel() for p in matrices))


def find_tower_layer(name: str, tower: Tower | AudioTower) -> int:
    """The block of a parameter: 0 for what is before the blocks, their number for what is after them."""
    part, _, rest = name.partition(".")
    is_after = part in ("norm_final", "projector", "deep_projectors")
    return int(rest.partition(".")[0]) if part == "blocks" else tower.shape.blocks_run if is_after else 0


def measure_media(config: Config, media: Iterable[Media | None]) -> EncodedMedia:
    """The sizes of all images, videos and sounds of some batches."""
    given = [each for each in media if each is not None]
    sizes = EncodedMedia()
    if config.vision is not None:
        shape = TowerShape.from_values(config.vision)
        sizes = measure_grids(shape, [grid for each in given for grid in each.grids])
    if config.audio is not None:
        lengths = [length for each in given if each.sounds is not None for length in each.sounds.lengths]
        sizes = measure_sounds(AudioShape.from_values(config.audio), lengths, sizes)
    return sizes


def measure_sounds(shape: AudioShape, lengths: Sequence[int], sizes: EncodedMedia) -> EncodedMedia:
    """The sizes with those of sounds of these numbers of frames."""
    places = [shape.count_places(chunk) for length in lengths for chunk in shape.list_chunks(length)]
    return sizes._replace(
        frames=sum(map(shape.count_read_frames, lengths)),
        places=sum(places),
        place_pairs=sum(count**2 for count in places),
        features=sum(map(shape.count_features, lengths)),
    )


def measure_grids(shape: TowerShape, grids: Sequence[Grid]) -> EncodedMedia:
    """The sizes of images and videos with these numbers of patches."""
    frames = [(steps, height * width + shape.class_token) for steps, height, width in grids]
    return EncodedMedia(
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


def compute_media_flops(
    config: Config, media: EncodedMedia, vision: TowerShares | None, audio: TowerShares | None
) -> float:
    """FLOPs of forward and backward of the towers, counted as in `flops.compute_training_flops`."""
    return compute_vision_flops(config, media, vision) + compute_audio_flops(config, media, audio)


def compute_audio_flops(config: Config, sounds: EncodedMedia, trained: TowerShares | None) -> float:
    """FLOPs of forward and backward of the audio tower.

    The first convolution has no gradient of its input. Attention has 4 * width * keys per place in forward.
    """
    if config.audio is None or trained is None:
        return 0.0
    shape, layers = AudioShape.from_values(config.audio), len(trained.blocks)
    total = 2 * KERNEL * (1 + trained.first) * sounds.frames * shape.mels * shape.width
    total += KERNEL * (1 + 2 * trained.first) * sounds.frames * shape.width**2  # the second one, at half of the frames
    for layer, share in enumerate(trained.blocks):
        passes = 2 if layer >= trained.lowest else 1
        total += 2 * (passes + share) * sounds.places * count_block_weights(shape)
        total += 4 * (2 * passes - 1) * shape.width * sounds.place_pairs
    operations = 1 + (trained.lowest < layers) + trained.projectors
    return total + 2 * operations * sounds.features * shape.width * config.n_embd


def compute_vision_flops(config: Config, images: EncodedMedia, trained: TowerShares | None) -> float:
    """FLOPs of forward and backward of the vision tower for some images.

    A matrix that reads pixels has no gradient of its input. Attention has 4 * width * keys per token in forward.
    """
    if config.vision is None or trained is None:
        return 0.0
    shape = TowerShape.from_values(config.vision)
    total = 2 * (1 + trained.first) * images.patches * shape.patch_numbers * shape.width
    for layer, share in enumerate(trained.blocks):
        passes = 2 if layer >= trained.lowest else 1
        is_full = shape.window is None or layer in (shape.full_layers or [])
        total += 2 * (passes + share) * images.tokens * count_block_weights(shape)
        total += 4 * (2 * passes - 1) * shape.width * (images.pairs if is_full else images.window_pairs)
    first, second = count_projector_weights(shape, config.n_embd)
    is_reached = trained.lowest < len(trained.blocks)
    operations = (1 + is_reached + trained.projectors) * first + (1 + trained.projected + trained.projectors) * second
    return total + 2 * operations * images.patches / shape.merge**2
