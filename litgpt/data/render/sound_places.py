"""The tokens that stand for a sound in a text: one place for each feature of the tower."""

from collections.abc import Sequence

from litgpt.data.media.sound_reader import SoundPlan, SoundReader
from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import Medium
from litgpt.data.render.feature_places import FeaturePlacer, KindTexts
from litgpt.data.tokenizer import Tokenizer
from litgpt.model.media import Grid


class SoundPlacer(FeaturePlacer):
    """Writes out the places of sounds."""

    def __init__(self, reader: SoundReader, tokenizer: Tokenizer) -> None:
        self.reader, self.shape = reader, reader.shape
        super().__init__(reader, tokenizer)

    def write_marks(self, conversation: Conversation) -> Conversation:
        """The conversation as it is: marks of sounds are for the chat template.

        Raises:
            BadRow: if it has boxes.
        """
        if conversation.objects is not None:
            raise BadRow("boxes are not supported", "by a model that hears")
        return conversation

    def _build_texts(self, _kind: str) -> KindTexts | None:
        name = self.tokenizer.processor.id_to_token(self.shape.audio_token)
        if name is None:
            return None
        return KindTexts(self.shape.audio_token, name, name, name, self.shape.text.format(audio=name))

    def _build_run(self, _medium: Medium, plan: SoundPlan, _grids: Sequence[Grid]) -> list[int]:
        return [self.shape.audio_token] * self.shape.count_features(plan.frames)
