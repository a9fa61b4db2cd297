"""Streams around dataloaders of others: plain torch ones, litdata's, and data modules in LitGPT's manner."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from litgpt.data import DataModule
from litgpt.data.cache.litdata_chunks import ChunkFolder
from litgpt.data.stream.batch import IGNORE
from litgpt.data.stream.loader import LoaderStream
from litgpt.errors import UserError
from litgpt.recipe.data import BatchShape


class Rows(torch.utils.data.Dataset):
    """Row i is i*10, i*10+1, ..."""

    def __init__(self, count: int, length: int = 4) -> None:
        self.count, self.length = count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        if index >= self.count:
            raise IndexError
        return torch.arange(index * 10, index * 10 + self.length + 1, dtype=torch.int32)


class Own(DataModule):
    """A module as LitGPT's users write them."""

    def __init__(self, count: int = 20, shuffle: bool = True, workers: int = 0) -> None:
        self.count, self.shuffle, self.workers = count, shuffle, workers

    def loader(self, shuffle: bool) -> DataLoader:
        return DataLoader(Rows(self.count), self.batch_size, shuffle=shuffle, num_workers=self.workers)

    def train_dataloader(self) -> DataLoader:
        return self.loader(self.shuffle)

    def val_dataloader(self) -> DataLoader:
        return self.loader(False)


def own(shape: BatchShape, **settings: Any) -> Own:
    module = Own(**settings)
    module.connect(batch_size=shape.micro_batch_size, max_seq_length=shape.max_seq_length)
    return module


def rows_of(batches: Any) -> list[int]:
    return [int(row[0]) // 10 for batch in batches for row in batch.ids]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (2, 2), (4, 5)])
def test_every_sample_once_an_epoch_over_the_ranks(ranks: int, micro: int) -> None:
    streams = []
    for rank in range(ranks):
        shape = BatchShape(micro, micro * ranks, 4, rank, ranks)
        streams.append(own(shape).train_stream(shape))
    epochs = [[rows_of(itertools.islice(stream, 20 // (ranks * micro))) for stream in streams] for _ in range(2)]
    for epoch in epochs:
        assert sorted(itertools.chain.from_iterable(epoch)) == list(range(20))
    assert streams[0].position in (20, 40)


def test_epochs_and_batches() -> None:
    shape = BatchShape(8, 8, 3)
    stream = own(shape, workers=1).train_stream(shape)
    batches = list(itertools.islice(stream, 6))
    assert [len(batch.ids) for batch in batches] == [8, 8, 4] * 2  # the last one of an epoch is what is left
    assert sorted(rows_of(batches[:3])) == sorted(rows_of(batches[3:])) == list(range(20))
    assert rows_of(batches[:3]) != rows_of(batches[3:])  # another order
    assert stream.position == 40
    assert batches[0].ids.shape == (8, 3) and torch.equal(batches[0].labels, batches[0].ids + 1)


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 6, 13])
def test_resumes_where_it_stopped(stop: int) -> None:
    shape = BatchShape(4, 8, 4, 1, 2)
    whole = rows_of(itertools.islice(own(shape, count=19).train_stream(shape), 30))
    first = own(shape, count=19).train_stream(shape)
    read = rows_of(itertools.islice(first, stop))
    second = own(shape, count=19).train_stream(shape)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.position == first.position
    read += rows_of(itertools.islice(second, 30 - stop))
    assert read == whole
    other = BatchShape(4, 4, 4)
    with pytest.raises(UserError, match="ranks"):
        own(other).train_stream(other).load_state_dict(first.state_dict())


@pytest.mark.parametrize(("count", "ranks"), [(7, 1), (7, 2), (9, 4), (2, 3)])
def test_validation_reads_each_sample_once(count: int, ranks: int) -> None:
    passes = []
    for rank in range(ranks):
        shape = BatchShape(2, 2 * ranks, 4, rank, ranks)
        stream = own(shape, count=count).val_stream(shape)
        assert stream is not None
        passes.append(list(stream))
        assert rows_of(stream) == rows_of(passes[-1])
    assert len({len(batches) for batches in passes}) == 1
    targets = [int(label) for batches in passes for batch in batches for label in batch.labels[:, 0]]
    assert sorted(label // 10 for label in targets if label != IGNORE) == list(range(count))


def test_invalid_batches() -> None:
    shape = BatchShape(1, 1, 4)
    for data in (TensorDataset(torch.zeros(3, 5)), [torch.zeros(5)], [torch.zeros(2, 2, dtype=torch.int)], [{"a": 1}]):
        with pytest.raises(UserError, match="the dataloader yields"):
            next(iter(LoaderStream(lambda data=data: DataLoader(data), shape)))  # type: ignore[misc]
    with pytest.raises(UserError, match="no batch"):
        next(iter(LoaderStream(lambda: DataLoader(Rows(3), 4, drop_last=True), shape)))


def test_iterable_dataset_shards_itself() -> None:
    class Endless(IterableDataset):
        def __iter__(self) -> Any:
            return iter(torch.arange(60).view(12, 5))

    shape = BatchShape(2, 4, 4, 1, 2)
    stream = LoaderStream(lambda: DataLoader(Endless(), 2), shape)
    assert [len(batch.ids) for batch in itertools.islice(stream, 8)] == [2] * 8
    assert (stream.position, stream.samples_per_epoch) == (32, None)
    again = LoaderStream(lambda: DataLoader(Endless(), 2), shape)
    again.load_state_dict(stream.state_dict())
    assert torch.equal(next(iter(again)).ids, next(iter(stream)).ids)


DOCUMENTS = [torch.arange(i * 1000, i * 1000 + 30 + 7 * i, dtype=torch.int) for i in range(12)]


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as litdata's `optimize` writes it, through its own writer."""
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    folder = tmp_path_factory.mktemp("litdata")
    writer = BinaryWriter(str(folder), chunk_bytes=800, item_loader=TokensLoader())
    for number, document in enumerate(DOCUMENTS):
        writer[number] = document
    writer.done()
    writer.merge()
    assert json.loads((folder / "index.json").read_text())["config"]["data_format"] == ["no_header_tensor:16"]
    assert len(list(folder.glob("*.bin"))) > 3
    return folder


def test_chunk_folder_is_the_text_that_was_written(chunks: Path) -> None:
    tokens = ChunkFolder(chunks)
    text = torch.cat(DOCUMENTS).tolist()
    assert tokens.total == len(text) and tokens.documents == 12
    assert tokens.read(0, tokens.total).tolist() == text
    starts = np.cumsum([0, *map(len, DOCUMENTS)])[:-1]
    for start in range(0, tokens.total, 13):
        stop = min(start + 200, tokens.total)
        assert tokens.read(start, stop).tolist() == text[start:stop]
        assert tokens.find_document_starts(start, stop).tolist() == [s for s in starts if start <= s < stop]


def test_chunk_folder_that_is_damaged(chunks: Path, tmp_path: Path) -> None:
    import shutil

    from litgpt.files import DamagedFileError

    for number, (name, change) in enumerate(
        [
            ("chunk-0-1.bin", lambda path: path.write_bytes(path.read_bytes()[:-4])),
            ("chunk-0-2.bin", lambda path: path.unlink()),
            ("index.json", lambda path: path.write_text('{"config": {"data_format": ["pickle"]}, "chunks": []}')),
            ("index.json", lambda path: path.write_text("{")),
        ]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(chunks, folder)
        change(folder / name)
        with pytest.raises(DamagedFileError, match=name):
            ChunkFolder(folder)
    index = json.loads((chunks / "index.json").read_text())
    index["chunks"][0]["filename"] = "../" + index["chunks"][0]["filename"]
    (tmp_path / "3" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="invalid file name"):
        ChunkFolder(tmp_path / "3")


def test_litdata_loader_resumes_from_its_own_state(chunks: Path) -> None:
    from litdata.streaming import StreamingDataLoader, StreamingDataset, TokensLoader

    def open_loader() -> Any:
        dataset = StreamingDataset(
            str(chunks), item_loader=TokensLoader(block_size=9), shuffle=True, seed=1, drop_last=True
        )
        return StreamingDataLoader(dataset, batch_size=2, num_workers=0, drop_last=True)

    shape = BatchShape(2, 2, 8)
    whole = [batch.ids for batch in itertools.islice(LoaderStream(open_loader, shape), 60)]
    first = LoaderStream(open_loader, shape)
    list(itertools.islice(first, 7))
    second = LoaderStream(open_loader, shape)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for ids, batch in zip(whole[7:], second, strict=False):
        assert torch.equal(ids, batch.ids)
