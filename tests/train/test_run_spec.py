"""The shape of a run: fields of a saved model that may be changed, and vocabularies that do not fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.api import LLM
from litgpt.data.tokenizer import Tokenizer, train_tokenizer
from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.recipe.finetune import FinetuneFull
from litgpt.recipe.pretrain import Pretrain
from litgpt.store.save_model import save_model_folder
from litgpt.train.run_spec import build_finetune_spec, build_pretrain_spec, check_token_range
from tests.runs import SHAPE

SCALED = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 32}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with scaled rotary embeddings."""
    folder = tmp_path_factory.mktemp("base")
    train_tokenizer(["a"], "bytes", 0, folder / "tokenizer")
    model = GPT(Config(**{**SHAPE, "rope_adjustments": SCALED}))
    initialize(model, 0)
    tensors = dict(model.named_parameters())
    save_model_folder(folder / "model", config=model.config, tensors=tensors, tokenizer_dir=folder / "tokenizer")
    return folder / "model"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dropout": 0.1, "norm_eps": None}, {"dropout": 0.1, "norm_eps": 1e-5}),
        ({"rope_adjustments": {"factor": 8.0}}, {"rope_adjustments": SCALED | {"factor": 8.0}}),
        (
            {"rope_adjustments": {key: None for key in SCALED if key != "factor"}},
            {"rope_adjustments": {"factor": 4.0}},
        ),
        ({"block_size": 4096, "rope_base": 5e5}, {"block_size": 4096, "rope_base": 500000}),
    ],
)
def test_fields_that_change_no_tensor_are_overridden(base: Path, changes: Any, expected: dict[str, Any]) -> None:
    recipe = FinetuneFull(base, model_config=changes)
    spec = build_finetune_spec(recipe, base, str(base))
    config = spec.config.to_dict()
    assert {key: config[key] for key in expected} == expected
    rest = build_finetune_spec(FinetuneFull(base), base, str(base)).config.to_dict()
    assert {key for key in rest if rest[key] != config[key]} <= expected.keys()
    named = build_pretrain_spec(Pretrain("Llama-3.2-1B", {"rope_adjustments": {"factor": 8.0}})).config
    assert named.rope_adjustments == {**Config.from_name("Llama-3.2-1B").rope_adjustments, "factor": 8.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.1, "n_layer": 1}, r"model_config.n_layer: 1 changes blocks\.1\..* to no tensor; leave it out"),
        ({"padded_vocab_size": 512}, r"model_config.padded_vocab_size: 512 changes embedding.weight from \[\d+, "),
        ({"tie_embeddings": True}, "model_config.tie_embeddings: True changes head.weight from .* to no tensor"),
        ({"dropout": 2}, "model_config.dropout: 2 is not in"),
        ({"drop": 2}, "model_config.drop: unknown field; did you mean dropout"),
        ({"rope_adjustments": {"kind": 3.0}}, "model_config.rope_adjustments: .* is not a kind of scaling"),
    ],
)
def test_fields_that_change_a_tensor_are_refused(base: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_finetune_spec(FinetuneFull(base, model_config=changes), base, str(base))


def test_a_cure_is_a_key_of_the_command(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set model_config.padded_vocab_size: \d+$"):
        build_pretrain_spec(Pretrain("pythia-14m", initial_checkpoint_dir=base))
    batch: Any = type("Batch", (), {"ids": torch.tensor([9999]), "labels": torch.tensor([3])})
    spec = build_finetune_spec(FinetuneFull(base), base, str(base))
    with pytest.raises(UserError, match=r"data: holds token 9999, but the model has .* use the model's own tokenizer"):
        check_token_range(batch, spec)
    with pytest.raises(UserError, match=r"set model_config.padded_vocab_size: 10048"):
        check_token_range(batch, replace(spec, weights=None))
    (tmp_path / "model_config.yaml").write_text("n_embd: 33\nn_head: 4\n")
    with pytest.raises(UserError, match=r"^.*/model_config.yaml: n_embd: 33 is not divisible by n_head 4"):
        Config.from_checkpoint(tmp_path)


def test_a_tokenizer_that_is_much_smaller_than_the_vocabulary(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer(base)  # of 258 tokens
    # the sizes of phi-2, command-r, gpt-oss and Qwen2.5 in proportion, and multiples of 512
    for tokens, rows in ((50295, 51200), (255029, 256000), (200019, 201088), (151665, 151936), (258, 512), (258, 770)):
        tokenizer.id_limit = tokens
        tokenizer.check_rows(rows, "")
    assert tokenizer.warnings == []
    tokenizer.check_rows(51200 * 6, "use another")
    assert "has 258 tokens, but the model has 307,200 rows; use another" in tokenizer.warnings[0]
    model = GPT(Config(**{**SHAPE, "padded_vocab_size": 1024}))
    save_model_folder(tmp_path / "m", config=model.config, tensors=dict(model.named_parameters()), tokenizer_dir=base)
    LLM.load(tmp_path / "m", distribute=None)
    assert "the tokenizer has 258 tokens, but the model has 1,024 rows; use the" in capsys.readouterr().err
    LLM.load(base, distribute=None)
    assert capsys.readouterr().err == ""
