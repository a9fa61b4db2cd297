"""Samples of two answers: the same tokens in every layout, pairs stay together, and both answers are cut alike."""

import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.data.modules.preferences import Preferences
from litgpt.data.render.loss_weights import WeightRule
from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.recipe.data import BatchShape
from tests.data.conversation_rows import WORDS, equal, module, take, write
from tests.data.templates import write_tokenizer

LAYOUTS: dict[str, dict[str, Any]] = {
    "concatenated": {},
    "padded": {"padding": True},
    "packed": {"packing": {"enabled": True}},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), "chatml")


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    order = random.Random(seed)

    def answer() -> str:
        return " ".join(order.choices(WORDS, k=order.randint(2, 20)))

    return [
        {"prompt": f"number {number}", "chosen": f"yes {answer()}", "rejected": f"no {answer()}", "margin": number}
        for number in range(count)
    ]


def open_pairs(
    folder: Path, tokenizer: Tokenizer, rows: list[Any], objective: str = "pairs", **settings: Any
) -> Preferences:
    from litgpt.data.modules.finetuning import Packing

    if "packing" in settings:
        settings["packing"] = Packing(**settings["packing"])
    data = Preferences(
        sources=[str(write(folder / "rows.jsonl", rows))], cache_dir=folder / "cache", num_workers=0, **settings
    )
    data.set_objective(objective)
    data.connect(tokenizer)
    data.prepare_data()
    data.setup()
    return data


def iter_answers(batch: Batch) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """Ids, labels and value of each answer, in order."""
    assert batch.answers is not None and batch.answer_values is not None
    (values,) = batch.answer_values.values()
    assert len(values) == int(batch.answers.max()) + 1
    for number, value in enumerate(values.tolist()):
        tokens = batch.answers == number
        yield tuple(batch.ids[tokens].tolist()), tuple(batch.labels[tokens].tolist()), value


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_have_the_tokens_of_their_conversations(tmp_path: Path, tokenizer: Tokenizer, layout: str) -> None:
    rows = pairs(40)
    sides: dict[str, list[tuple[int, ...]]] = {}
    for name in ("chosen", "rejected"):
        (tmp_path / name).mkdir()
        lines = [{"query": row["prompt"], "response": row[name]} for row in rows]
        source = str(write(tmp_path / name / "rows.jsonl", lines))
        data = module(tmp_path / name, tokenizer, [source], val_fraction=0.0)
        batches = take(data.train_stream(BatchShape(1, 1, 64)), 40)
        sides[name] = [tuple(batch.ids[0].tolist()) for batch in batches]
    expected = {(a[: len(a)], b) for a, b in itertools.product(sides["chosen"], sides["rejected"])}
    data = open_pairs(tmp_path, tokenizer, rows, val_fraction=0.0, **LAYOUTS[layout])
    stream = data.train_stream(BatchShape(2, 4, 64))
    seen = set()
    for batch in take(stream, -(-stream.samples_per_epoch // 2)):
        answers = list(iter_answers(batch))
        for (first, labels, margin), (second, others, same) in zip(answers[::2], answers[1::2], strict=True):
            assert (first, second) in expected and margin == same
            row = rows[int(margin)]
            text = tokenizer.processor.decode([label for label in labels if label != IGNORE], skip_special_tokens=False)
            assert text == row["chosen"] + "<|im_end|>"
            text = tokenizer.processor.decode([label for label in others if label != IGNORE], skip_special_tokens=False)
            assert text == row["rejected"] + "<|im_end|>"
            seen.add(int(margin))
    assert seen == set(range(40))


def test_answers_of_all_layouts_are_the_same(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = {}
    for layout, settings in LAYOUTS.items():
        data = open_pairs(tmp_path, tokenizer, pairs(30), val_fraction=0.0, **settings)
        stream = data.train_stream(BatchShape(3, 3, 64))
        batches = take(stream, -(-stream.samples_per_epoch // 3))
        found[layout] = {answer for batch in batches for answer in iter_answers(batch)}
    assert found["concatenated"] == found["padded"] == found["packed"] and len(found["packed"]) == 60


@pytest.mark.parametrize("rule", ["truncate_right", "truncate_left", "drop"])
def test_both_answers_are_cut_by_the_same_rule(tmp_path: Path, tokenizer: Tokenizer, rule: Any) -> None:
    rows = pairs(40)
    whole = open_pairs(tmp_path, tokenizer, rows, val_fraction=0.0)
    lengths = {margin: [] for margin in range(40)}
    for batch in take(whole.train_stream(BatchShape(1, 1, 64)), 40):
        for ids, _, margin in iter_answers(batch):
            lengths[int(margin)].append(ids)
    cut = open_pairs(tmp_path, tokenizer, rows, val_fraction=0.0, on_overlong=rule, padding=True)
    stream = cut.train_stream(BatchShape(1, 1, 36))
    longer = {margin for margin, sides in lengths.items() if max(map(len, sides)) > 36}
    assert 5 < len(longer) < 35
    seen = set()
    for batch in take(stream, stream.samples_per_epoch):
        answers = list(iter_answers(batch))
        for (ids, labels, margin), side in zip(answers, lengths[int(answers[0][2])], strict=True):
            assert ids == (side[-36:] if rule == "truncate_left" else side[:36])
            assert any(label != IGNORE for label in labels)
            seen.add(int(margin))
    assert longer.isdisjoint(seen) == (rule == "drop") and set(lengths) - longer <= seen
    report = next(iter(cut.report().values()))
    assert report["overlong"] == len(longer)


def test_lazy_pairs_equal_those_tokenized_ahead(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for settings in ({}, {"padding": True}, {"weights": [WeightRule(2, keyword="fox")]}):
        ahead, lazy = (
            open_pairs(tmp_path, tokenizer, pairs(40), tokenize=how, on_overlong="truncate_left", **settings)
            for how in ("ahead", "lazy")
        )
        streams = [data.train_stream(BatchShape(2, 4, 64)) for data in (ahead, lazy)]
        batches = zip(*(take(stream, 12) for stream in streams), strict=True)
        assert all(equal(*both) and list(iter_answers(both[0])) == list(iter_answers(both[1])) for both in batches)
        validation = [data.val_stream(BatchShape(2, 4, 64)) for data in (ahead, lazy)]
        assert all(itertools.starmap(equal, zip(*validation, strict=True)))
        streams = [data.train_stream(BatchShape(1, 1, 36)) for data in (ahead, lazy)]
        cut = [{answer for batch in take(stream, 38) for answer in iter_answers(batch)} for stream in streams]
        assert cut[0] == cut[1] and len(cut[0]) == 76


def test_lazy_pairs_that_are_too_long_are_not_trained(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ahead, lazy = (
        open_pairs(tmp_path, tokenizer, pairs(40), tokenize=how, val_fraction=0.0) for how in ("ahead", "lazy")
    )
    kept = ahead.train_stream(BatchShape(1, 1, 36)).samples_per_epoch
    answers = [list(iter_answers(batch)) for batch in take(lazy.train_stream(BatchShape(1, 1, 36)), 40)]
    trained = [[any(label != IGNORE for label in labels) for _, labels, _ in pair] for pair in answers]
    assert trained.count([True, True]) == kept < 40 and trained.count([False, False]) == 40 - kept


def test_a_lazy_pair_that_cannot_be_rendered_is_not_trained(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [*pairs(3), {"prompt": "q", "chosen": "a", "rejected": "b", "weight": 0}]
    data = open_pairs(tmp_path, tokenizer, rows, tokenize="lazy", on_error="drop", val_fraction=0.0)
    (batch,) = take(data.train_stream(BatchShape(4, 4, 64)), 1)
    trained = [any(label != IGNORE for label in labels) for _, labels, _ in iter_answers(batch)]
    assert sorted(zip(trained[::2], trained[1::2], strict=True)) == [(False, False), *[(True, True)] * 3]


def test_pairs_longer_than_a_packed_row_are_counted(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    data = open_pairs(tmp_path, tokenizer, pairs(20), val_fraction=0.0, packing={"enabled": True, "length": 60})
    lengths = [len(list(iter_answers(batch))) for batch in take(data.train_stream(BatchShape(1, 1, 64)), 20)]
    assert min(lengths) == 2
    found = re.search(
        r"rows of 60 tokens: ([\d.]+)% full, .* per row; (\d+) samples are longer", capsys.readouterr().err
    )
    assert found is not None and float(found[1]) <= 100 and 0 < int(found[2]) < 20


@pytest.mark.parametrize("strategy", ["best_fit", "sequential"])
def test_packing_keeps_pairs_whole(tmp_path: Path, tokenizer: Tokenizer, strategy: str) -> None:
    """In packed rows of any length, answers 2 i and 2 i + 1 are those of one pair, and every pair occurs once."""
    for seed, length in itertools.product(range(3), (150, 400)):
        folder = tmp_path / f"{seed}"
        folder.mkdir(exist_ok=True)
        packing = {"enabled": True, "length": length, "strategy": strategy}
        data = open_pairs(folder, tokenizer, pairs(30, seed), val_fraction=0.0, packing=packing)
        stream = data.train_stream(BatchShape(1, 1, 64))
        assert stream.samples_per_epoch < 30
        margins = []
        for batch in take(stream, stream.samples_per_epoch):
            values = [value for *_, value in iter_answers(batch)]
            assert values[::2] == values[1::2] and batch.ids.numel() <= length
            margins += values[::2]
        assert sorted(margins) == list(range(30))


def test_pairs_are_grouped_by_length(tmp_path: Path, tokenizer: Tokenizer) -> None:
    reports = []
    for groups in (0, 4):
        data = open_pairs(tmp_path, tokenizer, pairs(60), val_fraction=0.0, padding=True, group_by_length=groups)
        stream = data.train_stream(BatchShape(2, 4, 64))
        margins = [answer[2] for batch in take(stream, 30) for answer in list(iter_answers(batch))[::2]]
        assert sorted(margins) == list(range(60))
        places = sum(batch.ids.numel() for batch in take(data.train_stream(BatchShape(2, 4, 64)), 30))
        assert data.padding_report["places"] == places
        reports.append(data.padding_report["padding"])
    assert reports[1] < reports[0]


@pytest.mark.parametrize("settings", [{}, {"padding": True, "group_by_length": 2}, {"packing": {"enabled": True}}])
def test_streams_of_pairs_resume(tmp_path: Path, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    shape = BatchShape(2, 4, 64)
    whole = take(open_pairs(tmp_path, tokenizer, pairs(30), **settings).train_stream(shape), 20)
    first = open_pairs(tmp_path, tokenizer, pairs(30), **settings).train_stream(shape)
    take(first, 9)
    second = open_pairs(tmp_path, tokenizer, pairs(30), **settings).train_stream(shape)
    second.load_state_dict(first.state_dict())
    for one, other in zip(whole[9:], take(second, 11), strict=True):
        assert equal(one, other) and list(iter_answers(one)) == list(iter_answers(other))
    rated = open_pairs(tmp_path, tokenizer, pairs(30), "kto", **settings).train_stream(shape)
    with pytest.raises(UserError, match="data"):
        rated.load_state_dict(first.state_dict())


def test_some_answers_are_selected(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for settings in LAYOUTS.values():
        data = open_pairs(tmp_path, tokenizer, pairs(12), val_fraction=0.0, **settings)
        (batch,) = take(data.train_stream(BatchShape(3, 3, 64)), 1)
        answers = list(iter_answers(batch))
        selected = torch.arange(len(answers)) % 3 != 1
        part = batch.select_answers(selected)
        assert list(iter_answers(part)) == [answer for number, answer in enumerate(answers) if number % 3 != 1]
        assert part.documents is not None and part.positions is not None and len(part.ids) == 1
        starts = part.positions[0] == 0
        assert torch.equal(starts.cumsum(0) - 1, part.documents[0].long())


def test_validation_pairs_past_the_end_are_not_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for layout in ("concatenated", "padded"):
        data = open_pairs(tmp_path, tokenizer, pairs(20), val_fraction=0.15, **LAYOUTS[layout])
        stream = data.val_stream(BatchShape(2, 2, 64))
        assert stream is not None
        counts = []
        for batch in stream:
            answers = list(iter_answers(batch))
            trained = [any(label != IGNORE for label in labels) for _, labels, _ in answers]
            assert trained[::2] == trained[1::2]
            counts.append(sum(trained) // 2)
        assert counts == [2, 1]


def test_rated_rows_come_with_a_mismatched_answer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": f"number {i}", "completion": f"answer {i}", "label": i % 2 == 0} for i in range(10)]
    data = open_pairs(tmp_path, tokenizer, rows, "kto", val_fraction=0.0)
    assert data.value_name == "desirable"
    for batch in take(data.train_stream(BatchShape(1, 1, 64)), 10):
        texts = [tokenizer.processor.decode(list(ids), skip_special_tokens=False) for ids, *_ in iter_answers(batch)]
        number = int(texts[0].split("number ")[1].split("<")[0])
        assert f"answer {number}<" in texts[0] and f"number {number}<" in texts[1]
        assert f"answer {(number + 1) % 10}<" in texts[1]
        assert batch.answer_values["desirable"].tolist() == [float(number % 2 == 0)] * 2


def test_kinds_of_rows_are_found_or_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rated = [{"prompt": "a", "completion": "b", "label": True}]
    with pytest.raises(UserError, match="rows with a label are for litgpt kto"):
        open_pairs(tmp_path, tokenizer, rated)
    data = Preferences(sources=[str(tmp_path / "rows.jsonl")], cache_dir=tmp_path / "cache")
    assert data.kind == "rated"
    data = open_pairs(tmp_path, tokenizer, pairs(6), "kto", val_fraction=0.0)
    assert data.train_stream(BatchShape(1, 1, 64)).samples_per_epoch == 12
    with pytest.raises(UserError, match="use litgpt align"):
        data.set_objective("next_token")
    with pytest.raises(UserError, match="set data: Preferences"):
        module(tmp_path, tokenizer).set_objective("pairs")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("objective", "unread"),
    [
        ("pairs", "channel (4 rows), margin (4 rows)"),
        ("kto", "channel (4 rows), margin (4 rows)"),
        ("reward", "channel (4 rows), weight (4 rows), messages.loss_scale (4 rows)"),
    ],
)
def test_columns_that_the_objective_does_not_read_are_counted(
    tmp_path: Path, tokenizer: Tokenizer, objective: str, unread: str, streaming: bool
) -> None:
    answer = {"role": "assistant", "content": "yes", "loss_scale": 2}
    rows = [row | {"chosen": [answer], "channel": "a", "weight": 2} for row in pairs(4)]
    settings = {"streaming": True, "shuffle_buffer": 4} if streaming else {"val_fraction": 0.0}
    open_pairs(tmp_path, tokenizer, rows, "pairs", **settings)  # which has built the cache
    data = open_pairs(tmp_path, tokenizer, rows, objective, **settings)
    stream = data.train_stream(BatchShape(1, 1, 64))
    take(stream, 4)
    (report,) = (stream if streaming else data).report().values()
    assert {f"{name} ({count} rows)" for name, count in report["unread"].items()} == set(unread.split(", "))


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"train_on": "everything"}, "data.train_on: everything"),
        ({"on_overlong": "split"}, "data.on_overlong: split"),
        ({"sources": [{"path": "x.jsonl", "channel": "a"}]}, "data.sources: channel: a has no effect"),
    ],
)
def test_settings_that_pairs_do_not_support(setting: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError, match=error):
        Preferences(**{"sources": ["x.jsonl"]} | setting)


@pytest.mark.parametrize("objective", ["pairs", "kto"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_streamed_pairs(tmp_path: Path, tokenizer: Tokenizer, layout: str, objective: str) -> None:
    """The same samples as tokenized ahead; a stream resumes, and its held-out rows are those of validation."""
    settings = {"on_overlong": "truncate_right", **LAYOUTS[layout]}
    shape, rows = BatchShape(2, 4, 36), pairs(24)
    ahead = open_pairs(tmp_path, tokenizer, rows, objective, val_fraction=0.0, **settings).train_stream(shape)
    expected = {answer for batch in take(ahead, -(-ahead.samples_per_epoch // 2)) for answer in iter_answers(batch)}
    data = open_pairs(tmp_path, tokenizer, rows, objective, streaming=True, shuffle_buffer=24, **settings)
    stream = data.train_stream(shape)
    batches = take(stream, 30)
    assert {answer for batch in batches for answer in iter_answers(batch)} == expected
    assert all(batch.answers is not None and int(batch.answers.max()) % 2 == 1 for batch in batches)
    first = open_pairs(tmp_path, tokenizer, rows, objective, streaming=True, shuffle_buffer=24, **settings)
    stream = first.train_stream(shape)
    take(stream, 9)
    other = first.train_stream(shape)
    other.load_state_dict(stream.state_dict())
    assert all(itertools.starmap(equal, zip(batches[9:], take(other, 21), strict=True)))
    held_out = open_pairs(tmp_path, tokenizer, rows, objective, streaming=True, val_rows=3)
    validation = held_out.val_stream(BatchShape(1, 1, 64))
    assert validation is not None and len(list(validation)) == (3 if objective == "pairs" else 6)
