"""Data modules of text, which is tokenized to token shards once and read in windows."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from litgpt.data import cache, stream
from litgpt.data.read.documents import BadRows, Corpus, SkippedRows, fingerprint_files, list_text_files, read_documents
from litgpt.data.read.python_docs import write_python_docs
from litgpt.errors import UserError
from litgpt.messages import print_message
from litgpt.recipe.bounds import Position, Seed, check_numbers
from litgpt.recipe.data import BatchShape, DataModule, Stream


class TokenizedText(DataModule):
    """Base of data modules that tokenize text to token shards and stream windows of them."""

    seed: int
    num_workers: int
    document_mask: bool
    shuffle: bool = True
    data_path: str | Path
    output_key: ClassVar[str] = "data.data_path"

    # set during a run; untyped, because the types of settings are resolved and these need torch
    tokenizer: Any = None
    train_tokens: Any = None
    val_tokens: Any = None

    def __post_init__(self) -> None:
        check_numbers(self, "data.")

    def connect(self, tokenizer: Any = None, *_args: Any, **_kwargs: Any) -> None:
        """Set the tokenizer; batch size and sequence length are part of a stream's shape."""
        self.tokenizer = tokenizer

    def build_corpora(self) -> tuple[Corpus, Corpus]:
        """Return the training and the validation text."""
        raise UserError(f"data: {type(self).__name__} has no text")

    def cache_folder(self) -> Path:
        """The folder of the token shards."""
        return Path(self.data_path)

    def list_outputs(self) -> dict[str, Path]:
        """The folder of the token shards, by the key that sets it."""
        return {self.output_key: self.cache_folder()}

    def check_files(self, *, has_tokenizer: bool) -> None:
        """Check that there is a tokenizer for the text."""
        if not has_tokenizer:
            raise UserError(
                f"tokenizer_dir: missing, but data: {type(self).__name__} is text; set it to the folder of a "
                "tokenizer, such as one that `litgpt tokenizer train` writes"
            )

    def prepare_data(self) -> None:
        """Download and tokenize the text, unless that was done before."""
        self.check_files(has_tokenizer=self.tokenizer is not None)
        try:
            train, val = self.build_corpora()
        except OSError as error:
            raise UserError(f"data: {error.filename}: {error.strerror}; fix that, or use another path") from None
        prepare_tokens = cache.token_shards.prepare_tokens
        self.train_tokens = prepare_tokens(train, self.tokenizer, self.cache_folder())
        self.val_tokens = prepare_tokens(val, self.tokenizer, self.cache_folder())

    def setup(self, *_args: Any, **_kwargs: Any) -> None:
        """Open the token shards."""
        if self.train_tokens is None:
            self.prepare_data()

    def training_documents(self) -> Iterable[str]:
        """Iterate over the documents of the training text."""
        return self.build_corpora()[0].documents(lambda file: file, SkippedRows())

    def train_stream(self, shape: BatchShape) -> Stream:
        """Stream windows of the training text, endlessly."""
        assert self.train_tokens is not None, "setup comes first"
        return stream.batches.TrainStream(self._cut_windows(self.train_tokens, shape), shape, workers=self.num_workers)

    def val_stream(self, shape: BatchShape) -> Stream | None:
        """Stream one pass over windows of the validation text; None if it is shorter than one window."""
        if self.val_tokens is None:
            return None
        if self.val_tokens.total <= shape.max_seq_length:
            print_message(
                f"no validation: its {self.val_tokens.total} tokens do not fill one window; add text or set "
                f"train.max_seq_length below {self.val_tokens.total}",
            )
            return None
        return stream.batches.ValStream(self._cut_windows(self.val_tokens, shape), shape)

    def _cut_windows(self, tokens: Any, shape: BatchShape) -> Any:
        return stream.windows.Windows(
            tokens, shape.max_seq_length, self.seed if self.shuffle else None, self.document_mask
        )

    def _build_corpus(self, name: str, files: list[Path], bad_rows: BadRows = "stop") -> Corpus:
        """Build a corpus of text files; documents start with the bos token, if there is one."""
        return Corpus(
            name=name,
            sources=fingerprint_files(files, self.cache_folder() / "hashes.json"),
            documents=lambda wrap_file, skipped: chain.from_iterable(
                read_documents(
                    file, bad_rows=bad_rows, bad_rows_key="data.bad_rows", skipped=skipped, wrap_file=wrap_file
                )
                for file in files
            ),
            bos=self.tokenizer is not None and self.tokenizer.bos_id is not None,
            bad_rows=bad_rows,
        )


@dataclass
class TextFiles(TokenizedText):
    """Text files of your own.

    On disk: a folder of .txt files, one document each, or .jsonl files, one document per line in its `text`; also .gz
    and .zst of both. Each document is encoded as the tokenizer's bos token, if it has one, and its tokens.
    """

    output_key: ClassVar[str] = "data.cache_dir"

    train_data_path: Path
    """Folder of the training text."""
    val_data_path: Path | None = None
    """Folder (or one file) of the validation text; null uses the first training file, by name."""
    seed: Seed = 42
    """Seed of the sample order."""
    shuffle: bool = True
    """Read the samples in a new order in every epoch; false is the order of the files and of their text."""
    num_workers: Position = 4
    """Number of processes that prefetch; the batches do not depend on it."""
    document_mask: bool = False
    """Confine attention to documents."""
    cache_dir: Path | None = None
    """Folder of the token shards; null for .litgpt-tokens in train_data_path."""
    bad_rows: BadRows = "stop"
    """For rows that are not UTF-8, not JSON or have no text: stop, or skip and count them."""

    def cache_folder(self) -> Path:
        """The folder of the token shards."""
        folder = self.train_data_path if self.train_data_path.is_dir() else self.train_data_path.parent
        return self.cache_dir or folder / ".litgpt-tokens"

    def check_files(self, *, has_tokenizer: bool) -> None:
        """Check that there is text, and a tokenizer for it."""
        super().check_files(has_tokenizer=has_tokenizer)
        self._list_files()

    def build_corpora(self) -> tuple[Corpus, Corpus]:
        """Return the training and the validation text."""
        train, val = self._list_files()
        return (
            self._build_corpus("training text", train, self.bad_rows),
            self._build_corpus("validation text", val, self.bad_rows),
        )

    def _list_files(self) -> tuple[list[Path], list[Path]]:
        train = list_text_files(self.train_data_path, "data.train_data_path")
        if self.val_data_path is not None:
            val = list_text_files(self.val_data_path, "data.val_data_path")
        else:
            val, train = train[:1], train[1:]
        if not train:
            raise UserError(
                f"data.train_data_path: {self.train_data_path} has only one file, which is used for validation; "
                "add a second, or set data.val_data_path"
            )
        return train, val


@dataclass
class PythonDocs(TokenizedText):
    """English text that needs no download: the documentation in Python's own standard library, about 2 MB.

    On disk: python-<version>/train.jsonl and val.jsonl in `data_path`, written from the installed source files, and
    token shards. A document is the docstrings of one module, or one help topic; one in thirteen, selected by its hash,
    is for validation. No module is imported and no network is needed.
    """

    data_path: Path = Path("data/python-docs")
    """Folder of the text and the token shards."""
    seed: Seed = 42
    """Seed of the sample order."""
    num_workers: Position = 0
    """Number of processes that prefetch; the batches do not depend on it."""
    document_mask: bool = False
    """Confine attention to documents."""

    def build_corpora(self) -> tuple[Corpus, Corpus]:
        """Return the training and the validation text."""
        train, val = write_python_docs(self.data_path)
        return self._build_corpus("Python's documentation", [train]), self._build_corpus("validation text", [val])
