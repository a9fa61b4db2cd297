"""Lists of prompts in `LLM.generate`, and the engine that it keeps between calls."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt import LLM
from litgpt.api import benchmark_dict_to_markdown_table
from litgpt.data.tokenizer import train_tokenizer
from litgpt.errors import UserError
from litgpt.infer.constraint import GrammarConstraint
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.store.save_model import save_model_folder
from tests import runs

PROMPTS = ["the fox", "a", "the lazy dog jumps over a cat while it rains on the green hill " * 2, "the fox"] * 9
SETTINGS: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    train_tokenizer(["the fox and the dog jump over a lazy cat while it rains " * 30], "bpe", 300, root / "tokenizer")
    torch.manual_seed(0)
    model = GPT(Config(**{**runs.SHAPE, "block_size": 256, "name": "tiny"}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    save_model_folder(
        root / "tiny", config=model.config, tensors=model.named_parameters(), tokenizer_dir=root / "tokenizer"
    )
    return root / "tiny"


@pytest.fixture
def llm(folder: Path) -> LLM:
    return LLM.load(folder, distribute=None)


def test_texts_of_a_list_are_those_of_each_prompt_in_order(llm: LLM) -> None:
    texts = llm.generate(PROMPTS, **SETTINGS)
    assert texts == [llm.generate(prompt, **SETTINGS) for prompt in PROMPTS] and len(set(texts)) == 3
    ids = llm.generate(PROMPTS[:3], return_as_token_ids=True, **SETTINGS)
    assert [llm.tokenizer.decode(row) for row in ids] == texts[:3] and ids[0].dtype == torch.int64
    stop = texts[0][3:6]
    ended = llm.generate(PROMPTS[:2], stop=stop, **SETTINGS)
    assert ended == [llm.generate(prompt, stop=stop, **SETTINGS) for prompt in PROMPTS[:2]] and stop not in ended[0]
    assert llm.generate([], **SETTINGS) == []


def test_each_text_of_a_list_has_a_seed_of_its_own(llm: LLM) -> None:
    texts = llm.generate(["the fox"] * 3, max_new_tokens=12, temperature=2.0, seed=5)
    alone = [llm.generate("the fox", max_new_tokens=12, temperature=2.0, seed=seed) for seed in (5, 6, 7)]
    assert texts == alone and len(set(texts)) == 3


def test_a_prompt_of_a_list_that_does_not_fit_is_named(llm: LLM) -> None:
    with pytest.raises(UserError, match=r"^prompt 2 of 2: prompt: \d+ tokens exceed the model's context of 256"):
        llm.generate(["a", "the fox " * 300])
    for key, value in {"stream": True, "on_token": print}.items():
        with pytest.raises(UserError, match=f"^{key}: .* is not supported with a list of prompts; leave it out"):
            llm.generate(["a"], **{key: value})
    llm.distribute(accelerator="cpu", fixed_kv_cache_size=6)
    with pytest.raises(UserError, match="fixed_kv_cache_size: 6 is less than"):
        llm.generate(["the fox"], **SETTINGS)


def test_the_engine_is_kept_and_its_prefixes_are_shared(llm: LLM) -> None:
    prompt = PROMPTS[2]
    first = llm.generate(prompt, **SETTINGS)
    engine = llm.kept_engine.engine
    assert engine is not None and engine.cache.find_prefix(llm.prompt_tokens(prompt))[1] > 16
    assert llm.generate([prompt, prompt], **SETTINGS) == [first, first] and llm.kept_engine.engine is engine
    with torch.no_grad():
        llm.model.embedding.weight.mul_(-2)
    changed = llm.generate(prompt, **SETTINGS)
    assert changed == copy.deepcopy(llm).generate(prompt, **SETTINGS) != first  # a copy has a new engine
    llm.to(torch.float64)
    assert llm.generate(prompt, **SETTINGS) and llm.kept_engine.engine is not engine


def test_a_stream_that_is_not_read_to_its_end_does_not_change_others(llm: LLM) -> None:
    expected = llm.generate("the fox", **SETTINGS)
    stream = llm.generate("the fox", stream=True, **SETTINGS)
    beginning = next(stream)
    assert llm.generate("the fox", **SETTINGS) == expected
    assert beginning + "".join(stream) == expected


def test_generation_on_several_devices_is_refused(llm: LLM) -> None:
    message = "generate_strategy: 'sequential' with devices: 2 is not supported, .* set None and devices: 1"
    with pytest.raises(UserError, match=message):
        llm.distribute(generate_strategy="sequential", devices=2)


def test_a_table_of_the_figures_of_a_benchmark() -> None:
    table = benchmark_dict_to_markdown_table({"Seconds total": [1.0, 3.0], "Tokens generated": [7]})
    assert table.splitlines()[2:] == ["| Seconds total | 2.00 | 1.41 |", "| Tokens generated | 7.00 |  |"]


def test_a_cache_of_fixed_size(llm: LLM) -> None:
    free = llm.generate("the fox", temperature=0, max_new_tokens=9)
    llm.distribute(accelerator="cpu", fixed_kv_cache_size="max_model_supported")
    assert llm.generate("the fox", temperature=0, max_new_tokens=9) == free
    llm.distribute(accelerator="cpu", fixed_kv_cache_size=6)
    with pytest.raises(UserError, match="fixed_kv_cache_size: 6"):
        llm.generate("the fox", temperature=0, max_new_tokens=9)


def test_benchmark_counts_what_is_written(llm: LLM) -> None:
    text, figures = llm.benchmark(2, prompt="the fox", max_new_tokens=7, temperature=0)
    assert text == llm.generate("the fox", max_new_tokens=7, temperature=0)
    assert figures["Tokens generated"] == [7, 7] and len(figures) == 5
    for total, first, speed in zip(*(figures[key] for key in list(figures)[:2] + list(figures)[3:4]), strict=True):
        assert 0 < first <= total and speed == pytest.approx(7 / total)


def test_the_loss_of_the_tokenizers_own_ids(llm: LLM) -> None:
    ids = llm.tokenizer.encode("the fox and the dog")[None]
    assert ids.dtype == torch.int32 and torch.equal(llm(ids, ids)[1], llm(ids.long(), ids.long())[1])


def test_a_constraint_that_fails_ends_a_list_with_its_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail_later(_self: GrammarConstraint) -> torch.Tensor:
        calls.append(len(calls))
        if len(calls) > 6:
            raise UserError("regex: too complex")
        return torch.ones(llm.config.padded_vocab_size or 0, dtype=torch.bool)

    monkeypatch.setattr(GrammarConstraint, "allowed", fail_later)
    monkeypatch.setattr(GrammarConstraint, "accept", lambda _self, _token: None)
    with pytest.raises(UserError, match="regex: too complex"):
        llm.generate(PROMPTS[:3], regex="[a-z ]*", **SETTINGS)
