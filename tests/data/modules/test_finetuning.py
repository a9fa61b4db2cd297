"""Modules of conversations and instructions: what is read, split, sampled, laid in rows, and gone on with exactly."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.data import JSON, Conversations
from litgpt.data.modules.finetuning import Packing
from litgpt.data.stream.batch import IGNORE
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.recipe.data import BatchShape
from tests.data.conversation_rows import equal, module, questions, rows, samples_of, take, write
from tests.data.templates import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), "chatml")


SHAPE = BatchShape(4, 8, 64)
LAYOUTS: dict[str, dict[str, Any]] = {
    "end to end": {},
    "packed": {"packing": Packing(True, 150)},
    "in order": {"packing": Packing(True, 100, "sequential")},
    "padded": {"padding": True},
    "lazy": {"tokenize": "lazy"},
    "packed and padded": {"padding": True, "packing": Packing(True, 150)},
    "by length": {"padding": True, "group_by_length": 3},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_sample_once_an_epoch(tmp_path: Path, tokenizer: Tokenizer, layout: str) -> None:
    data = module(tmp_path, tokenizer, val_fraction=0.0, **LAYOUTS[layout])
    stream = data.train_stream(BatchShape(1, 1, 64))
    rounds = stream.samples_per_epoch
    assert rounds is not None and (rounds < 40 if "packing" in LAYOUTS[layout] else rounds == 60)
    first, second = (questions(take(stream, rounds), tokenizer) for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(f"0-{number}" for number in range(60))
    assert first != second and stream.epoch == 2
    assert data.val_stream(SHAPE) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_hold_samples_apart(tmp_path: Path, tokenizer: Tokenizer, layout: str) -> None:
    """Every sample in a row is what it is alone: its tokens, its own next tokens as labels, positions from 0."""
    alone = module(tmp_path, tokenizer, val_fraction=0.0)
    single = {
        tuple(ids): labels for b in take(alone.train_stream(BatchShape(1, 1, 64)), 60) for ids, labels in samples_of(b)
    }
    data = module(tmp_path, tokenizer, val_fraction=0.0, **LAYOUTS[layout])
    for batch in take(data.train_stream(SHAPE), 12):
        assert batch.ids.shape == batch.labels.shape and batch.weights is None and batch.channels is None
        assert batch.ids.shape[0] == (4 if LAYOUTS[layout].get("padding") else 1)
        assert batch.documents is not None and batch.positions is not None
        for ids, labels in samples_of(batch):
            assert single[tuple(ids)] == labels
            assert labels[-1] == IGNORE
            assert [label for label in labels if label != IGNORE]
        for row in range(batch.ids.shape[0]):
            numbers, positions = batch.documents[row].tolist(), batch.positions[row].tolist()
            seen: Counter[int] = Counter()
            for number, position in zip(numbers, positions, strict=True):
                assert position == (seen[number] if number >= 0 else 0)
                seen[number] += 1
        padding = batch.documents < 0
        assert (batch.labels[padding] == IGNORE).all() and bool(padding.any()) <= bool(LAYOUTS[layout].get("padding"))


def test_labels_are_the_next_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = module(tmp_path, tokenizer, [str(write(tmp_path / "one.jsonl", rows(1)))], val_fraction=0.0)
    (batch,) = take(data.train_stream(BatchShape(1, 1, 64)), 1)
    assert batch.documents is None and batch.positions is None  # one sample needs no mask
    text = tokenizer.processor.decode(batch.ids[0].tolist(), skip_special_tokens=False)
    assert text.startswith("<|im_start|>user\nnumber 0-0<|im_end|>\n<|im_start|>assistant\n")
    kept = batch.labels[0] != IGNORE
    assert torch.equal(batch.labels[0][kept], batch.ids[0][1:][kept[:-1]])
    assert tokenizer.processor.decode(batch.labels[0][kept].tolist(), skip_special_tokens=False) == (
        rows(1)[0]["response"] + "<|im_end|>"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_resumes_exactly(tmp_path: Path, tokenizer: Tokenizer, layout: str, ranks: int) -> None:
    """20 batches are 10, a saved state, and 10 more; ranks read different samples and together all of them."""
    everything: list[str] = []
    for rank in range(ranks):
        shape = BatchShape(2, 8, 64, rank, ranks)
        whole = take(module(tmp_path, tokenizer, **LAYOUTS[layout]).train_stream(shape), 20)
        first = module(tmp_path, tokenizer, **LAYOUTS[layout]).train_stream(shape)
        halves = take(first, 10)
        state = json.loads(json.dumps(first.state_dict()))
        assert len(json.dumps(state)) < 100
        second = module(tmp_path, tokenizer, **LAYOUTS[layout]).train_stream(shape)
        second.load_state_dict(state)
        halves += take(second, 10)
        assert all(map(equal, whole, halves)) and len(halves) == 20
        rounds = -(-first.samples_per_epoch // (2 * ranks)) if first.samples_per_epoch else 0
        everything += questions(whole[: rounds - 1], tokenizer)
    assert len(set(everything)) == len(everything)


def test_samples_of_near_lengths_share_a_micro_batch(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Less padding, the longest of a group first, and the same global batches however they are cut."""
    sources = [str(write(tmp_path / "rows.jsonl", rows(100)))]
    padding: dict[int, list[int]] = {}
    for groups in (0, 1, 4):
        data = module(tmp_path, tokenizer, sources, val_fraction=0.0, padding=True, group_by_length=groups)
        stream = data.train_stream(BatchShape(4, 16, 200))
        assert f"padding: {data.report()['padding']['padding'] / data.report()['padding']['places']:.1%}" in (
            capsys.readouterr().err
        )
        batches = take(stream, 25)
        padding[groups] = [int((batch.documents < 0).sum()) for batch in batches if batch.documents is not None]
        assert sum(padding[groups]) == data.report()["padding"]["padding"]
        assert sum(batch.ids.numel() for batch in batches) == data.report()["padding"]["places"]
        halves = [take(data.train_stream(BatchShape(2, 16, 200, rank, 2)), 8) for rank in range(2)]
        for start in (0, 4):
            cut = [batch for half in halves for batch in half[start : start + 4]]
            whole = questions(batches[start : start + 4], tokenizer)
            assert sorted(questions(cut, tokenizer)) == sorted(whole)
        lengths = [len(ids) for batch in batches[:4] for ids, _ in samples_of(batch)]
        assert (lengths == sorted(lengths, reverse=True)) == bool(groups)
    assert sum(padding[4]) < sum(padding[1]) < sum(padding[0]) and sum(padding[4]) < sum(padding[0]) / 3
    plain, sorted_ = (
        module(tmp_path, tokenizer, sources, val_fraction=0.0, group_by_length=groups).train_stream(
            BatchShape(4, 16, 200)
        )
        for groups in (0, 1)
    )
    for _ in range(6):  # one group alone is the same step, in another order
        assert sorted(questions(take(plain, 4), tokenizer)) == sorted(questions(take(sorted_, 4), tokenizer))
    for other in ({"packing": Packing(True)}, {"tokenize": "lazy"}):
        with pytest.raises(UserError, match=r"data\.group_by_length: 2"):
            module(tmp_path, tokenizer, sources, group_by_length=2, **other)


def test_batches_do_not_depend_on_workers_or_ranks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = module(tmp_path, tokenizer, packing=Packing(True))
    plain = take(data.train_stream(SHAPE), 8)
    data.num_workers = 1
    stream = data.train_stream(SHAPE)
    assert all(map(equal, plain, take(stream, 8)))
    stream.close()
    data.num_workers = 0
    parts = [take(data.train_stream(BatchShape(2, 8, 64, rank, 2)), 8) for rank in range(2)]
    assert sorted(questions(plain, tokenizer)) == sorted(questions(parts[0] + parts[1], tokenizer))


def test_state_of_other_data_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    state = module(tmp_path, tokenizer).train_stream(SHAPE).state_dict()
    same = module(tmp_path, tokenizer).train_stream(SHAPE)
    same.load_state_dict(state)
    others: list[dict[str, Any]] = [{"seed": 1}, {"padding": True}, {"packing": Packing(True)}, {"val_fraction": 0.2}]
    others += [{"train_on": "everything"}, {"end_of_turn": "none"}, {"system": "Be brief."}]
    for other in others:
        with pytest.raises(UserError, match="of another data set"):
            module(tmp_path, tokenizer, **other).train_stream(SHAPE).load_state_dict(state)
    with pytest.raises(UserError, match="of another data set"):
        module(tmp_path, tokenizer).train_stream(BatchShape(4, 8, 40)).load_state_dict(state)


def test_validation_is_one_pass_of_other_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = module(tmp_path, tokenizer, val_fraction=0.25)
    training = data.train_stream(BatchShape(1, 1, 64))
    trained = set(questions(take(training, training.samples_per_epoch or 0), tokenizer))
    held: list[str] = []
    counts = []
    for rank in range(2):
        stream = data.val_stream(BatchShape(2, 4, 64, rank, 2))
        assert stream is not None
        for _ in range(2):  # again gives the same
            batches = list(stream)
        counts.append(len(batches))
        for batch in batches:
            with_targets = [any(label != IGNORE for label in labels) for _, labels in samples_of(batch)]
            said = questions([batch], tokenizer)
            held += [question for question, counts_ in zip(said, with_targets, strict=True) if counts_]
    assert counts == [4, 4] and len(held) == len(set(held)) == 15
    assert not trained & set(held) and len(trained) == 45
    given = module(tmp_path, tokenizer, val_sources=[str(write(tmp_path / "val.jsonl", rows(3, seed=9)))])
    stream = given.val_stream(BatchShape(4, 4, 64))
    assert stream is not None and questions(list(stream)[:1], tokenizer)[:3] == ["9-0", "9-1", "9-2"]
    assert given.train_stream(SHAPE).samples_per_epoch == 60


@pytest.mark.parametrize("number", [1, 9, 10, 11, 20, 21])
def test_sample_of_a_source(tmp_path: Path, tokenizer: Tokenizer, number: int) -> None:
    path = write(tmp_path / "ten.jsonl", rows(10))
    stream = module(tmp_path, tokenizer, [f"{path}#{number}"], val_fraction=0.0).train_stream(BatchShape(1, 1, 64))
    assert stream.samples_per_epoch == number
    counts = Counter(questions(take(stream, number), tokenizer))
    assert sorted(counts.values()) == sorted(
        [number // 10 + 1] * (number % 10) + [number // 10] * (10 - number % 10 if number >= 10 else 0)
    )


@pytest.mark.parametrize(
    ("number", "trained", "held_out"), [(4, 3, 1), (8, 6, 2), (0.5, 4, 1), (10, 8, 2), (25, 23, 2), (1, 1, 0)]
)
def test_sample_counts_training_and_validation_alike(
    tmp_path: Path, tokenizer: Tokenizer, number: float, trained: int, held_out: int
) -> None:
    source = {"path": str(write(tmp_path / "ten.jsonl", rows(10))), "sample": number}
    data = module(tmp_path, tokenizer, [source], val_fraction=0.25)
    training, validation = data.train_stream(BatchShape(1, 1, 64)), data.val_stream(BatchShape(1, 1, 64))
    said = questions(take(training, training.samples_per_epoch or 0), tokenizer)
    held = questions(list(validation or []), tokenizer)
    assert (len(said), len(held)) == (trained, held_out) and not set(said) & set(held)
    other = module(tmp_path, tokenizer, [source["path"]], val_sources=[source])
    stream = other.val_stream(BatchShape(1, 1, 64))
    assert stream is not None and stream.samples_per_epoch == min(trained + held_out, 10)


def test_one_source_does_not_change_what_is_drawn_from_another(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first = write(tmp_path / "first.jsonl", rows(20, seed=1))
    drawn = []
    for count in (5, 30):
        second = write(tmp_path / f"second-{count}.jsonl", rows(count, seed=2))
        stream = module(tmp_path, tokenizer, [f"{first}#7", str(second)]).train_stream(BatchShape(1, 1, 64))
        said = questions(take(stream, stream.samples_per_epoch or 0), tokenizer)
        drawn.append(sorted(question for question in said if question.startswith("1-")))
    assert drawn[0] == drawn[1] and len(drawn[0]) == 6  # one of the seven is held out


@pytest.mark.parametrize(("stopping", "expected"), [("first_exhausted", [30, 10]), ("all_exhausted", [120, 40])])
def test_interleaved_in_proportion(
    tmp_path: Path, tokenizer: Tokenizer, stopping: Any, expected: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [
        {"path": str(write(tmp_path / "a.jsonl", rows(30, seed=1))), "weight": 3},
        {"path": str(write(tmp_path / "b.jsonl", rows(40, seed=2))), "weight": 1},
    ]
    data = module(tmp_path, tokenizer, sources, mix="interleave", stopping=stopping, val_fraction=0.0)
    stream = data.train_stream(BatchShape(1, 1, 200))
    said = questions(take(stream, stream.samples_per_epoch or 0), tokenizer)
    assert [sum(question.startswith(f"{seed}-") for question in said) for seed in (1, 2)] == expected
    assert "a.jsonl: " in capsys.readouterr().err.replace(f"{tmp_path}/", "")


def test_channels_and_weights_reach_the_batch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = [
        {"path": str(write(tmp_path / "a.jsonl", rows(6, seed=1, weight=0.5))), "channel": "math"},
        {"path": str(write(tmp_path / "b.jsonl", rows(6, seed=2, channel="code")))},
    ]
    data = module(tmp_path, tokenizer, sources, val_fraction=0.0)
    stream: Any = data.train_stream(BatchShape(12, 12, 64))
    (batch,) = take(stream, 1)
    assert stream.samples.channels == ["code", "math"] and batch.channels is not None and batch.weights is not None
    for number, question in enumerate(questions([batch], tokenizer)):
        in_document = batch.documents == number
        trained = in_document & (batch.labels != IGNORE)
        assert set(batch.channels[in_document].tolist()) == {question.startswith("1-")}
        assert set(batch.weights[trained].tolist()) == {0.5 if question.startswith("1-") else 1.0}
        assert not batch.weights[in_document & (batch.labels == IGNORE)].any()


BAD = [
    ("not json", "not JSON"),
    (json.dumps([1]), "not an object"),
    (json.dumps({"query": "q"}), "no answer"),
    (json.dumps({"query": "q", "response": 5}), "answer is not text"),
    (json.dumps({"messages": [{"role": "x", "content": "q"}]}), "unknown role"),
    ('{"query": "q", "response": "\\ud800"}', "unpaired surrogate"),
    (b'{"query": "q", "response": "\xff"}', "not UTF-8"),
    (json.dumps({"query": "q", "response": "a", "tools": "{"}), "tools: not JSON"),
    ("[" * 3000, "not JSON"),
    ("{}", "empty row"),
]


def test_two_thousand_bad_rows_are_counted(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    order = random.Random(5)
    chosen = [order.choice(BAD) for _ in range(2000)]
    good = [json.dumps(row) for row in rows(50)]
    lines: list[tuple[Any, str]] = [*chosen, *((line, "") for line in good)]
    order.shuffle(lines)
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line, _ in lines) + b"\n\n")
    data = module(tmp_path, tokenizer, [str(path)], on_error="drop")
    report = data.report()[str(path)]
    assert report["rows"] == 2050 and report["reasons"] == dict(
        Counter(reason for reason in (r for _, r in lines) if reason)
    )
    assert len(report["first"]) == 10
    where = next(number for number, (_, reason) in enumerate(lines, 1) if reason)
    assert report["first"][0].startswith(f"{path}:{where}: {lines[where - 1][1]}")
    data.train_stream(BatchShape(1, 2, 64, rank=1, ranks=2))
    assert "left out:" not in capsys.readouterr().err  # the first rank says it
    data.train_stream(BatchShape(1, 2, 64, rank=0, ranks=2))
    said = capsys.readouterr().err
    assert "2,000 of 2,050 rows left out" in said and f":{where}:" not in said
    module(tmp_path, tokenizer, [str(path)], on_error="warn").train_stream(BatchShape(1, 2, 64))
    assert report["first"][9] in capsys.readouterr().err
    for _ in range(2):  # with samples made by now, too
        with pytest.raises(UserError) as raised:
            module(tmp_path, tokenizer, [str(path)], on_error="raise")
        assert str(raised.value).startswith(report["first"][0]) and str(raised.value).endswith("data.on_error: drop")


def test_overlong_samples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [
        *rows(4),
        {"query": "number 9-9", "response": "fox " * 200},
        {"query": "fox " * 100 + "number 8-8\n", "response": "a"},
    ]
    sources = [str(write(tmp_path / "long.jsonl", lines))]
    counts = {}
    for how in ("drop", "truncate_right", "truncate_left", "split"):
        data = module(tmp_path, tokenizer, sources, val_fraction=0.0, on_overlong=how)
        stream = data.train_stream(BatchShape(1, 1, 70))
        batches = take(stream, stream.samples_per_epoch or 0)
        assert max(batch.ids.shape[1] for batch in batches) <= 70
        assert all(batch.targets for batch in batches)
        counts[how] = len(batches)
        report = data.report()[sources[0]]
        assert (report["overlong"], report["untrained"]) == (2, how == "truncate_right")
        assert report["rows"] == 6 and not report["reasons"]
    assert counts["drop"] == 4 and counts["truncate_right"] == 5 and counts["truncate_left"] == 6
    assert counts["split"] > 8
    with pytest.raises(UserError, match=r"train\.max_seq_length: 70"):
        module(tmp_path, tokenizer, sources, on_overlong="raise").train_stream(BatchShape(1, 1, 70))
    with pytest.raises(UserError, match="none of"):
        module(tmp_path, tokenizer, sources, on_overlong="drop").train_stream(BatchShape(1, 1, 4))
    untrained = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": False}]
    (tmp_path / "untrained.jsonl").write_text(json.dumps({"messages": untrained}))
    with pytest.raises(UserError, match="none of 1 samples has trained tokens; set `loss` or `weight`"):
        module(tmp_path, tokenizer, [str(tmp_path / "untrained.jsonl")]).train_stream(BatchShape(1, 1, 70))


def test_overlong_samples_of_validation(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are left out and counted like those for training; with none left there is no validation."""
    long = {"query": "number 9-9", "response": "fox " * 200}
    train = str(write(tmp_path / "train.jsonl", rows(4)))
    for lines, left in (([long], None), ([long, *rows(2)], 2)):
        held_out = str(write(tmp_path / "held_out.jsonl", lines))
        data = module(tmp_path, tokenizer, [train], val_sources=[held_out], on_overlong="drop")
        stream = data.val_stream(BatchShape(1, 1, 70))
        assert (stream and stream.samples_per_epoch) == left
        printed = capsys.readouterr().err
        assert "val: 1 samples are longer than 70 tokens (drop); 1 left out" in printed
        assert ("val: none of 1 samples has an answer" in printed) == (left is None)
        assert data.report()[held_out]["overlong"] == 1


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "at least one"),
        (["nowhere.jsonl"], "no such file"),
        ([{"path": "x", "colums": {}}], "did you mean columns"),
        ([{"format": "auto"}], "use a path"),
        ([{"path": "x", "format": "chat"}], "use auto, messages"),
        ([{"path": "x", "sample": -1}], "sample: -1"),
        ([{"path": "x", "weight": "2"}], "weight: '2'"),
        ([3.5], "use a path"),
    ],
)
def test_invalid_sources(tmp_path: Path, tokenizer: Tokenizer, sources: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        module(tmp_path, tokenizer, sources)
    assert "\n" not in str(raised.value) and "data" in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": [{"path": "x", "weight": 2}]}, "data.sources: weight: 2 has no effect with data.mix: concat; set"),
        (
            {"stopping": "all_exhausted"},
            "data.stopping: all_exhausted has no effect with data.mix: concat; set data.mix",
        ),
        (
            {"val_sources": [{"path": "x", "weight": 2}], "mix": "interleave"},
            "data.val_sources: weight: 2 has no effect with validation; set it in data.sources",
        ),
        ({"prompt_style": "alpaca", "system": "Be brief."}, "data.system: 'Be brief.' is not supported with data.p"),
        ({"prompt_style": "alpaca", "date": "2025-01-01"}, "data.date: 2025-01-01 has no effect with data.prompt"),
        ({"val_sources": "x", "val_fraction": 0.1}, "data.val_fraction: 0.1 has no effect with data.val_sources; set"),
        (
            {"sources": [{"path": "x", "val_fraction": 0.1}], "val_sources": "x"},
            "data.sources: val_fraction: 0.1 has no effect with data.val_sources",
        ),
    ],
)
def test_a_setting_without_effect_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Conversations(**{"sources": "x"} | settings)


@pytest.mark.parametrize(("setting", "value"), [("length", 64), ("strategy", "sequential")])
def test_settings_of_packing_need_it(setting: str, value: Any) -> None:
    message = (
        f"data.packing.{setting}: {value} has no effect with data.packing.enabled: false; set data.packing.enabled"
    )
    with pytest.raises(UserError, match=message):
        Packing(**{setting: value})


def test_packed_rows_are_at_most_as_long_as_samples(tokenizer: Tokenizer) -> None:
    data = Conversations(sources="x", packing=Packing(True, 65))
    data.connect(tokenizer, 1, 65)
    with pytest.raises(
        UserError, match=r"data.packing.length: 65 is longer than train.max_seq_length: 64; use at most 64"
    ):
        data.connect(tokenizer, 1, 64)


def instructions(count: int) -> list[dict[str, str]]:
    return [{"instruction": f"number 0-{n}\n", "input": "i" * (n % 2), "output": "the fox"} for n in range(count)]


def test_litgpt_json(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Prompt by the style, tokenized by itself; answer and end of text behind it; all of it trained unless masked."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps(instructions(40)))
    for mask in (False, True):
        data = JSON(path, mask_prompt=mask, num_workers=0)
        data.connect(tokenizer)
        data.prepare_data()
        stream = data.train_stream(BatchShape(1, 1, 200))
        assert stream.samples_per_epoch == 38 and data.val_stream(BatchShape(1, 1, 200)) is not None
        (batch,) = take(stream, 1)
        text = tokenizer.processor.decode(batch.ids[0].tolist(), skip_special_tokens=False)
        prompt, answer = text.split("### Response:\n")
        number = int(prompt.split("number 0-")[1].split("\n")[0])
        row = instructions(40)[number]
        assert answer == "the fox<|im_end|>" and ("### Input:\ni\n" in prompt) == bool(row["input"])
        written = data.style.apply(row["instruction"], input=row["input"])
        ids = [*tokenizer.encode(written).tolist(), *tokenizer.encode("the fox", bos=False, eos=True).tolist()]
        assert batch.ids[0].tolist() == ids
        size = len(tokenizer.encode(written))
        assert int((batch.labels == IGNORE).sum()) == 1 + (size - 1 if mask else 0)


def test_litgpt_json_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "train.jsonl", instructions(5))
    (tmp_path / "val.json").write_text(json.dumps(instructions(3)))
    data = JSON(tmp_path, num_workers=0, prompt_style="phi-2")
    data.connect(tokenizer)
    data.prepare_data()
    val = data.val_stream(BatchShape(1, 1, 200))
    assert data.train_stream(SHAPE).samples_per_epoch == 5 and val is not None and val.samples_per_epoch == 3
    with pytest.raises(UserError, match="val_split_fraction"):
        JSON(tmp_path, val_split_fraction=0.1)
    with pytest.raises(UserError, match="ignore_index"):
        JSON(tmp_path, ignore_index=0)
    with pytest.raises(UserError, match="did you mean alpaca"):
        JSON(tmp_path, prompt_style="alpac")


def test_samples_are_made_once_and_again_for_another_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    module(tmp_path, tokenizer)
    assert "tokenized" in capsys.readouterr().err
    module(tmp_path, tokenizer)
    assert "tokenized" not in capsys.readouterr().err
    other = write_tokenizer(tmp_path / "other", "marked")
    module(tmp_path, other)
    assert "tokenized" in capsys.readouterr().err
    (damaged,) = list((tmp_path / "cache").glob("*/tokens.npy"))[:1]
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"tokens.npy"):  # which of the two was damaged is left open
        _ = [module(tmp_path, each) for each in (tokenizer, other)]


@pytest.mark.parametrize("settings", [{}, {"tokenize": "lazy"}, {"streaming": True}, {"prompt_style": "alpaca"}])
def test_columns_and_fields_that_nothing_reads_are_counted(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], settings: dict[str, Any]
) -> None:
    said = [{"role": "user", "content": "q", "name": "Ada"}, {"role": "assistant", "content": "a"}]
    lines = [{"messages": said, "id": 7}, {"messages": said[1:], "id": 8, "tags": []}, *rows(4)]
    fraction = {} if "streaming" in settings else {"val_fraction": 0.0}
    data = module(tmp_path, tokenizer, [str(write(tmp_path / "rows.jsonl", lines))], **fraction, **settings)
    stream = data.train_stream(BatchShape(1, 1, 64))
    take(stream, 8)
    reports = stream.report() or data.report()
    (report,) = reports.values()
    assert report["unread"] == {"id": 2, "messages.name": 1} and report["reasons"] == {}
    error = capsys.readouterr().err
    assert error.count("not read: ") == 1
    assert ("not read: id (2 rows), messages.name (1 rows)" in error) == ("streaming" not in settings)
