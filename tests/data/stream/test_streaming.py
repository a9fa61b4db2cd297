"""Rows that are read as they are needed: each once a pass, shuffled, packed, mixed, counted, gone on with exactly."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from litgpt.data import Conversations
from litgpt.data.modules.finetuning import Packing
from litgpt.data.stream.batch import Batch
from litgpt.data.stream.row_shards import RowShard, open_reader, take_all
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.messages import mute_messages
from litgpt.recipe.data import BatchShape
from litgpt.recipe.train import TrainArgs
from litgpt.train.schedule import count_steps
from tests.data.conversation_rows import equal, module, questions, rows, samples_of, take, write
from tests.data.templates import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), "chatml")


def streamed(tmp_path: Path, tokenizer: Tokenizer, sources: list[Any] | None = None, **settings: Any) -> Conversations:
    return module(tmp_path, tokenizer, sources, **({"streaming": True, "shuffle_buffer": 16} | settings))


def write_kinds(folder: Path, lines: list[dict[str, Any]]) -> list[Path]:
    """The same rows as every kind of file, each with its own way to be entered."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    plain = write(folder / "a.jsonl", lines)
    plain.write_text(plain.read_text().replace("\n", "\n\n", 3))  # lines that hold nothing
    (folder / "b.json").write_text(json.dumps(lines, indent=1))
    with (folder / "c.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["query", "response"])
        table.writeheader()
        table.writerows(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), folder / "d.parquet", row_group_size=7)
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    return sorted(folder.iterdir())


def test_shard_resumes_at_any_row(tmp_path: Path) -> None:
    """Shares are disjoint and together whole, and reading on from any place gives what was to come."""
    lines = rows(23)
    for path in write_kinds(tmp_path / "kinds", lines):
        assert [row for _, _, (_, row) in open_reader(path)(0, 0, take_all)] == lines, path
    parts = [open_reader(path) for path in sorted((tmp_path / "kinds").iterdir())]
    for ranks in (1, 3):
        seen: Counter[str] = Counter()
        for rank in range(ranks):

            def fresh(rank: int = rank, ranks: int = ranks) -> RowShard:
                return RowShard("x", parts, [0] * 5, [0] * 5, seed=3, rank=rank, ranks=ranks)

            share, order, places = fresh(), [], []
            while share.position[0] == 0:
                places.append(list(share.position))
                _, (where, row) = next(share)
                order.append((where, row["query"]))
            again = order.pop()  # the first of the second pass
            assert places[0] == [0, 0, 0, 0] and again in order
            seen.update(question for _, question in order)
            for number in range(0, len(order), 5):
                later = fresh()
                later.seek(places[number])
                continued = [(where, row["query"]) for _, (where, row) in (next(later) for _ in order[number:])]
                assert continued == order[number:]
        assert seen == Counter({row["query"]: 5 for row in lines})


LAYOUTS: dict[str, dict[str, Any]] = {
    "end to end": {},
    "packed": {"packing": Packing(True, 150)},
    "interleaved": {"mix": "interleave"},
    "held back": {"val_rows": 3},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_resumes_exactly(tmp_path: Path, tokenizer: Tokenizer, layout: str, ranks: int) -> None:
    """20 batches are some, a saved state, and the rest, wherever it is saved; ranks read different rows."""
    kinds = write_kinds(tmp_path / "kinds", rows(23))
    more = write(tmp_path / "more.jsonl", rows(9, seed=1))
    is_mixed = LAYOUTS[layout].get("mix") == "interleave"
    weights = [{"weight": weight} if is_mixed else {} for weight in (5, 2)]
    sources = [{"path": str(path), **weight} for path, weight in zip((tmp_path / "kinds", more), weights, strict=True)]
    assert len(kinds) == 5
    data = streamed(tmp_path, tokenizer, sources, **LAYOUTS[layout])
    shapes = [BatchShape(2, 4 * ranks, 200, rank, ranks) for rank in range(ranks)]
    whole = [data.train_stream(shape) for shape in shapes]
    batches = [take(stream, 20) for stream in whole]
    for middle in (1, 12):
        first = [data.train_stream(shape) for shape in shapes]
        halves = [take(stream, middle) for stream in first]
        states = [json.loads(json.dumps(stream.state_dict())) for stream in first]
        state = states[0] | {"ranks": {rank: place for item in states for rank, place in item["ranks"].items()}}
        assert state["position"] == middle * 2 * ranks and len(json.dumps(state)) < 1500 * ranks
        for rank, shape in enumerate(shapes):
            second: Any = streamed(tmp_path, tokenizer, sources, **LAYOUTS[layout]).train_stream(shape)
            second.load_state_dict(state)
            halves[rank] += take(second, 20 - middle)
            assert len(halves[rank]) == 20 and all(map(equal, batches[rank], halves[rank])), (middle, rank)
            assert second.report() == whole[rank].report()  # type: ignore[attr-defined]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_once_a_pass(tmp_path: Path, tokenizer: Tokenizer, layout: str) -> None:
    sources = [str(write(tmp_path / "one.jsonl", rows(41))), str(write(tmp_path / "two.jsonl", rows(41, seed=1)))]
    settings = {"val_rows": 0} | LAYOUTS[layout]
    data = streamed(tmp_path, tokenizer, sources, **settings)
    continued: list[list[str]] = []
    for rank in range(2):
        stream = data.train_stream(BatchShape(1, 2, 200, rank, 2))
        assert stream.samples_per_epoch is None and stream.epoch == 0
        continued.append([])
        while stream.epoch < 2:
            continued[-1] += questions(take(stream, 1), tokenizer)
    kept = [f"{seed}-{number}" for seed in (0, 1) for number in range(settings["val_rows"], 41)]
    assert not set(continued[0]) & set(continued[1]) and sorted({*continued[0], *continued[1]}) == sorted(kept)
    for mine in continued:
        counts = Counter(mine)
        assert max(counts.values()) - min(counts.values()) <= 1  # what of the third pass was in the last window
        assert mine[: len(counts)] != sorted(mine[: len(counts)])
    val = data.val_stream(BatchShape(1, 1, 200))
    if settings["val_rows"]:
        assert val is not None and sorted(questions(list(val), tokenizer)) == sorted(
            f"{seed}-{number}" for seed in (0, 1) for number in range(3)
        )
        fewer = streamed(tmp_path, tokenizer, sources, val_rows=2)
        assert [report["rows"] for report in fewer.report().values()] == [2, 2]
    else:
        assert val is None


def test_samples_equal_those_tokenized_ahead(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = [str(write(tmp_path / "rows.jsonl", [*rows(20), *rows(5, seed=2, weight=0.5)]))]
    for settings in ({}, {"packing": Packing(True, 150)}, {"num_workers": 1}, {"seed": 3}):
        workers = settings.pop("num_workers", 0)
        ahead = module(tmp_path, tokenizer, sources, val_fraction=0.0)
        there = {
            (tuple(ids), tuple(labels))
            for batch in take(ahead.train_stream(BatchShape(1, 1, 200)), 25)
            for ids, labels in samples_of(batch)
        }
        data = streamed(tmp_path, tokenizer, sources, shuffle_buffer=25, **settings)
        data.num_workers = workers
        stream = data.train_stream(BatchShape(1, 1, 200))
        batches: list[Batch] = []
        continued: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        while len(continued) < 25:
            batches += take(stream, 1)
            continued += [(tuple(ids), tuple(labels)) for ids, labels in samples_of(batches[-1])]
        stream.close()
        assert set(continued) == there and len(continued) == 25
        weights = {float(batch.weights.max()) for batch in batches if batch.weights is not None}
        assert weights and weights <= {0.5, 1.0}
    plain, other = (
        take(streamed(tmp_path, tokenizer, sources, seed=seed).train_stream(BatchShape(5, 5, 200)), 2)
        for seed in (1, 2)
    )
    assert questions(plain, tokenizer) != questions(other, tokenizer)


def test_packing_fills_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = [str(write(tmp_path / "rows.jsonl", rows(200)))]
    data = streamed(tmp_path, tokenizer, sources, shuffle_buffer=200, packing=Packing(True, 400))
    sizes = [batch.ids.shape[1] for batch in take(data.train_stream(BatchShape(1, 1, 200)), 15)]
    assert max(sizes) <= 400 and sum(sizes) / len(sizes) > 370


def test_interleaved_in_proportion(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = [
        {"path": str(write(tmp_path / "a.jsonl", rows(30, seed=1))), "weight": 3, "channel": "a"},
        {"path": str(write(tmp_path / "b.jsonl", rows(40, seed=2, channel="elsewhere"))), "weight": 1},
        {"path": str(write(tmp_path / "c.jsonl", rows(40, seed=3))), "weight": 0},
    ]
    data = streamed(tmp_path, tokenizer, sources, mix="interleave")
    stream: Any = data.train_stream(BatchShape(8, 8, 200))
    batches = take(stream, 25)
    said = Counter(question[0] for question in questions(batches, tokenizer))
    assert stream.channels == ["a", "default"] and abs(said["1"] - 150) <= 12 and set(said) == {"1", "2"}
    for batch in batches:
        for number, question in enumerate(questions([batch], tokenizer)):
            assert batch.channels is not None and batch.documents is not None
            assert set(batch.channels[batch.documents == number].tolist()) == {int(question[0]) - 1}


def test_invalid_rows_are_counted_once(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"query": "number 9-9", "response": "fox " * 200}
    lines = [*rows(10), [1], {"query": "q"}, long, {}, *rows(10, seed=1), {"query": "fox " * 99, "response": "a"}]
    path = write(tmp_path / "rows.jsonl", lines)
    (tmp_path / "rows.jsonl").write_bytes(path.read_bytes() + b"{\n")
    reasons = {"not an object": 1, "no answer": 1, "empty row": 1, "not JSON": 1}
    for how, untrained, workers in (("drop", 0, 0), ("truncate_right", 1, 1), ("truncate_left", 0, 0), ("split", 0, 0)):
        data = streamed(tmp_path, tokenizer, [str(path)], on_error="warn", on_overlong=how)
        data.num_workers = workers
        stream: Any = data.train_stream(BatchShape(1, 1, 70))
        while stream.epoch < 2:
            assert max(batch.ids.shape[1] for batch in take(stream, 1)) <= 70
        report = stream.report()[str(path)]
        stream.close()
        assert report["reasons"] == reasons and report["rows"] == 26, how
        assert (report["overlong"], report["untrained"]) == (2, untrained), how
        assert report["first"][0].startswith(f"{path}:11: not an object")
    assert capsys.readouterr().err.count(f"{path}:12: no answer") >= 3
    with mute_messages(muted=True):  # as on every rank but the first
        take(streamed(tmp_path, tokenizer, [str(path)], on_error="warn").train_stream(BatchShape(1, 1, 70)), 1)
    assert not capsys.readouterr().err
    for settings, words in (({}, r"rows\.jsonl:.*data\.on_error: drop"), ({"on_overlong": "raise"}, "tokens are more")):
        for workers in (0, 1):
            good = [str(write(tmp_path / "good.jsonl", [*rows(3), long]))] if settings else [str(path)]
            data = streamed(tmp_path, tokenizer, good, **settings)
            data.num_workers = workers
            stream = data.train_stream(BatchShape(1, 1, 70))
            with pytest.raises(UserError, match=words) as raised:
                take(stream, 60)
            assert "\n" not in str(raised.value)
            stream.close()


def test_unsupported_streaming_settings(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = str(write(tmp_path / "rows.jsonl", rows(20)))
    for settings, words in (
        ({"tokenize": "lazy"}, r"data\.tokenize: lazy"),
        ({"stopping": "all_exhausted"}, r"data\.stopping: all_exhausted"),
        ({"shuffle": False}, r"data\.shuffle: false is not supported with data\.streaming"),
        ({"group_by_length": 4}, r"data\.group_by_length: 4"),
        ({"val_fraction": 0.1}, r"data\.val_rows: 500"),
        ({"val_rows": 2, "val_sources": [path]}, r"data\.val_rows: 0"),
        ({"sources": [f"{path}#5"]}, "sample: 5"),
        ({"sources": ["nowhere.jsonl"]}, "no such file"),
        ({"sources": [{"path": path, "weight": 0}], "mix": "interleave"}, "weight: all are 0"),
        ({"val_rows": 20}, "has no row to train on"),
        ({"streaming": False, "val_rows": 3, "shuffle_buffer": None}, r"data\.val_rows: 3"),
        ({"streaming": False}, r"data\.shuffle_buffer: 16"),
    ):
        given = {"sources": [path]} | settings
        with pytest.raises(UserError, match=words) as raised:
            take(streamed(tmp_path, tokenizer, **given).train_stream(BatchShape(1, 1, 200)), 1)  # type: ignore[arg-type]
        assert "\n" not in str(raised.value)
    endless = TrainArgs(epochs=2, max_steps=3)
    with pytest.raises(UserError, match=r"train\.epochs: null and train\.max_steps"):
        count_steps(endless, 200, streamed(tmp_path, tokenizer).train_stream(BatchShape(1, 1, 200)).samples_per_epoch)
    hopeless = [str(write(tmp_path / "bad.jsonl", [{}] * 20))]
    with pytest.raises(UserError, match=r"no row to train on in a whole pass; the first error: .*:1: empty row"):
        take(streamed(tmp_path, tokenizer, hopeless, on_error="drop").train_stream(BatchShape(1, 1, 200)), 1)
    stream = streamed(tmp_path, tokenizer).train_stream(
        BatchShape(1, 2, 200, 0, 2, gather=lambda one: [one, {"1": {}}])
    )
    with pytest.raises(UserError, match="2 data ranks, now there are 1"):
        streamed(tmp_path, tokenizer).train_stream(BatchShape(1, 1, 200)).load_state_dict(stream.state_dict())
    state = streamed(tmp_path, tokenizer).train_stream(BatchShape(1, 1, 200)).state_dict()
    for other in ({"seed": 1}, {"packing": Packing(True)}, {"shuffle_buffer": 5}, {"system": "Be brief."}):
        with pytest.raises(UserError, match="of another data set"):
            streamed(tmp_path, tokenizer, **other).train_stream(BatchShape(1, 1, 200)).load_state_dict(state)


def test_hub_dataset(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(3):
        write(folder / f"train-{number}.jsonl", rows(7, seed=number))
    monkeypatch.setattr("litgpt.data.read.row_sources.check_hub_connection", lambda: None)
    real = datasets.load_dataset

    def from_disk(name: str, **rest: Any) -> Any:
        assert name == "someone/something" and rest == {"split": "train", "streaming": True}
        return real("json", data_files=[str(path) for path in sorted(folder.iterdir())], **rest)

    monkeypatch.setattr(datasets, "load_dataset", from_disk)
    data = streamed(tmp_path, tokenizer, ["someone/something"], val_rows=2, shuffle_buffer=19)
    stream = data.train_stream(BatchShape(1, 1, 200))
    whole = take(stream, 38)
    assert sorted(questions(whole[:19], tokenizer)) == sorted(
        f"{seed}-{number}" for seed in range(3) for number in range(7) if seed or number > 1
    )
    first = data.train_stream(BatchShape(1, 1, 200))
    take(first, 8)
    second = data.train_stream(BatchShape(1, 1, 200))
    second.load_state_dict(first.state_dict())
    assert all(map(equal, take(second, 30), whole[8:]))

    def offline(_name: str, **_rest: Any) -> Any:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"cannot be downloaded from the hub .Couldn't reach the Hub"):
        streamed(tmp_path, tokenizer, ["someone/something"]).train_stream(BatchShape(1, 1, 200))
