"""Samples as a page that needs no network: their text with the trained tokens marked, and their images and videos."""

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from litgpt.data.media.containers import read_first_frame
from litgpt.data.media.errors import MediumError
from litgpt.data.media.pictures import open_picture
from litgpt.data.media.sources import find_source
from litgpt.data.preview import DrawnRow, decode_tokens, describe_medium, describe_row, format_weight, list_runs
from litgpt.data.read.media import Medium
from litgpt.data.render.example import Example
from litgpt.data.tokenizer import Tokenizer
from litgpt.files import write_text

THUMBNAIL_SIDE = 192  # pixels
OPENERS: dict[str, Callable[[Any], Tensor]] = {"image": open_picture, "video": read_first_frame}
"""What reads the image that is shown of a medium, uint8 (3, H, W), by its kind."""


def write_preview_page(path: Path, title: str, rows: Sequence[DrawnRow], tokenizer: Tokenizer) -> None:
    """Write the page of rows that were drawn."""
    from jinja2 import Environment, FileSystemLoader

    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("preview_page.html.j2")
    described = []
    for index, examples in rows:
        name, lengths, trained = describe_row(index, examples)
        sides = [[build_runs(document, tokenizer) for document in example.documents] for example in examples]
        described.append({"name": name, "lengths": lengths, "trained": trained, "samples": sides})
    write_text(path, page.render(title=title, rows=described))


def build_runs(example: Example, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The runs of a sample: text, whether it is trained, and with which factor, or a medium with what describes it."""
    runs = []
    for weight, ids, placed in list_runs(example):
        run: dict[str, Any] = {"is_trained": weight != 0, "factor": format_weight(weight) if weight else ""}
        if placed is None:
            run |= {"text": decode_tokens(ids, tokenizer)}
        else:
            run |= {"text": describe_medium(placed), **build_thumbnail(placed.medium)}
        runs.append(run)
    return runs


def build_thumbnail(medium: Medium) -> dict[str, str]:
    """The data URI of a small image, of a video its first frame, or the problem with it; nothing for a sound."""
    from PIL import Image

    if medium.kind not in OPENERS:
        return {}
    try:
        pixels = OPENERS[medium.kind](find_source(medium))
    except MediumError as error:
        return {"problem": str(error)}
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"thumbnail": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}
