"""`litgpt tokenizer train`: train a tokenizer on text and write its folder."""

from functools import partial

from rich.console import Console
from rich.table import Table

from litgpt.data.read.documents import SkippedRows, list_text_files, open_file_phase, read_documents
from litgpt.data.tokenizer import train_tokenizer
from litgpt.files import check_unused
from litgpt.recipe.data_commands import TokenizerTrain


def run(recipe: TokenizerTrain) -> None:
    """Train the tokenizer and print its statistics on the first document.

    Raises:
        UserError: if the text cannot be read, or the folder exists.
    """
    check_unused(recipe.output_dir)
    read = partial(read_documents, bad_rows=recipe.bad_rows, bad_rows_key="bad_rows")
    files, skipped = list_text_files(recipe.input, "input"), SkippedRows()
    with open_file_phase("reading", sum(file.stat().st_size for file in files)) as wrap_file:
        documents = (text for file in files for text in read(file, skipped=skipped, wrap_file=wrap_file))
        tokenizer = train_tokenizer(documents, recipe.kind, recipe.vocab_size, recipe.output_dir)
    sample = next(read(files[0]))[:100_000]
    tokens = len(tokenizer.encode_batch([sample])[0])
    table = Table("folder", "kind", "tokens", "skipped rows", "characters a token")
    numbers = (f"{tokenizer.vocab_size:,}", f"{skipped.count:,}", f"{len(sample) / tokens:.2f}")
    table.add_row(str(recipe.output_dir), recipe.kind, *numbers)
    Console().print(table)
