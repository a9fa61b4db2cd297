"""The tokens that stand for media in a text of a model with two towers."""

from collections.abc import Sequence
from typing import Any

from litgpt.data.media.reader import AnyReader
from litgpt.data.read.conversation import Conversation
from litgpt.data.read.media import Medium
from litgpt.data.render.feature_places import FeaturePlacer, KindTexts
from litgpt.data.tokenizer import Tokenizer
from litgpt.model.media import Grid


class JointPlacer(FeaturePlacer):
    """Writes out the places of media, those of each kind as a model with its tower alone.

    Args:
        images: writes those of images and videos, and the texts of objects.
        sounds: writes those of sounds.
    """

    def __init__(self, reader: AnyReader, tokenizer: Tokenizer, images: FeaturePlacer, sounds: FeaturePlacer) -> None:
        self.images, self.sounds = images, sounds
        super().__init__(reader, tokenizer)

    def write_marks(self, conversation: Conversation) -> Conversation:
        """As `MediaPlacer.write_marks`."""
        return self.images.write_marks(conversation)

    def _build_texts(self, kind: str) -> KindTexts | None:
        return {**self.images.kinds, **self.sounds.kinds}.get(kind)

    def _plan_medium(self, medium: Medium, media: Sequence[Medium]) -> Any:
        return self._find_placer(medium)._plan_medium(medium, media)

    def _build_run(self, medium: Medium, plan: Any, grids: Sequence[Grid]) -> list[int]:
        return self._find_placer(medium)._build_run(medium, plan, grids)

    def _find_placer(self, medium: Medium) -> FeaturePlacer:
        return self.images if medium.kind in self.images.kinds else self.sounds
