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
from litgpt.data.media.sources import find_source
from litgpt.data.read.media import CODES_FOLDER, PNG_URI, Medium
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import sha256
from litgpt.model.code_tokens import CodeTokens
from litgpt.model.image_codec import CODEC_CONFIG, CODEC_WEIGHTS, Codec, GridShape, load_codec

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class CodeNames:
    """How the tokens of images are called.

    Attributes:
        begin, end: around an image.
        code: of the code with a number.
        size: the text after the first one, of the codes in a row; empty for none.
        lead: after that text, before the codes; None for none.
        row_end: after each row; None for none.
        tail: after the codes; None for none.
    """

    begin: str
    end: str
    code: str
    size: str = ""
    lead: str | None = None
    row_end: str | None = None
    tail: str | None = None


OWN_NAMES = CodeNames("<|image_codes|>", "<|end_image_codes|>", "<|image_code_{}|>")
"""Of the tokens that `litgpt tokenizer extend` adds."""
CODE_NAMES = (
    OWN_NAMES,
    CodeNames(  # of Emu3
        "<|image start|>",
        "<|image end|>",
        "<|visual token {:06d}|>",
        size="{side}*{side}",
        lead="<|image token|>",
        row_end="<|extra_200|>",
        tail="<|extra_201|>",
    ),
)


@dataclass(frozen=True)
class CodeReader:
    """Reads images as the codes that a model writes them in.

    Attributes:
        folder: of the codec.
        begin: the name of the token that begins an image.
    """

    folder: Path
    codec: Codec
    tokens: CodeTokens
    begin: str

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


def find_code_names(tokenizer: Tokenizer) -> CodeNames | None:
    """What the tokens of images are called in a tokenizer; None if it has none."""
    return next((names for names in CODE_NAMES if tokenizer.find_token(names.begin) is not None), None)


def find_code_tokens(tokenizer: Tokenizer, shape: GridShape) -> CodeTokens:
    """The tokens of the codes of a codec.

    Raises:
        UserError: if the tokenizer does not have them one after the other.
    """
    names = find_code_names(tokenizer) or OWN_NAMES
    around = {name: tokenizer.find_token(getattr(names, name)) for name in ("begin", "end")}
    other = {name: getattr(names, name) for name in ("lead", "row_end", "tail")}
    others = {name: None if text is None else tokenizer.find_token(text) for name, text in other.items()}
    first, last = (tokenizer.find_token(names.code.format(code)) for code in (0, shape.codes - 1))
    is_missing = None in (*around.values(), first) or any(
        others[name] is None for name, text in other.items() if text is not None
    )
    if is_missing or first is None or last != first + shape.codes - 1:
        raise UserError(
            f"{tokenizer.folder}: the tokenizer does not have the {shape.codes} tokens of {CODES_FOLDER}; write the "
            "folder with `litgpt tokenizer extend`"
        )
    size = names.size.format(side=shape.side)
    sizes = tokenizer.processor.encode(size, add_special_tokens=False).ids if size else []
    lead, tail = ([] if others[name] is None else [others[name]] for name in ("lead", "tail"))
    ids: dict[str, Any] = {**around, "lead": (*sizes, *lead), "row_end": others["row_end"], "tail": tuple(tail)}
    return CodeTokens(first=first, codes=shape.codes, places=shape.places, **ids)


def open_code_reader(tokenizer: Tokenizer) -> CodeReader | None:
    """The reader of images as codes of a model's folder; None for a model that writes no images.

    Raises:
        UserError: if the codec is damaged, or does not match the tokenizer.
    """
    folder = tokenizer.folder / CODES_FOLDER
    if not folder.is_dir():
        return None
    codec, names = load_codec(folder), find_code_names(tokenizer) or OWN_NAMES
    return CodeReader(folder, codec, find_code_tokens(tokenizer, codec.shape), names.begin)
