"""Read images as codes: the codec in a model's folder, and the tokens of its codes in the vocabulary."""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litgpt.data.media.errors import MediumError
from litgpt.data.media.picture_settings import PROCESSOR_FILES, read_processor
from litgpt.data.media.picture_sizes import SIZE_RULES, check_growth
from litgpt.data.media.pictures import crop_middle, get_size, interpolate, open_picture
from litgpt.data.media.sources import find_source
from litgpt.data.read.media import CODES_FOLDER, PNG_URI, Medium
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import read_json_object
from litgpt.model.code_tokens import CodeTokens
from litgpt.model.image_codec import CODEC_CONFIG, Codec, GridShape, load_codec
from litgpt.model.vq_codec import VQCodec
from litgpt.model.vq_files import find_vq_values

if TYPE_CHECKING:
    from PIL.Image import Image


MOST_DIGITS = 18  # of the number of a code


@dataclass(frozen=True)
class CodeNames:
    """How the tokens of images are called.

    Attributes:
        begin, end: around an image.
        code: of the code with a number; its digits are `digits`.
        size: the text after the first one, of the codes in a row; empty for none.
        lead: after that text, before the codes; None for none.
        row_end: after each row; None for none.
        tail: after the codes; None for none.
        digits: of a vocabulary that has codes in any order, the characters that stand for 0 to 9; None for codes in
            their order.
        in_texts: whether a text that a model writes may have codes.
        within: whether the codec is a part of the published model, and so in every folder that is written of it.
    """

    begin: str
    end: str
    code: str
    size: str = ""
    lead: str | None = None
    row_end: str | None = None
    tail: str | None = None
    digits: str | None = None
    in_texts: bool = True
    within: bool = False

    def read_number(self, token: str) -> int | None:
        """The number of the code that a token in other digits is called after; None if it is no code.

        Raises:
            UserError: if the number is longer than that of any code.
        """
        start, _, end = self.code.partition("{}")
        written = token.removeprefix(start).removesuffix(end)
        if token != f"{start}{written}{end}" or not written or set(written) - {*(self.digits or "")}:
            return None
        if len(written) > MOST_DIGITS:
            name = f"{start}{written[:MOST_DIGITS]}...{end}"
            raise UserError(
                f"tokenizer: {name}: {len(written)} digits are too many for a code; use {MOST_DIGITS} at most"
            )
        return int("".join(str((self.digits or "").index(digit)) for digit in written))


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
    CodeNames("<racm3:break>", "<eoss>", "IMGIMG{}Z", digits="ABCDEFGHIJ", in_texts=False, within=True),  # of Chameleon
)
INTERPOLATION_OF_FITS = {"square": "bilinear", "short_side": "lanczos"}
CROPPED: dict[str, Any] = {"do_resize": True, "do_center_crop": True, "resample": 1}
"""What the processor of a codec says if its images are resized by their short side, besides their size."""


@dataclass(frozen=True)
class CodeReader:
    """Reads images as the codes that a model writes them in.

    Attributes:
        begin: the name of the token that begins an image.
    """

    codec: Codec
    tokens: CodeTokens
    begin: str

    def read(self, medium: Medium) -> list[int]:
        """The tokens of an image, with those around it; the image is resized to the codec's size.

        Raises:
            MediumError: if it cannot be decoded, or is too narrow.
        """
        return self.tokens.write(self.encode(open_picture(find_source(medium))))

    def encode(self, pixels_CHW: Tensor) -> list[int]:
        """The codes of an image, uint8 (3, H, W)."""
        # one image at a time, so that the codes do not depend on others in a batch
        codes: list[int] = self.codec.encode(self.resize(pixels_CHW)[None])[0].tolist()
        return codes

    def resize(self, pixels_CHW: Tensor) -> Tensor:
        """An image uint8 (3, H, W) at the codec's size, as it was trained with images."""
        shape, size = self.codec.shape, get_size(pixels_CHW)
        limits = dict.fromkeys(("height", "width", "shortest_edge"), shape.size)
        resized = SIZE_RULES[shape.fit](size, limits, 1)
        try:
            check_growth(size, resized)
        except UserError as error:
            cure = "use one whose long side is shorter"
            raise MediumError("image", "image that is too narrow", str(error).partition(";")[0], cure) from None
        pixels_CHW = interpolate(pixels_CHW, resized, INTERPOLATION_OF_FITS[shape.fit])
        return crop_middle(pixels_CHW, (shape.size, shape.size))

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
        tensors, values = self.codec.to_files()
        digest = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().data)
        return [values, digest.hexdigest()]


def find_code_names(tokenizer: Tokenizer) -> CodeNames | None:
    """What the tokens of images are called in a tokenizer; None if it has none."""
    return next((names for names in CODE_NAMES if tokenizer.find_token(names.begin) is not None), None)


def list_code_ids(tokenizer: Tokenizer, names: CodeNames) -> dict[int, int]:
    """The ids of the codes of a vocabulary that has them in any order, by their numbers."""
    vocabulary = tokenizer.processor.get_vocab() if tokenizer.backend == "huggingface" else {}
    numbers = ((names.read_number(token), number) for token, number in vocabulary.items())
    return {code: number for code, number in numbers if code is not None}


def list_unwritten_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of the codes that a text has none of, if a model does not write them there."""
    names = find_code_names(tokenizer)
    return [] if names is None or names.in_texts else sorted(list_code_ids(tokenizer, names).values())


def find_code_order(tokenizer: Tokenizer, shape: GridShape) -> list[int] | None:
    """The codes in the order of their tokens; None if both are the same.

    Raises:
        UserError: if the tokenizer does not have all codes.
    """
    names = find_code_names(tokenizer) or OWN_NAMES
    if names.digits is None:
        return None
    ids = list_code_ids(tokenizer, names)
    if ids.keys() != {*range(shape.codes)}:
        raise missing_codes_error(tokenizer, shape)
    return sorted(ids, key=ids.__getitem__)


def load_ordered_codec(tokenizer: Tokenizer, folder: Path, *, size: int | None = None) -> Codec:
    """The codec in a folder, whose codes are numbered in the order of their tokens.

    Args:
        size: as of `load_codec`.

    Raises:
        UserError: as `load_codec`, `check_resizing` and `find_code_order`.
    """
    codec = load_codec(folder, size=size)
    check_resizing(folder, codec.shape)
    if isinstance(codec, VQCodec) and not codec.is_reordered:
        order = find_code_order(tokenizer, codec.shape)
        if order is not None:
            codec.reorder_codes(order)
    return codec


def check_resizing(folder: Path, shape: GridShape) -> None:
    """Check that the processor in the folder of a codec, if there is one, resizes images as a `CodeReader` does.

    Images that are resized to squares are so whatever a processor says.

    Raises:
        UserError: if it does not.
    """
    if shape.fit != "short_side" or not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return
    path, values = read_processor(folder, "image_processor", "images")
    sizes = {"size": {"shortest_edge": shape.size}, "crop_size": dict.fromkeys(("height", "width"), shape.size)}
    for key, expected in {**CROPPED, **sizes}.items():
        if values.get(key) not in (None, expected):
            raise UserError(f"{path}: {key}: {values[key]} is not supported by this codec; use {json.dumps(expected)}")


def find_codec_folder(tokenizer: Tokenizer) -> Path | None:
    """The folder with the codec of a model: one in its folder, or this if the codec is a part of the model; or None."""
    if (folder := tokenizer.folder / CODES_FOLDER).is_dir():
        return folder
    names = find_code_names(tokenizer)
    if names is None or not names.within:
        return None
    return tokenizer.folder if find_vq_values(read_json_object(tokenizer.folder / CODEC_CONFIG)) else None


def missing_codes_error(tokenizer: Tokenizer, shape: GridShape) -> UserError:
    """The error for a tokenizer without the tokens of all codes."""
    return UserError(
        f"{tokenizer.folder}: the tokenizer does not have the {shape.codes} tokens of {CODES_FOLDER}; write the "
        "folder with `litgpt tokenizer extend`"
    )


def find_code_range(tokenizer: Tokenizer, names: CodeNames, codes: int) -> tuple[int | None, int | None]:
    """The ids of the first and of the last code; None for one that the tokenizer does not have."""
    if names.digits is not None:
        ids = list_code_ids(tokenizer, names).values()
        return (min(ids), max(ids)) if len(ids) == codes else (None, None)
    first, last = (tokenizer.find_token(names.code.format(code)) for code in (0, codes - 1))
    return first, last


def find_code_tokens(tokenizer: Tokenizer, shape: GridShape) -> CodeTokens:
    """The tokens of the codes of a codec.

    Raises:
        UserError: if the tokenizer does not have them one after the other.
    """
    names = find_code_names(tokenizer) or OWN_NAMES
    around = {name: tokenizer.find_token(getattr(names, name)) for name in ("begin", "end")}
    other = {name: getattr(names, name) for name in ("lead", "row_end", "tail")}
    others = {name: None if text is None else tokenizer.find_token(text) for name, text in other.items()}
    first, last = find_code_range(tokenizer, names, shape.codes)
    is_missing = None in (*around.values(), first) or any(
        others[name] is None for name, text in other.items() if text is not None
    )
    if is_missing or first is None or last != first + shape.codes - 1:
        raise missing_codes_error(tokenizer, shape)
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
    if (folder := find_codec_folder(tokenizer)) is None:
        return None
    codec, names = load_ordered_codec(tokenizer, folder), find_code_names(tokenizer) or OWN_NAMES
    return CodeReader(codec, find_code_tokens(tokenizer, codec.shape), names.begin)
