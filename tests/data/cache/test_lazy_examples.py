"""Lazily tokenized samples: the same batches as those tokenized ahead, and errors when they are read."""

from pathlib import Path

import pytest

from litgpt.data.modules.finetuning import Packing
from litgpt.data.render.loss_weights import WeightRule
from litgpt.data.stream.batch import IGNORE
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.messages import mute_messages
from litgpt.recipe.data import BatchShape
from tests.data.conversation_rows import equal, module, rows, samples_of, take, write
from tests.data.templates import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), "chatml")


SHAPE = BatchShape(4, 8, 64)


def test_lazy_batches_equal_those_tokenized_ahead(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [*rows(30, channel="a"), *rows(10, seed=1, weight=0.5), {"text": "the quick brown fox " * 20}]
    sources = [str(write(tmp_path / "rows.jsonl", lines))]
    for settings in (
        {},
        {"padding": True},
        {"weights": [WeightRule(2, keyword="fox")]},
        {"on_overlong": "truncate_left"},
    ):
        settings = {"on_overlong": "truncate_right"} | settings
        ahead, lazy = (module(tmp_path, tokenizer, sources, tokenize=how, **settings) for how in ("ahead", "lazy"))
        pairs = zip(take(ahead.train_stream(SHAPE), 12), take(lazy.train_stream(SHAPE), 12), strict=True)
        assert all(equal(one, other) for one, other in pairs)
        val, other_val = ahead.val_stream(SHAPE), lazy.val_stream(SHAPE)
        assert val is not None and other_val is not None and all(map(equal, val, other_val))


def test_invalid_lazy_samples(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    refused = {"messages": [{"role": "user", "content": "refuse"}, {"role": "assistant", "content": "a"}]}
    sources = [str(write(tmp_path / "rows.jsonl", [*rows(3), refused, {"query": "q", "response": "fox " * 99}]))]
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    )
    settings = {"tokenize": "lazy", "chat_template": template, "val_fraction": 0.0}
    for workers in (0, 1):
        data = module(tmp_path, tokenizer, sources, **settings)
        data.num_workers = workers
        stream = data.train_stream(BatchShape(5, 5, 70))
        with pytest.raises(UserError, match="conversation 4: the chat template rejects it") as raised:
            take(stream, 1)
        assert "\n" not in str(raised.value)
        stream.close()
    stream = module(tmp_path, tokenizer, sources, on_error="drop", **settings).train_stream(BatchShape(5, 5, 70))
    capsys.readouterr()
    with mute_messages(muted=True):  # as on every rank but the first
        take(stream, 1)
    assert not capsys.readouterr().err
    (batch,) = take(stream, 1)
    trained = [any(label != IGNORE for label in labels) for _, labels in samples_of(batch)]
    assert sorted(trained) == [False, False, True, True, True] and "conversation 4" in capsys.readouterr().err
    for other in ({"packing": Packing(True)}, {"on_overlong": "split"}, {"on_overlong": "raise"}):
        with pytest.raises(UserError, match=r"data\.tokenize: ahead"):
            module(tmp_path, tokenizer, sources, **(settings | other))
