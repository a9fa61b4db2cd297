"""The tokens that stand for media in a text of a model with two towers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from litgpt.data.media.reader import AnyReader
from litgpt.data.media.sound_reader import SoundPlan
from litgpt.data.media.sound_tracks import get_track
from litgpt.data.media.videos import VideoPlan
from litgpt.data.read.conversation import Conversation
from litgpt.data.read.media import Medium
from litgpt.data.render.example import PlacedMedium
from litgpt.data.render.feature_places import FeaturePlacer, KindTexts
from litgpt.data.render.media_places import MediaPlacer
from litgpt.data.render.sound_places import SoundPlacer
from litgpt.data.render.track_places import interleave
from litgpt.data.tokenizer import Tokenizer
from litgpt.model.media import Grid


@dataclass(frozen=True)
class TrackedVideoPlan:
    """What the towers read of a video and of its sound track."""

    video: VideoPlan
    sound: SoundPlan


class JointPlacer(FeaturePlacer):
    """Writes out the places of media, those of each kind as a model with its tower alone.

    Args:
        images: writes those of images and videos, and the texts of objects.
        sounds: writes those of sounds.
    """

    def __init__(self, reader: AnyReader, tokenizer: Tokenizer, images: MediaPlacer, sounds: SoundPlacer) -> None:
        self.images, self.sounds = images, sounds
        super().__init__(reader, tokenizer)

    def write_marks(self, conversation: Conversation) -> Conversation:
        """As `MediaPlacer.write_marks`."""
        return self.images.write_marks(conversation)

    def _build_texts(self, kind: str) -> KindTexts | None:
        return {**self.images.kinds, **self.sounds.kinds}.get(kind)

    def _plan_medium(self, medium: Medium, media: Sequence[Medium]) -> Any:
        plan = self._find_placer(medium)._plan_medium(medium, media)
        return TrackedVideoPlan(plan, self.sounds.reader.plan(get_track(medium))) if medium.has_track else plan

    def _build_run(self, medium: Medium, plan: Any, grids: Sequence[Grid]) -> list[int]:
        return self._find_placer(medium)._build_run(medium, plan, grids)

    def _write_run(self, medium: Medium, plan: Any) -> tuple[list[int], list[PlacedMedium]]:
        """The tokens of a medium; those of a video with its sound are both by turns, between the tokens of a sound."""
        if not medium.has_track:
            return super()._write_run(medium, plan)
        frames, (video,) = super()._write_run(medium, plan.video)
        track, (sound,) = super()._write_run(get_track(medium), plan.sound)
        speed, chunk = self.images.shape.tokens_per_second or 1.0, self.images.shape.chunk_seconds
        start, end = self.sounds.shape.start_token, self.sounds.shape.end_token
        assert chunk is not None and start is not None and end is not None  # of a model that hears videos
        of_step = len(frames) // len(plan.video.times)
        times = [number // of_step * plan.video.seconds * speed for number in range(len(frames))]
        run = [start, *interleave(frames, track, times, int(speed * chunk)), end]
        return run, [replace(each, tokens=len(run)) for each in (video, sound)]

    def _find_placer(self, medium: Medium) -> FeaturePlacer:
        return self.images if medium.kind in self.images.kinds else self.sounds
