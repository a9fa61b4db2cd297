"""Every setting of the data modules of your own data has an effect on the batches, the cache, or is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.data import JSON, Conversations, Preferences, TextFiles
from litgpt.data.modules.finetuning import Packing
from litgpt.data.read.media_urls import MediaUrls
from litgpt.data.render.loss_weights import WeightRule
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.recipe.data import BatchShape
from litgpt.recipe.keys import list_settings
from tests.data.conversation_rows import take, write
from tests.data.templates import write_tokenizer

pytestmark = pytest.mark.slow

LENGTH = 500
TEMPLATE = """{{ strftime_now('%Y') }}{{ flag }}{% for message in messages %}{{ message.content }}{% endfor %}"""
TOOL = {"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": {}}}}
MIXED = {"sources": ["rows.jsonl", "more.jsonl"]}
STREAMED: dict[str, Any] = {"streaming": True}
SHARED: dict[str, tuple[Any, dict[str, Any]]] = {
    "seed": (7, {}),
    "shuffle": (False, {}),
    "num_workers": (1, {}),
    "packing": (Packing(True), {}),
    "tokenize": ("lazy", {}),
    "padding": (True, {}),
    "group_by_length": (2, {"padding": True}),
}
VALUES: dict[type, dict[str, tuple[Any, dict[str, Any]]]] = {
    Conversations: {
        **SHARED,
        "sources": ("more.jsonl", {}),
        "val_sources": ("more.jsonl", {}),
        "val_fraction": (0.5, {}),
        "streaming": (True, {}),
        "shuffle_buffer": (3, STREAMED),
        "val_rows": (3, STREAMED),
        "mix": ("interleave", MIXED),
        "stopping": ("all_exhausted", MIXED | {"mix": "interleave"}),
        "train_on": ("everything", {}),
        "end_of_turn": ("none", {}),
        "weights": ([WeightRule(2, keyword="many")], {}),
        "tool_format": ("hermes", {"sources": "tools.jsonl"}),
        "system": ("Be brief.", {}),
        "model_name": ("Aster", {"sources": "named.jsonl", "model_author": "Vega"}),
        "model_author": ("Vega", {"sources": "named.jsonl", "model_name": "Aster"}),
        "prompt_style": ("alpaca", {"sources": "single.jsonl"}),
        "chat_template": (Path("chat.jinja"), {}),
        "template_args": ({"flag": "x"}, {"chat_template": Path("chat.jinja")}),
        "date": ("2025-05-05", {"chat_template": Path("chat.jinja")}),
        "cache_dir": (Path("elsewhere"), {}),
        "media_dir": (Path("/"), {"sources": "pictured.jsonl", "on_error": "drop"}),
        "media_urls": (MediaUrls(True), {"sources": "linked.jsonl", "on_error": "drop"}),
        "split_sounds": (True, {}),
        "video_sounds": (True, {}),
        "null_prompt": (0.1, {}),
        "on_error": ("drop", {"sources": "bad.jsonl"}),
        "on_overlong": ("truncate_right", {"sources": "long.jsonl"}),
    },
    JSON: {
        **SHARED,
        "json_path": (Path("more.json"), {}),
        "val_split_fraction": (0.5, {}),
        "mask_prompt": (True, {}),
        "prompt_style": ("default", {}),
        "ignore_index": (-1, {}),
        "on_error": ("drop", {"json_path": Path("bad.json")}),
        "on_overlong": ("drop", {"json_path": Path("long.json")}),
    },
    TextFiles: {
        "train_data_path": (Path("other"), {}),
        "val_data_path": (Path("other"), {}),
        "seed": (7, {}),
        "shuffle": (False, {}),
        "num_workers": (1, {}),
        "document_mask": (True, {}),
        "cache_dir": (Path("elsewhere"), {}),
        "bad_rows": ("skip", {"train_data_path": Path("bad")}),
    },
}
REFUSED: dict[type, dict[str, str]] = {
    Conversations: {
        "null_prompt": "write the model's folder with `litgpt tokenizer extend`",
        "split_sounds": "has no effect on a model without an audio tower; leave it out",
        "video_sounds": "has no effect on a model that does not hear videos; leave it out",
    },
    Preferences: {
        "train_on": "set data.train_on: answers",
        "null_prompt": "not supported by Preferences; leave it out",
        "split_sounds": "has no effect on a model without an audio tower; leave it out",
        "video_sounds": "has no effect on a model that does not hear videos; leave it out",
    },
}
"""Settings that a data module does not support, and the end of the error."""
PAIRED_FILES = {
    f"{name}.jsonl": f"{name}_pairs.jsonl"
    for name in ("rows", "more", "long", "bad", "tools", "single", "named", "pictured", "linked")
}


def use_pairs(value: Any) -> Any:
    """Replace the names of files of conversations in settings by those of files of pairs."""
    if isinstance(value, dict):
        return {name: use_pairs(item) for name, item in value.items()}
    return [use_pairs(item) for item in value] if isinstance(value, list) else PAIRED_FILES.get(str(value), value)


VALUES[Preferences] = {
    name: (use_pairs(value), use_pairs(given)) for name, (value, given) in VALUES[Conversations].items()
}
USUAL: dict[type, dict[str, Any]] = {
    Preferences: {"sources": "rows_pairs.jsonl", "cache_dir": Path("cache"), "num_workers": 0},
    Conversations: {"sources": "rows.jsonl", "cache_dir": Path("cache"), "num_workers": 0},
    JSON: {"json_path": Path("rows.json"), "num_workers": 0},
    TextFiles: {"train_data_path": Path("text"), "num_workers": 0},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), "chatml")


def write_data(folder: Path) -> None:
    """Write rows, usual, long and invalid ones, and text."""

    def talk(number: int, words: int) -> dict[str, Any]:
        turns = [{"role": "user", "content": f"How {number}?"}, {"role": "assistant", "content": "many " * words}]
        return {"messages": turns * 2}

    def answer(number: int, words: int) -> dict[str, str]:
        return {"instruction": f"How {number}?", "output": "many " * words}

    sizes = {"rows": range(1, 25), "more": range(3, 11), "long": [*range(1, 20), 900]}
    for name, words in sizes.items():
        write(folder / f"{name}.jsonl", [talk(n, count) for n, count in enumerate(words)])
        (folder / f"{name}.json").write_text(json.dumps([answer(n, count) for n, count in enumerate(words)]))
    write(folder / "single.jsonl", [{"query": f"How {n}?", "response": "many " * (n + 1)} for n in range(20)])
    named = [{"query": f"Who {n}?", "response": "{{NAME}} of {{AUTHOR}}"} for n in range(20)]
    write(folder / "named.jsonl", named)
    write(folder / "tools.jsonl", [talk(n, 3) | {"tools": [TOOL]} for n in range(8)])
    write(folder / "pictured.jsonl", [talk(n, 3) | ({"image": "/a.png"} if n == 3 else {}) for n in range(8)])
    write(folder / "linked.jsonl", [talk(n, 3) | ({"image": "http://[::1]"} if n == 3 else {}) for n in range(8)])
    write(folder / "bad.jsonl", [talk(1, 3), {"messages": [{"role": "user"}]}, *(talk(n, 3) for n in range(5))])
    (folder / "bad.json").write_text(json.dumps([*(answer(n, 3) for n in range(5)), {"instruction": 3}]))
    for path in sorted(folder.glob("*.jsonl")):  # the same with another answer
        rows = map(json.loads, path.read_text().splitlines())
        write(folder / PAIRED_FILES[path.name], [row | {"rejected_response": "few"} for row in rows])
    (folder / "chat.jinja").write_text(TEMPLATE)
    for name in ("text", "other", "bad"):
        (folder / name).mkdir()
        for number in range(3):
            text = " ".join(f"{name} {number * 7 + position * position % 97}" for position in range(400))
            (folder / name / f"{number}.txt").write_text(text)
    (folder / "bad/3.jsonl").write_text('{"text": "ok"}\nnot json\n')


def read_facts(cls: type, settings: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> Any:
    """Batches, length, workers, report and cache of a data module; the error if it is refused."""
    try:
        data = cls(**USUAL[cls] | settings)
        data.connect(tokenizer, 2, LENGTH)
        data.prepare_data()
        data.setup()
        shape = BatchShape(2, 4, LENGTH)
        train, validation = data.train_stream(shape), data.val_stream(shape)
        batches = [take(train, 12), list(validation or ())]
        workers = train._workers
        train.close()
    except UserError as error:
        return str(error)
    values = [
        {name: value.tolist() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        for part in batches
        for batch in part
    ]
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return [values, len(batches[1]), train.samples_per_epoch, workers, data.report(), files]


def test_every_setting_has_a_value() -> None:
    assert {cls: set(list_settings(cls)) for cls in VALUES} == {cls: set(values) for cls, values in VALUES.items()}


@pytest.mark.parametrize(
    ("cls", "name"),
    [(cls, name) for cls, values in VALUES.items() for name in values],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_setting_has_an_effect(
    cls: type, name: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value, given = VALUES[cls][name]
    facts = []
    for settings in (given, given | {name: value}):
        folder = tmp_path / str(len(facts))
        folder.mkdir()
        write_data(folder)
        monkeypatch.chdir(folder)
        facts.append(read_facts(cls, settings, tokenizer, folder))
    if name in REFUSED.get(cls, {}):
        assert str(facts[1]).endswith(REFUSED[cls][name])
        return
    assert facts[0] != facts[1]
    assert name in ("on_error", "bad_rows", "tool_format", "model_name", "model_author") or isinstance(
        facts[0], list
    ), facts[0]
    assert name == "ignore_index" or isinstance(facts[1], list), facts[1]
