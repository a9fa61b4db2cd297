"""A thousand malformed rows of preferences: no exception, and each is counted under its reason."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from litgpt.data.modules.preferences import Preferences
from litgpt.data.tokenizer import Tokenizer
from litgpt.recipe.data import BatchShape
from tests.data.conversation_rows import WORDS, take
from tests.data.templates import write_tokenizer

Row = dict[str, Any]
NESTED: Any = [[[{"a": [None, {"b": [[]]}]}]]]
JUNK: list[Any] = [3, 1.5, True, NESTED[0], {"a": {"b": []}}, [None], [[1]], ["x", {}]]


def say(role: str, content: Any) -> Row:
    return {"role": role, "content": content}


def build_pair(order: random.Random) -> Row:
    """A valid pair in one of four forms."""

    def text() -> str:
        return " ".join(order.choices(WORDS, k=order.randint(1, 6)))

    question, first, second = text(), f"yes {text()}", f"no {text()}"
    before = [say("user", text()), say("assistant", text())] * order.randint(0, 1)
    messages = [*before, say("user", question)]
    return order.choice(
        [
            {"prompt": question, "chosen": first, "rejected": second},
            {"chosen": [*messages, say("assistant", first)], "rejected": [*messages, say("assistant", second)]},
            {"conversations": messages, "chosen": say("assistant", first), "rejected": say("assistant", second)},
            {"messages": [*messages, say("assistant", first)], "rejected_response": second},
        ]
    )


def build_texts(order: random.Random, **values: Any) -> Row:
    return {"prompt": order.choice(WORDS), "chosen": "yes", "rejected": "no"} | values


FAULTS: dict[str, Callable[[random.Random], Any]] = {
    "not an object": lambda order: order.choice([3, "row", [], [1], True, 1.5]),
    "not two answers: no chosen and rejected": lambda order: order.choice(
        [{}, {"prompt": "q", order.choice(["chosen", "rejected"]): "a"}, build_texts(order, rejected=None)]
    ),
    "identical answers": lambda order: order.choice(
        [
            build_texts(order, rejected="yes"),
            {"messages": [say("user", "q"), say("assistant", "a")], "rejected_response": "a"},
            {"chosen": [say("user", "q"), say("gpt", "a")], "rejected": [say("human", "q"), say("assistant", "a")]},
        ]
    ),
    "empty answer": lambda order: build_texts(
        order, **{order.choice(["chosen", "rejected"]): order.choice(["", [], {}, say("assistant", "")])}
    ),
    "no question": lambda order: {
        "chosen": [say("assistant", "a")],
        "rejected": order.choice([[say("assistant", "b")], say("assistant", "b")]),
    },
    "empty question": lambda order: build_texts(order, prompt=""),
    "margin is not a number": lambda order: build_texts(order, margin=order.choice(["much", [], True, float("nan")])),
    "unknown role": lambda order: build_texts(order, chosen=[say(order.choice(["judge", ""]), "x")]),
    "message without content": lambda order: build_texts(order, rejected=[{"role": "assistant"}]),
    "message is not an object": lambda order: {
        "messages": [say("user", "q"), order.choice([3, "x", [], None])],
        "rejected_response": "b",
    },
    "messages is not a list": lambda order: {"messages": order.choice([3, {"a": 1}, True]), "rejected_response": "b"},
    "query is not text": lambda order: build_texts(order, prompt=order.choice(JUNK)),
    "system is not text": lambda order: build_texts(order, system=order.choice(JUNK)),
    "duplicate column": lambda order: build_texts(order, **{order.choice(["question", "rejected_response"]): "x"}),
    "unpaired surrogate": lambda order: build_texts(order, chosen="\ud800" + order.choice(WORDS)),
    "image data is not supported": lambda order: build_texts(order, images=["a.png"]),
    "does not end with an answer": lambda order: {
        "messages": [say("user", order.choice(WORDS))],
        "rejected_response": "b",
    },
    "an answer before chosen and rejected": lambda order: {
        "messages": [say("user", "q"), say("assistant", "a")],
        "chosen": order.choice(["yes", say("assistant", "yes")]),
        "rejected": "no",
    },
    "answer without trained tokens": lambda order: {
        "messages": [say("user", "q"), say("assistant", "a") | {"loss": False}],
        "rejected_response": f"no {order.choice(WORDS)}",
    },
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), "chatml")


def open_rows(path: Path, tokenizer: Tokenizer, **settings: Any) -> Preferences:
    data = Preferences(
        sources=[str(path)], cache_dir=path.parent / "cache", num_workers=0, val_fraction=0.0, **settings
    )
    data.connect(tokenizer)
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("seed", range(2))
def test_malformed_rows_are_counted_by_reason(tmp_path: Path, tokenizer: Tokenizer, seed: int) -> None:
    order = random.Random(seed)
    faults = [order.choice(list(FAULTS)) for _ in range(1000)]
    lines = [json.dumps(FAULTS[fault](order)) for fault in faults]
    pairs = [build_pair(order) for _ in range(20)]
    lines += map(json.dumps, pairs)
    lines += [json.dumps(build_texts(order, chosen="yes " * 50_000))]  # 200 kB
    order.shuffle(lines)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    data = open_rows(path, tokenizer, on_error="drop")
    (_, file), report = data.prepared[0], next(iter(data.report().values()))
    assert report["rows"] == 1021 and report["reasons"] == Counter(faults) and file.count == 21
    stream = data.train_stream(BatchShape(1, 1, 200))
    assert stream.samples_per_epoch == 20 and next(iter(data.report().values()))["overlong"] == 1
    assert all(batch.answers.max() == 1 for batch in take(stream, 20))


VALUES: list[Any] = [
    *("", "a", "b c", "\ud800", "[{", "x" * 5000, None, float("nan"), [], {}, *JUNK),
    say("assistant", "d"),
    [say("assistant", "d")],
    [say("user", "q"), say("assistant", "d")],
    [say("judge", "x")],
]
NAMES = [
    *("prompt", "chosen", "rejected", "messages", "rejected_response", "rejected_messages", "margin", "label"),
    *("system", "tools", "history", "conversations"),
]


@pytest.mark.parametrize("objective", ["pairs", "kto"])
@pytest.mark.parametrize("tokenize", ["ahead", "lazy"])
def test_values_of_all_kinds_in_all_columns(
    tmp_path: Path, tokenizer: Tokenizer, objective: str, tokenize: Any
) -> None:
    """1,000 rows of random values: each is a sample or is counted."""
    order = random.Random(0)
    lines = ['{"prompt": "q", "chosen"', "[" * 5000, '{"prompt": ' + "[" * 5000, "\x00"]
    for _ in range(976):
        names = order.sample(NAMES, order.randint(0, 6)) + ["chosen", "rejected"] * order.randint(0, 1)
        lines.append(json.dumps({name: order.choice(VALUES) for name in names}))
    lines += [json.dumps(build_pair(order)) for _ in range(20)]
    order.shuffle(lines)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    data = Preferences(
        sources=[str(path)], cache_dir=tmp_path / "cache", num_workers=0, tokenize=tokenize, on_error="drop"
    )
    data.set_objective(objective)
    data.connect(tokenizer)
    data.prepare_data()
    (_, file), report = data.prepared[0], next(iter(data.report().values()))
    left_out = sum(report["reasons"].values())
    assert report["rows"] == 1000 and left_out > 500
    assert file.count + left_out == 1000 if objective == "pairs" else file.count + left_out >= 1000
    assert file.count >= 20
    samples = [file.read(number) for number in range(file.count)]
    assert all(len(sample.documents) == 2 for sample in samples)
    assert tokenize == "lazy" or file.tokens == sum(len(np.atleast_1d(sample.ids)) for sample in samples)
