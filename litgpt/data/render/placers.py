"""What writes the media of a model into a text: places for features, or codes."""

from collections.abc import Callable

from litgpt.data.media.codes import open_code_reader
from litgpt.data.media.reader import AnyReader, JointReader
from litgpt.data.render.code_places import CodePlacer
from litgpt.data.render.feature_places import FeaturePlacer
from litgpt.data.render.joint_places import JointPlacer
from litgpt.data.render.media_places import MediaPlacer
from litgpt.data.render.sound_places import SoundPlacer
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError

PLACERS: dict[str, Callable[..., FeaturePlacer]] = {"image": MediaPlacer, "audio": SoundPlacer}
"""By the first kind of media that a tower reads."""


def open_placer(
    tokenizer: Tokenizer, reader: AnyReader | None, *, null_prompt: float = 0.0
) -> FeaturePlacer | CodePlacer | None:
    """What writes the images of the model in the tokenizer's folder; None for a model of text alone.

    Args:
        reader: of the images whose features the model reads; None if it reads none.
        null_prompt: the share of samples with a prompt without text, which only a model that writes images has.

    Raises:
        UserError: if the codec in the folder is damaged, or there is none and `null_prompt` is set.
    """
    if (codes := open_code_reader(tokenizer)) is not None:
        return CodePlacer(codes)
    if null_prompt:
        raise UserError(
            f"data.null_prompt: {null_prompt} needs a model that writes images; leave it out, or write the model's "
            "folder with `litgpt tokenizer extend`"
        )
    return None if reader is None else build_feature_placer(reader, tokenizer)


def build_feature_placer(reader: AnyReader, tokenizer: Tokenizer) -> FeaturePlacer:
    """What writes the places of media whose features the model reads.

    Raises:
        UserError: if the tokenizer has no token for them.
    """
    if isinstance(reader, JointReader):
        images, sounds = reader.parts
        return JointPlacer(reader, tokenizer, MediaPlacer(images, tokenizer), SoundPlacer(sounds, tokenizer))
    return PLACERS[reader.kinds[0]](reader, tokenizer)
