"""Data modules of published text, downloaded from the Hugging Face hub."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from litgpt.data.modules.litdata import is_remote, join_folder, open_chunk_stream
from litgpt.data.modules.text import TokenizedText
from litgpt.data.read.documents import Corpus, Source, fingerprint_files
from litgpt.data.read.downloads import download_openwebtext, download_tinystories, read_parquet_texts, read_stories
from litgpt.recipe.bounds import Fraction, Position, Seed
from litgpt.recipe.data import BatchShape, Stream


@dataclass
class TinyStories(TokenizedText):
    """Short stories in the vocabulary of small children (Eldan and Li, 2023), downloaded from the Hugging Face hub.

    On disk: `data_path`/TinyStories_all_data.tar.gz (1.5 GB), read without being extracted, and token shards next to
    it. It holds data00.json to data49.json, lists of objects with a `story`; the first is the validation text. Each
    story starts with the tokenizer's bos token, if it has one.
    """

    data_path: Path = Path("data/tinystories")
    """Folder of the archive and the token shards."""
    seed: Seed = 42
    """Seed of the sample order."""
    num_workers: Position = 8
    """Number of processes that prefetch; the batches do not depend on it."""
    document_mask: bool = False
    """Confine attention to stories."""

    def build_corpora(self) -> tuple[Corpus, Corpus]:
        """Return the training and the validation text."""
        archive = download_tinystories(self.data_path)
        (source,) = fingerprint_files([archive], self.data_path / "hashes.json")
        bos = self.tokenizer is not None and self.tokenizer.bos_id is not None

        def build_corpus(split: str) -> Corpus:
            split_source = Source(f"{split}:{source.name}", source.bytes, source.sha256)
            return Corpus(
                f"TinyStories ({split})",
                [split_source],
                lambda wrap_file, _: read_stories(archive, split, wrap_file),
                bos,
            )

        return build_corpus("train"), build_corpus("val")


@dataclass
class OpenWebText(TokenizedText):
    """Web pages linked from Reddit (Gokaslan and Cohen, 2019), downloaded from the Hugging Face hub.

    On disk: `data_path`/parquet/**.parquet with a column `text`, and token shards next to it; or, for an s3:// path,
    litdata chunk folders `train` and `val`. Each document ends with the tokenizer's eos token.
    """

    data_path: str | Path = Path("data/openwebtext")
    """Folder of the files and the token shards, or s3://... with chunk folders."""
    val_split_fraction: Fraction = 0.0005
    """Fraction of the documents for validation, selected by hash."""
    seed: Seed = 42
    """Seed of the sample order and of the selection for validation."""
    num_workers: Position = 8
    """Number of processes that prefetch; the batches do not depend on it."""
    document_mask: bool = False
    """Confine attention to documents."""

    def build_corpora(self) -> tuple[Corpus, Corpus]:
        """Return the training and the validation text."""
        files = download_openwebtext(Path(self.data_path))
        sources = fingerprint_files(files, Path(self.data_path) / "hashes.json")

        def build_corpus(split: str) -> Corpus:
            rule = Source(f"{split}:{self.val_split_fraction}:{self.seed}", 0, "")
            return Corpus(
                f"OpenWebText ({split})",
                [rule, *sources],
                lambda wrap_file, _: (
                    text
                    for text in read_parquet_texts(files, wrap_file)
                    if (split == "val") == _is_selected(text, self.val_split_fraction, self.seed)
                ),
                eos=True,
            )

        return build_corpus("train"), build_corpus("val")

    def list_outputs(self) -> dict[str, Path]:
        """The folder of the token shards, by the key that sets it; none if the path is remote."""
        return {} if is_remote(self.data_path) else super().list_outputs()

    def prepare_data(self) -> None:
        """Download and tokenize the text, unless that was done before or the path is remote."""
        if not is_remote(self.data_path):
            super().prepare_data()

    def train_stream(self, shape: BatchShape) -> Stream:
        """Stream the training text, endlessly."""
        if not is_remote(self.data_path):
            return super().train_stream(shape)
        return open_chunk_stream([(join_folder(self.data_path, "train"), 1.0)], self, shape)

    def val_stream(self, shape: BatchShape) -> Stream | None:
        """Stream one pass over the validation text."""
        if not is_remote(self.data_path):
            return super().val_stream(shape)
        return open_chunk_stream([(join_folder(self.data_path, "val"), 1.0)], self, shape, repeat=False)


def _is_selected(text: str, fraction: float, seed: int) -> bool:
    """Whether the hash of a text is within the given fraction of all hashes."""
    digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
