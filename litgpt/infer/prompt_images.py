"""The media of a prompt: their places, what identifies their content, and the features that a tower computes of them.

Axes: N patches, P numbers of a patch, T tokens, M places, D width of the decoder.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from litgpt.data.media.reader import AnyReader, read_media
from litgpt.data.render.example import PlacedMedium
from litgpt.data.render.sample_positions import build_sample_positions
from litgpt.errors import UserError
from litgpt.model.feature_order import FeatureOrder
from litgpt.model.gpt import GPT
from litgpt.model.media import Media
from litgpt.model.tower_config import TowerShape


@dataclass(frozen=True, eq=False)
class PromptImage:
    """An image, a video or a sound as the tower reads it.

    Attributes:
        media: its patches, and the size of each picture of it, or its frames and their number.
        places: the tokens of the prompt that its features stand for, ascending.
        key: a negative number, which only one of the same pixels or frames has.
    """

    media: Media
    places: tuple[int, ...]
    key: int


@dataclass(frozen=True, eq=False)
class PromptImages:
    """The images, videos or sounds of one prompt, in order.

    Attributes:
        positions: of time, row and column of its tokens, (3, T); None for a model whose tokens have one position.
    """

    images: tuple[PromptImage, ...]
    positions: Tensor | None = None

    def list_keys(self, ids: Sequence[int]) -> list[int]:
        """What identifies the keys and values of each token: the token, and at the place of an image its key."""
        keys = list(ids)
        for image in self.images:
            for place in image.places:
                keys[place] = image.key
        return keys

    def list_blocks(self, tokens: int) -> list[int]:
        """The number of the image of each token of a prompt, -1 for text."""
        blocks = [-1] * tokens
        for number, image in enumerate(self.images):
            for place in image.places:
                blocks[place] = number
        return blocks

    def find_positions(self, start: int, stop: int) -> Tensor | None:
        """The positions (3, T) of the tokens `start` .. `stop`-1 of the prompt and the text after it."""
        if self.positions is None:
            return None
        prompt_tokens, shift = self.positions.shape[1], int(self.positions.max()) + 1 - self.positions.shape[1]
        after = torch.arange(max(start, prompt_tokens), max(stop, prompt_tokens)) + shift
        return torch.cat([self.positions[:, start:stop], after.expand(3, -1)], 1)


def list_prompt_keys(prompt: Sequence[int], images: PromptImages | None, shape: TowerShape | None) -> list[int]:
    """What identifies the keys and values of each token of a prompt.

    Tokens that attend to the whole prompt have a negative number, which only those of the same prompt have.
    """
    keys = list(prompt) if images is None else images.list_keys(prompt)
    if shape is None or not shape.prompt_blocks:
        return keys
    return [to_key(hashlib.sha256(repr(keys).encode()).digest())] * len(keys)


def list_prompt_blocks(prompt: Sequence[int], images: PromptImages | None, shape: TowerShape | None) -> list[int]:
    """The number of the block of each token of a prompt, as of `find_blocks`; empty if it has none."""
    if shape is None or not shape.has_blocks:
        return []
    if shape.prompt_blocks:
        return [0] * len(prompt)
    return [] if images is None else images.list_blocks(len(prompt))


class PlacedFeatures(NamedTuple):
    """Features (M, D) in place of the embeddings of some tokens, by their numbers, which ascend."""

    places: list[int]
    features_MD: Tensor


class ImageFeatures:
    """Computes the features of the images of one prompt, of each when its first token is processed, and keeps them."""

    def __init__(self, images: Sequence[PromptImage]) -> None:
        self._images = images
        self._features: dict[int, Tensor] = {}

    def find(self, model: GPT, start: int, stop: int) -> PlacedFeatures | None:
        """Those of the tokens `start` .. `stop`-1, by their numbers from `start`; None if no image is there."""
        places: list[int] = []
        features: list[Tensor] = []
        for number, image in enumerate(self._images):
            first, last = (bisect_left(image.places, token) for token in (start, stop))
            if first < last:
                if number not in self._features:
                    self._features[number] = model.encode_media(image.media.to(model.embedding.weight.device))
                places += [place - start for place in image.places[first:last]]
                features.append(self._features[number][first:last])
        if not features:
            return None
        order = sorted(range(len(places)), key=places.__getitem__)  # a video and its sound have places by turns
        return PlacedFeatures([places[number] for number in order], torch.cat(features)[order])


@dataclass(frozen=True)
class Prompt:
    """A prompt that is encoded, whose media are decoded when it is its turn.

    Attributes:
        ids: its tokens, places of media written out.
        media: the images, videos or sounds, with their places.
        reader: of the media; None without any.
    """

    ids: tuple[int, ...]
    media: tuple[PlacedMedium, ...] = ()
    reader: AnyReader | None = None

    def load_images(self) -> PromptImages | None:
        """Decode the media; None without any.

        Raises:
            UserError: if one cannot be decoded.
        """
        if self.reader is None or not self.media:
            return None
        images = list[PromptImage]()
        values = read_media(self.reader, [(each.medium, each.grids) for each in self.media])
        for each in self.media:
            reader = self.reader.find_part(each.medium.kind)
            try:
                patches = next(values)
                order = reader.read_order(each.medium, each.grids, each.tokens)
            except UserError as error:
                raise UserError(f"{each.medium.kind}: {error}") from None
            run, tokens = range(each.start, each.stop), reader.media_tokens
            places = tuple(token for token in run if self.ids[token] in tokens)
            media = replace(reader.pack(patches, each.grids), order=order)
            key = compute_image_key(patches, each.grids, order, seconds=each.seconds)
            images.append(PromptImage(media, places, key))
        shape = self.reader.sections_shape
        positions = None if shape is None else build_sample_positions(shape, self.ids, self.media)
        return PromptImages(tuple(images), positions)


def compute_image_key(
    patches_NP: Tensor,
    grids: Sequence[tuple[int, int, int]],
    order: FeatureOrder | None = None,
    *,
    seconds: float | None = None,
) -> int:
    """A negative number by the SHA-256 of the pixels or frames, sizes, and the features at the places.

    Args:
        seconds: of a video, from one step of its frames to the next, which its positions follow from.
    """
    numbers = None if order is None else order.numbers_MK.tolist()
    digest = hashlib.sha256(repr((tuple(grids), numbers, seconds)).encode())
    digest.update(patches_NP.contiguous().numpy().data)
    return to_key(digest.digest())


def to_key(digest: bytes) -> int:
    """A negative number, which is no token, of a digest."""
    return -1 - int.from_bytes(digest)
