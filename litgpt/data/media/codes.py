"""Read images as codes: the codec in a model's folder, and the tokens of its codes in the vocabulary."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litgpt.data.media.pictures import interpolate, open_picture
from litgpt.data.media.reader import find_source
from litgpt.data.read.media import CODES_FOLDER, PNG_URI, Medium
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import sha256
from litgpt.model.code_tokens import CodeTokens
from litgpt.model.image_codec import CODEC_CONFIG, CODEC_WEIGHTS, Codec, GridShape, load_codec

if TYPE_CHECKING:
    from PIL.Image import Image

BEGIN_IMAGE, END_IMAGE, IMAGE_CODE = "<|image_codes|>", "<|end_image_codes|>", "<|image_code_{}|>"
"""The tokens around the codes of an image, and a code."""


@dataclass(frozen=True)
class CodeReader:
    """Reads images as the codes that a model writes them in.

    Attributes:
        folder: of the codec.
    """

    folder: Path
    codec: Codec
    tokens: CodeTokens

    def read(self, medium: Medium) -> list[int]:
        """The tokens of an image, with those around it; the image is resized to the codec's size.

        Raises:
            UserError: if it cannot be decoded.
        """
        return self.tokens.write(self.encode(open_picture(find_source(medium))))

    def encode(self, pixels_CHW: Tensor) -> list[int]:
        """The codes of an image, uint8 (3, H, W)."""
        size = self.codec.shape.size
        # one image at a time, so that the codes do not depend on others in a batch
        codes: list[int] = self.codec.encode(interpolate(pixels_CHW, (size, size), "bilinear")[None])[0].tolist()
        return codes

    def decode(self, codes: Sequence[int]) -> Tensor:
        """The image of codes, uint8 (3, size, size)."""
        return self.codec.decode(torch.tensor([list(codes)]))[0]

    def draw(self, codes: Sequence[int]) -> "Image":
        """The image of codes, as Pillow has it."""
        from PIL import Image

        return Image.fromarray(self.decode(codes).permute(1, 2, 0).numpy())

    def draw_as_uri(self, codes: Sequence[int]) -> str:
        """The image of codes as a data URI of a PNG file."""
        buffer = BytesIO()
        self.draw(codes).save(buffer, "PNG")
        return PNG_URI + base64.b64encode(buffer.getvalue()).decode()

    def fingerprint_parts(self) -> list[Any]:
        """Everything that the tokens of an image depend on, as JSON values."""
        return [sha256(self.folder / name) for name in (CODEC_CONFIG, CODEC_WEIGHTS)]


def find_code_tokens(tokenizer: Tokenizer, shape: GridShape) -> CodeTokens:
    """The tokens of the codes of a codec.

    Raises:
        UserError: if the tokenizer does not have them one after the other.
    """
    names = (BEGIN_IMAGE, END_IMAGE, IMAGE_CODE.format(0), IMAGE_CODE.format(shape.codes - 1))
    begin, end, first, last = map(tokenizer.find_token, names)
    if begin is None or end is None or first is None or last != first + shape.codes - 1:
        raise UserError(
            f"{tokenizer.folder}: the tokenizer does not have the {shape.codes} tokens of {CODES_FOLDER}; write the "
            "folder with `litgpt tokenizer extend`"
        )
    return CodeTokens(begin, end, first, shape.codes, shape.places)


def open_code_reader(tokenizer: Tokenizer) -> CodeReader | None:
    """The reader of images as codes of a model's folder; None for a model that writes no images.

    Raises:
        UserError: if the codec is damaged, or does not match the tokenizer.
    """
    folder = tokenizer.folder / CODES_FOLDER
    if not folder.is_dir():
        return None
    codec = load_codec(folder)
    return CodeReader(folder, codec, find_code_tokens(tokenizer, codec.shape))
