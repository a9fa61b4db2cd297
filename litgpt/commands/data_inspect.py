"""`litgpt data inspect`: show samples of the data of a run."""

import random
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from litgpt.data.preview import open_streams, print_counts, print_rows
from litgpt.data.preview_page import write_preview_page
from litgpt.data.stream.batches import TrainStream, ValStream
from litgpt.data.stream.samples import SampleRows
from litgpt.data.stream.streaming import StreamedRows
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.messages import print_message
from litgpt.recipe.data import Stream
from litgpt.recipe.data_commands import DataInspect


def draw_samples(stream: Stream, number: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw samples as (T,) tokens and (T,) document numbers; without random access, the first ones of the stream."""
    if isinstance(stream, TrainStream | ValStream):
        samples: Any = stream.samples
        chosen = random.Random(seed).sample(range(samples.count), min(number, samples.count))
        return [
            (windows.read_window(index)[0][:-1], windows.number_documents(index))
            for windows, index in map(samples.locate, chosen)
        ]
    rows_of_ids = [batch.ids[0].numpy() for batch, _ in zip(stream, range(number), strict=False)]
    return [(ids, np.zeros(len(ids), np.int32)) for ids in rows_of_ids]


def render_tokens(ids: np.ndarray, documents: np.ndarray, tokenizer: Tokenizer | None) -> Text:
    """Format a sample's text, with a line between documents."""
    text = Text()
    for number in np.unique(documents):
        part = ids[documents == number].tolist()
        if number:
            text.append(f"\n──── document {number + 1} ────\n", style="bold yellow")
        text.append(" ".join(map(str, part)) if tokenizer is None else tokenizer.decode(part))
    return text


def run(recipe: DataInspect) -> None:
    """Print counts, and some samples with their documents separated.

    Raises:
        UserError: if the data has no validation split and the recipe asks for it, or no samples for a page.
    """
    tokenizer = Tokenizer(recipe.tokenizer_dir) if recipe.tokenizer_dir else None
    print_message(*(tokenizer.warnings if tokenizer else ()))
    train, val = open_streams(recipe.data, tokenizer, recipe.max_seq_length)
    stream = train if recipe.split == "train" else val
    if stream is None:
        raise UserError(f"split: val: data: {type(recipe.data).__name__} has no validation data; use split: train")
    print_counts(recipe.data, train, val, recipe.max_seq_length)
    if tokenizer is not None and isinstance(rows := getattr(stream, "samples", None), SampleRows | StreamedRows):
        chosen = rows.draw_rows(recipe.samples, random.Random(recipe.seed))
        print_rows(rows, chosen, tokenizer)
        if recipe.page_file is not None:
            write_preview_page(recipe.page_file, f"{type(recipe.data).__name__}, {recipe.split}", chosen, tokenizer)
            print(f"page: {recipe.page_file}")
        stream.close()
        return
    if recipe.page_file is not None:
        raise UserError(
            f"page_file: {recipe.page_file} is not supported for {type(recipe.data).__name__}; leave it out"
        )
    table = Table("sample", "tokens", "documents", "different tokens", "text", show_lines=True)
    for number, (ids, documents) in enumerate(draw_samples(stream, recipe.samples, recipe.seed), 1):
        lengths = ", ".join(map(str, np.bincount(documents)))
        table.add_row(
            str(number), str(len(ids)), lengths, str(len(np.unique(ids))), render_tokens(ids, documents, tokenizer)
        )
    Console().print(table)
    stream.close()
