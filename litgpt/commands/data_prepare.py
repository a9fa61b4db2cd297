"""`litgpt data prepare`: download, tokenize and count the data of a run in advance."""

from pathlib import Path

from litgpt.data.modules.finetuning import FinetuningData
from litgpt.data.preview import list_windows, open_streams, print_counts
from litgpt.data.tokenizer import Tokenizer
from litgpt.files import verify_manifest
from litgpt.messages import print_message
from litgpt.recipe.data_commands import DataPrepare


def run(recipe: DataPrepare) -> None:
    """Prepare the data, verify the hashes of the files on disk, and print the counts.

    Raises:
        UserError: if the data cannot be read, or token shards are damaged.
    """
    tokenizer = Tokenizer(recipe.tokenizer_dir) if recipe.tokenizer_dir else None
    print_message(*(tokenizer.warnings if tokenizer else ()))
    train, val = open_streams(recipe.data, tokenizer, recipe.max_seq_length)
    folders = [getattr(windows.tokens, "folder", Path()) for windows in [*list_windows(train), *list_windows(val)]]
    if isinstance(recipe.data, FinetuningData):
        folders += [examples.folder for _, examples in recipe.data.prepared]
    for folder in folders:
        if (folder / "manifest.json").is_file():
            verify_manifest(folder)
    print_counts(recipe.data, train, val, recipe.max_seq_length)
