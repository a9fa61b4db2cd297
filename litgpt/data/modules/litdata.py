"""Data modules of tokens in chunk folders that litdata wrote, local or remote."""

import re
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from litgpt.data import cache, stream
from litgpt.errors import UserError
from litgpt.messages import print_message
from litgpt.recipe.bounds import Position, Seed, check_numbers
from litgpt.recipe.data import BatchShape, DataModule, Stream


class ChunkFolders(DataModule):
    """Base of data modules that read litdata chunk folders, local or remote."""

    seed: int
    num_workers: int
    document_mask: bool

    def __post_init__(self) -> None:
        check_numbers(self, "data.")

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        """Nothing to set: the text is already tokenized."""

    def train_folders(self) -> list[tuple[str, float]]:
        """The folders of the training tokens, and the fraction of the samples from each."""
        raise UserError(f"data: {type(self).__name__} has no folder")

    def val_folder(self) -> str | None:
        """The folder of the validation tokens."""
        return None

    def prepare_data(self) -> None:
        """Check that local folders exist."""
        for folder in [folder for folder, _ in self.train_folders()] + [self.val_folder()]:
            if folder is not None and not is_remote(folder) and not (Path(folder) / "index.json").is_file():
                raise UserError(
                    f"data.data_path: {folder} is not a litdata chunk folder (no index.json); write one with "
                    "litdata.optimize(..., item_loader=TokensLoader()) or use another path"
                )

    def train_stream(self, shape: BatchShape) -> Stream:
        """Stream the training tokens, endlessly."""
        return open_chunk_stream(self.train_folders(), self, shape)

    def val_stream(self, shape: BatchShape) -> Stream | None:
        """Stream one pass over the validation tokens; None without any."""
        folder = self.val_folder()
        if folder is None:
            print_message(
                f"no validation: data: {type(self).__name__} has no validation tokens; set data.split_names",
            )
            return None
        return open_chunk_stream([(folder, 1.0)], self, shape, repeat=False)


@dataclass
class LitData(ChunkFolders):
    """Tokens that litdata's `optimize` wrote with its TokensLoader.

    On disk, or at s3:// and the like: chunk-*.bin and index.json, in `data_path` itself or in two folders of it. Local
    folders are memory-mapped, and a run resumes exactly with any number of ranks; remote and compressed ones are
    streamed by litdata, and a run resumes exactly with the same number of ranks.
    """

    data_path: str | Path = Path("data")
    """The folder, or its parent."""
    split_names: tuple[str, str] | None = None
    """Names of the training and the validation folder in `data_path`; null trains on all of it, without validation."""
    seed: Seed = 42
    """Seed of the sample order."""
    num_workers: Position = 8
    """Number of processes that prefetch; the batches of local folders do not depend on it."""
    document_mask: bool = False
    """Confine attention to documents; for local folders."""

    def train_folders(self) -> list[tuple[str, float]]:
        """The one folder of the training tokens."""
        return [(join_folder(self.data_path, self.split_names[0] if self.split_names else ""), 1.0)]

    def val_folder(self) -> str | None:
        """The folder of the validation tokens."""
        return join_folder(self.data_path, self.split_names[1]) if self.split_names else None


@dataclass
class TinyLlama(ChunkFolders):
    """The tokens that TinyLlama was pretrained on: SlimPajama and, for three samples in ten, StarCoder.

    On disk, or at s3://: litdata chunk folders slimpajama/train, slimpajama/val and starcoder in `data_path`.
    """

    data_path: str | Path = Path("data/")
    """The parent folder."""
    seed: Seed = 42
    """Seed of the sample order."""
    num_workers: Position = 8
    """Number of processes that prefetch; the batches of local folders do not depend on it."""
    use_starcoder: bool = True
    """Mix StarCoder in; false trains on SlimPajama alone."""
    document_mask: bool = False
    """Confine attention to documents; for local folders."""

    def train_folders(self) -> list[tuple[str, float]]:
        """SlimPajama and StarCoder with TinyLlama's proportions."""
        web = join_folder(self.data_path, "slimpajama/train")
        if not self.use_starcoder:
            return [(web, 1.0)]
        return [(web, 0.693584), (join_folder(self.data_path, "starcoder"), 0.306416)]

    def val_folder(self) -> str | None:
        """SlimPajama's validation tokens."""
        return join_folder(self.data_path, "slimpajama/val")


@dataclass
class MicroLlama(TinyLlama):
    """TinyLlama's data without StarCoder."""

    use_starcoder: bool = False
    """Mix StarCoder in."""


def open_chunk_stream(
    folders: list[tuple[str, float]], module: Any, shape: BatchShape, *, repeat: bool = True
) -> Stream:
    """Open a stream over chunk folders: our own for local ones, litdata's for remote or compressed ones."""
    is_memory_mappable = cache.litdata_chunks.is_memory_mappable
    if any(is_remote(folder) or not is_memory_mappable(Path(folder)) for folder, _ in folders):
        return _open_litdata_stream(folders, module, shape, repeat=repeat)
    texts = [cache.litdata_chunks.ChunkFolder(Path(folder)) for folder, _ in folders]
    windows = [
        stream.windows.Windows(text, shape.max_seq_length, module.seed + number, module.document_mask)
        for number, text in enumerate(texts)
    ]
    samples = windows[0] if len(windows) == 1 else stream.windows.BlendedWindows(*windows, folders[0][1])
    if repeat:
        return stream.batches.TrainStream(samples, shape, workers=module.num_workers)
    return stream.batches.ValStream(samples, shape)


def _open_litdata_stream(folders: list[tuple[str, float]], module: Any, shape: BatchShape, *, repeat: bool) -> Stream:
    if module.document_mask:
        raise UserError(
            "data.document_mask: true needs local, uncompressed chunk folders; set data.document_mask: false"
        )
    warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # litdata copies it
    from litdata.streaming import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset, TokensLoader

    def open_folder(folder: str) -> StreamingDataset:
        item_loader = TokensLoader(block_size=shape.max_seq_length + 1)
        try:
            return StreamingDataset(folder, item_loader=item_loader, shuffle=repeat, drop_last=True, seed=module.seed)
        except Exception as error:  # the clients of each kind of store raise their own errors
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
        worker_init_fn=partial(stream.loader.start_worker, None),
    )
    return stream.loader.LoaderStream(lambda: loader, shape, repeat=repeat)


def join_folder(path: str | Path, name: str) -> str:
    """Join a folder to a path, which may be a URL; `Path` collapses the two slashes of a URL."""
    return re.sub(r"^(\w{2,}):/+", r"\1://", f"{path}/{name}").rstrip("/")


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL."""
    return "://" in join_folder(path, "")
