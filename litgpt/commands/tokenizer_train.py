"""`litgpt tokenizer train`: train a tokenizer on text or images, and write its folder."""

import math
from functools import partial
from typing import Literal

from rich.console import Console
from rich.table import Table

from litgpt.data.read.documents import SkippedRows, list_text_files, open_file_phase, read_documents
from litgpt.data.tokenizer import train_tokenizer
from litgpt.errors import UserError
from litgpt.files import check_unused
from litgpt.recipe.data_commands import TokenizerTrain
from litgpt.train.image_codec import write_codec


def run(recipe: TokenizerTrain) -> None:
    """Train the tokenizer and print its statistics.

    Raises:
        UserError: if the input cannot be read, or the folder exists.
    """
    check_unused(recipe.output_dir)
    Console().print(train_on_images(recipe) if recipe.kind == "vq" else train_on_text(recipe, recipe.kind))


def train_on_text(recipe: TokenizerTrain, kind: Literal["bpe", "bytes"]) -> Table:
    """Train a tokenizer on text; its statistics on the first document."""
    read = partial(read_documents, bad_rows=recipe.bad_rows, bad_rows_key="bad_rows")
    files, skipped = list_text_files(recipe.input, "input"), SkippedRows()
    with open_file_phase("reading", sum(file.stat().st_size for file in files)) as wrap_file:
        documents = (text for file in files for text in read(file, skipped=skipped, wrap_file=wrap_file))
        tokenizer = train_tokenizer(documents, kind, recipe.vocab_size, recipe.output_dir)
    sample = next(read(files[0]))[:100_000]
    tokens = len(tokenizer.encode_batch([sample])[0])
    table = Table("folder", "kind", "tokens", "skipped rows", "characters a token")
    numbers = (f"{tokenizer.vocab_size:,}", f"{skipped.count:,}", f"{len(sample) / tokens:.2f}")
    table.add_row(str(recipe.output_dir), kind, *numbers)
    return table


def train_on_images(recipe: TokenizerTrain) -> Table:
    """Train image codes; their statistics on the images that are held out."""
    if not recipe.input.is_dir():
        raise UserError(f"input: {recipe.input} is not a folder; set a folder of images for kind: vq")
    scores = write_codec(recipe.input, recipe.output_dir, recipe.codec, skip_bad=recipe.bad_rows == "skip")
    size = recipe.codec.size // recipe.codec.patch
    table = Table("folder", "images", "held out", "skipped", "codes an image", "codes used", "error of 255", "PSNR")
    numbers = (f"{number:,}" for number in (scores.images, scores.held_out, scores.skipped))
    used = f"{scores.codes_used:,} of {math.prod(recipe.codec.levels):,}"
    quality = (f"{scores.error:.2f}", f"{scores.psnr:.1f} dB")
    table.add_row(str(recipe.output_dir), *numbers, f"{size} x {size}", used, *quality)
    return table
