"""The data modules that a recipe names.

Their settings, and what they read from disk, are in each class. Nothing heavy is imported before the data is needed.
"""

import hashlib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.data.read.documents import BadRows, Source, fingerprint_files, list_text_files, read_documents
from litgpt.errors import UserError
from litgpt.recipe.bounds import Fraction, Position, Seed, check_numbers
from litgpt.recipe.data import BatchShape, DataModule, Stream

if TYPE_CHECKING:
    from litgpt.data.cache.token_shards import Corpus
    from litgpt.data.stream.batches import SampleDataset, TokenReader


class TokenizedText(DataModule):
    """What the modules share that turn text into token shards: make or find them, and stream windows of them."""

    seed: int
    num_workers: int
    document_mask: bool

    # what a run adds later; untyped, because the types of settings are looked up and these need torch
    tokenizer: Any = None
    train_tokens: Any = None
    val_tokens: Any = None

    def __post_init__(self) -> None:
        check_numbers(self, "data.")

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        """Keep the tokenizer; batch size and length come with the shape of a stream."""
        self.tokenizer = tokenizer

    def corpora(self) -> "tuple[Corpus, Corpus]":
        """The training and the validation text."""
        raise UserError(f"data: {type(self).__name__} names no text")

    def cache(self) -> Path:
        """The folder that the token shards go to."""
        raise UserError(f"data: {type(self).__name__} names no folder for its tokens")

    def prepare_data(self) -> None:
        """Download and tokenize, or find that it is done."""
        from litgpt.data.cache.token_shards import prepare_tokens

        if self.tokenizer is None:
            raise UserError(
                f"tokenizer_dir: missing, but data: {type(self).__name__} is text; give a tokenizer's folder, or set "
                "tokenizer.kind: bpe"
            )
        try:
            train, val = self.corpora()
        except OSError as error:
            raise UserError(f"data: {error.filename}: {error.strerror}; mend that, or give another path") from None
        self.train_tokens = prepare_tokens(train, self.tokenizer, self.cache())
        self.val_tokens = prepare_tokens(val, self.tokenizer, self.cache())

    def setup(self, stage: str = "") -> None:
        """Open the token shards."""
        if self.train_tokens is None:
            self.prepare_data()

    def training_documents(self) -> Iterable[str]:
        """The training text, document by document."""
        from litgpt.data.read.documents import SkippedRows

        return self.corpora()[0].documents(lambda file: file, SkippedRows())

    def train_stream(self, shape: BatchShape) -> Stream:
        """Endless micro batches of windows of the training text."""
        from litgpt.data.stream.batches import TrainStream

        assert self.train_tokens is not None, "setup comes first"
        return TrainStream(self._windows(self.train_tokens, shape), shape, workers=self.num_workers)

    def val_stream(self, shape: BatchShape) -> Stream | None:
        """One pass over windows of the validation text, or None if that is shorter than one."""
        from litgpt.data.stream.batches import ValStream

        if self.val_tokens is None:
            return None
        if self.val_tokens.total <= shape.max_seq_length:
            _print_notice(
                f"no validation: its {self.val_tokens.total} tokens do not fill one window; give more or set "
                f"train.max_seq_length below {self.val_tokens.total}"
            )
            return None
        return ValStream(self._windows(self.val_tokens, shape), shape)

    def _windows(self, tokens: "TokenReader", shape: BatchShape) -> "SampleDataset":
        from litgpt.data.stream.batches import Windows

        return Windows(tokens, shape.max_seq_length, self.seed, self.document_mask)


@dataclass
class TextFiles(TokenizedText):
    """Text files of your own.

    On disk: a folder of .txt files, one document each, or .jsonl files, one document a line in its `text`; also .gz and
    .zst of both. Each document becomes the tokenizer's beginning-of-sequence token, if it has one, and its tokens.
    """

    train_data_path: Path
    """Folder of the training text."""
    val_data_path: Path | None = None
    """Folder (or one file) of the validation text; null takes the first training file, by name, for it."""
    seed: Seed = 42
    """Fixes the order of the samples."""
    num_workers: Position = 4
    """Processes that read ahead; the batches do not depend on it."""
    document_mask: bool = False
    """Confine attention to documents."""
    cache_dir: Path | None = None
    """Where token shards are kept; null for .litgpt-tokens in train_data_path."""
    bad_rows: BadRows = "stop"
    """What to do with rows that are not UTF-8, not JSON or have no text: stop, or skip and count them."""

    def cache(self) -> Path:
        """The folder that the token shards go to."""
        beside = self.train_data_path if self.train_data_path.is_dir() else self.train_data_path.parent
        return self.cache_dir or beside / ".litgpt-tokens"

    def corpora(self) -> "tuple[Corpus, Corpus]":
        """The training and the validation text."""
        train = list_text_files(self.train_data_path, "data.train_data_path")
        if self.val_data_path is not None:
            val = list_text_files(self.val_data_path, "data.val_data_path")
        else:
            val, train = train[:1], train[1:]
        if not train:
            raise UserError(
                f"data.train_data_path: {self.train_data_path} holds one file, which would be the validation text; "
                "add a second, or set data.val_data_path"
            )
        return _corpus("training text", train, self), _corpus("validation text", val, self)


@dataclass
class PythonDocs(TokenizedText):
    """English text that every machine has: the documentation in Python's own standard library, about 2 MB.

    On disk: python-<version>/train.jsonl and val.jsonl in `data_path`, written from the installed source files, and
    token shards. A document is the docstrings of one module, or one help topic; one in thirteen, picked by its hash, is
    for validation. Nothing is imported and no network is needed.
    """

    data_path: Path = Path("data/python-docs")
    """Where the text and the token shards are kept."""
    seed: Seed = 42
    """Fixes the order of the samples."""
    num_workers: Position = 0
    """Processes that read ahead; the batches do not depend on it."""
    document_mask: bool = False
    """Confine attention to documents."""

    def cache(self) -> Path:
        """The folder that the token shards go to."""
        return self.data_path

    def corpora(self) -> "tuple[Corpus, Corpus]":
        """The training and the validation text."""
        from litgpt.data.read.python_docs import write_python_docs

        train, val = write_python_docs(self.data_path)
        return _corpus("Python's documentation", [train], self), _corpus("validation text", [val], self)


@dataclass
class TinyStories(TokenizedText):
    """Short stories in the words of small children (Eldan and Li, 2023), downloaded from the Hugging Face hub.

    On disk: `data_path`/TinyStories_all_data.tar.gz (1.5 GB), read without being unpacked, and token shards beside it.
    It holds data00.json to data49.json, lists of objects with a `story`; the first is the validation text. Each story
    begins with the tokenizer's beginning-of-sequence token, if it has one.
    """

    data_path: Path = Path("data/tinystories")
    """Where the archive and the token shards are kept."""
    seed: Seed = 42
    """Fixes the order of the samples."""
    num_workers: Position = 8
    """Processes that read ahead; the batches do not depend on it."""
    document_mask: bool = False
    """Confine attention to stories."""

    def cache(self) -> Path:
        """The folder that the token shards go to."""
        return self.data_path

    def corpora(self) -> "tuple[Corpus, Corpus]":
        """The training and the validation text."""
        from litgpt.data.cache.token_shards import Corpus
        from litgpt.data.read.downloads import download_tinystories, read_stories

        archive = download_tinystories(self.data_path)
        (source,) = fingerprint_files([archive], self.data_path / "hashes.json")
        bos = self.tokenizer is not None and self.tokenizer.bos_id is not None

        def corpus(part: str) -> "Corpus":
            name = f"TinyStories ({part})"
            known_as = Source(f"{part}:{source.name}", source.bytes, source.sha256)
            return Corpus(name, [known_as], lambda wrap_file, _: read_stories(archive, part, wrap_file), bos=bos)

        return corpus("train"), corpus("val")


@dataclass
class OpenWebText(TokenizedText):
    """Web pages that Reddit linked to (Gokaslan and Cohen, 2019), downloaded from the Hugging Face hub.

    On disk: `data_path`/parquet/**.parquet with a column `text`, and token shards beside it; or, for an s3:// path,
    litdata chunk folders `train` and `val`. Each document ends with the tokenizer's end-of-sequence token.
    """

    data_path: str | Path = Path("data/openwebtext")
    """Where the files and the token shards are kept, or s3://... with ready chunk folders."""
    val_split_fraction: Fraction = 0.0005
    """Share of the documents for validation, picked by hash."""
    seed: Seed = 42
    """Fixes the order of the samples and which documents are for validation."""
    num_workers: Position = 8
    """Processes that read ahead; the batches do not depend on it."""
    document_mask: bool = False
    """Confine attention to documents."""

    def cache(self) -> Path:
        """The folder that the token shards go to."""
        return Path(self.data_path)

    def corpora(self) -> "tuple[Corpus, Corpus]":
        """The training and the validation text."""
        from litgpt.data.cache.token_shards import Corpus
        from litgpt.data.read.downloads import download_openwebtext, read_parquet_texts

        files = download_openwebtext(Path(self.data_path))
        sources = fingerprint_files(files, Path(self.data_path) / "hashes.json")

        def corpus(part: str) -> "Corpus":
            rule = Source(f"{part}:{self.val_split_fraction}:{self.seed}", 0, "")
            return Corpus(
                f"OpenWebText ({part})",
                [rule, *sources],
                lambda wrap_file, _: (
                    text
                    for text in read_parquet_texts(files, wrap_file)
                    if (part == "val") == _is_picked(text, self.val_split_fraction, self.seed)
                ),
                eos=True,
            )

        return corpus("train"), corpus("val")

    def prepare_data(self) -> None:
        """Download and tokenize, or find that it is done; a remote path is ready as it stands."""
        if not _is_remote(self.data_path):
            super().prepare_data()

    def train_stream(self, shape: BatchShape) -> Stream:
        """Endless micro batches of the training text."""
        if not _is_remote(self.data_path):
            return super().train_stream(shape)
        return _chunk_stream([(_folder(self.data_path, "train"), 1.0)], self, shape)

    def val_stream(self, shape: BatchShape) -> Stream | None:
        """One pass over the validation text."""
        if not _is_remote(self.data_path):
            return super().val_stream(shape)
        return _chunk_stream([(_folder(self.data_path, "val"), 1.0)], self, shape, repeat=False)


class ChunkFolders(DataModule):
    """What the modules share that read litdata chunk folders, local or remote."""

    seed: int
    num_workers: int
    document_mask: bool

    def __post_init__(self) -> None:
        check_numbers(self, "data.")

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        """There is nothing to keep: the text is tokens already."""

    def train_folders(self) -> list[tuple[str, float]]:
        """The folders of the training tokens, and the share of the samples from each."""
        raise UserError(f"data: {type(self).__name__} names no folder")

    def val_folder(self) -> str | None:
        """The folder of the validation tokens."""
        return None

    def prepare_data(self) -> None:
        """Find that local folders are there."""
        for folder in [folder for folder, _ in self.train_folders()] + [self.val_folder()]:
            if folder is not None and not _is_remote(folder) and not (Path(folder) / "index.json").is_file():
                raise UserError(
                    f"data.data_path: {folder} is no litdata chunk folder (no index.json); write one with "
                    "litdata.optimize(..., item_loader=TokensLoader()) or give another path"
                )

    def train_stream(self, shape: BatchShape) -> Stream:
        """Endless micro batches of the training tokens."""
        return _chunk_stream(self.train_folders(), self, shape)

    def val_stream(self, shape: BatchShape) -> Stream | None:
        """One pass over the validation tokens; None if there are none."""
        folder = self.val_folder()
        if folder is None:
            _print_notice(
                f"no validation: data: {type(self).__name__} names no validation tokens; set data.split_names"
            )
            return None
        return _chunk_stream([(folder, 1.0)], self, shape, repeat=False)


@dataclass
class LitData(ChunkFolders):
    """Tokens that litdata's `optimize` wrote with its TokensLoader.

    On disk, or at s3:// and the like: chunk-*.bin and index.json, in `data_path` itself or in two folders of it. Local
    folders are mapped into memory, and a run continues exactly under any number of ranks; remote and compressed ones
    are streamed by litdata, and a run continues exactly under the same number of ranks.
    """

    data_path: str | Path = Path("data")
    """The folder, or the one above."""
    split_names: tuple[str, str] | None = None
    """Names of the training and the validation folder in `data_path`; null trains on all of it, without validation."""
    seed: Seed = 42
    """Fixes the order of the samples."""
    num_workers: Position = 8
    """Processes that read ahead; the batches of local folders do not depend on it."""
    document_mask: bool = False
    """Confine attention to documents; for local folders."""

    def train_folders(self) -> list[tuple[str, float]]:
        """The one folder of the training tokens."""
        return [(_folder(self.data_path, self.split_names[0] if self.split_names else ""), 1.0)]

    def val_folder(self) -> str | None:
        """The folder of the validation tokens."""
        return _folder(self.data_path, self.split_names[1]) if self.split_names else None


@dataclass
class TinyLlama(ChunkFolders):
    """The tokens that TinyLlama was pretrained on: SlimPajama and, for three samples in ten, StarCoder.

    On disk, or at s3://: litdata chunk folders slimpajama/train, slimpajama/val and starcoder in `data_path`.
    """

    data_path: str | Path = Path("data/")
    """The folder above."""
    seed: Seed = 42
    """Fixes the order of the samples."""
    num_workers: Position = 8
    """Processes that read ahead; the batches of local folders do not depend on it."""
    use_starcoder: bool = True
    """Mix StarCoder in; false trains on SlimPajama alone."""
    document_mask: bool = False
    """Confine attention to documents; for local folders."""

    def train_folders(self) -> list[tuple[str, float]]:
        """SlimPajama and StarCoder in the shares that TinyLlama gave them."""
        web = _folder(self.data_path, "slimpajama/train")
        if not self.use_starcoder:
            return [(web, 1.0)]
        return [(web, 0.693584), (_folder(self.data_path, "starcoder"), 0.306416)]

    def val_folder(self) -> str | None:
        """SlimPajama's validation tokens."""
        return _folder(self.data_path, "slimpajama/val")


@dataclass
class MicroLlama(TinyLlama):
    """TinyLlama's data without StarCoder."""

    use_starcoder: bool = False
    """Mix StarCoder in."""


def _corpus(name: str, files: list[Path], module: TokenizedText) -> "Corpus":
    """Text files as a corpus: beginning-of-sequence token, if there is one, and the document."""
    from litgpt.data.cache.token_shards import Corpus

    bad_rows: BadRows = getattr(module, "bad_rows", "stop")
    return Corpus(
        name=name,
        sources=fingerprint_files(files, module.cache() / "hashes.json"),
        documents=lambda wrap_file, skipped: chain.from_iterable(
            read_documents(file, bad_rows=bad_rows, skipped=skipped, wrap_file=wrap_file) for file in files
        ),
        bos=module.tokenizer is not None and module.tokenizer.bos_id is not None,
        bad_rows=bad_rows,
    )


def _chunk_stream(folders: list[tuple[str, float]], module: Any, shape: BatchShape, *, repeat: bool = True) -> Stream:
    """A stream over chunk folders: our own over local ones, litdata's over remote or compressed ones."""
    from litgpt.data.cache.litdata_chunks import ChunkFolder, is_memory_mappable
    from litgpt.data.stream.batches import BlendedWindows, TrainStream, ValStream, Windows

    if any(_is_remote(folder) or not is_memory_mappable(Path(folder)) for folder, _ in folders):
        return _litdata_stream(folders, module, shape, repeat=repeat)
    windows = [
        Windows(ChunkFolder(Path(folder)), shape.max_seq_length, module.seed + number, module.document_mask)
        for number, (folder, _) in enumerate(folders)
    ]
    rows = windows[0] if len(windows) == 1 else BlendedWindows(windows[0], windows[1], folders[0][1])
    return TrainStream(rows, shape, workers=module.num_workers) if repeat else ValStream(rows, shape)


def _litdata_stream(folders: list[tuple[str, float]], module: Any, shape: BatchShape, *, repeat: bool) -> Stream:
    if module.document_mask:
        raise UserError(
            "data.document_mask: true needs local, uncompressed chunk folders; set data.document_mask: false"
        )
    from litdata.streaming import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset, TokensLoader

    from litgpt.data.stream.loader import LoaderStream, start_worker

    def open_folder(folder: str) -> StreamingDataset:
        loader = TokensLoader(block_size=shape.max_seq_length + 1)
        try:
            return StreamingDataset(folder, item_loader=loader, shuffle=repeat, drop_last=True, seed=module.seed)
        except Exception as error:  # the clients of each kind of store raise errors of their own
            reason = str(error)[:200] or type(error).__name__
            raise UserError(
                f"data.data_path: {folder} cannot be streamed ({reason}); check the path and access"
            ) from None

    datasets = [open_folder(folder) for folder, _ in folders]
    weights = [weight for _, weight in folders]
    dataset: Any = datasets[0]
    if len(datasets) > 1:
        dataset = CombinedStreamingDataset(datasets, seed=module.seed, weights=weights, iterate_over_all=False)
    loader = StreamingDataLoader(
        dataset,
        batch_size=shape.micro_batch_size,
        num_workers=module.num_workers,
        drop_last=True,
        worker_init_fn=partial(start_worker, None),
    )
    return LoaderStream(lambda: loader, shape, repeat=repeat)


def _folder(path: str | Path, name: str) -> str:
    """A folder below a path, which may be a URL; a Path has made one slash of a URL's two."""
    return re.sub(r"^(\w{2,}):/+", r"\1://", f"{path}/{name}").rstrip("/")


def _is_remote(path: str | Path) -> bool:
    return "://" in _folder(path, "")


def _print_notice(text: str) -> None:
    print(text, file=sys.stderr)


def _is_picked(text: str, fraction: float, seed: int) -> bool:
    """Whether a text falls into a share that is picked by its hash."""
    digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
