"""The command lines of LitGPT's page on pretraining, as typed, up to the point where the model is built."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from litgpt import cli
from litgpt.errors import UserError
from litgpt.model.registry import lookup_config
from litgpt.recipe.commands import COMMANDS, import_object

ROOT = Path(__file__).parents[2]
TEXT = '--data TextFiles --data.train_data_path "custom_texts/"'
TOKENIZER = "--tokenizer_dir EleutherAI/pythia-160m"
LINES = [
    "litgpt pretrain pythia-14m --config config_hub/pretrain/debug.yaml",
    "litgpt pretrain --model_name pythia-14m --config config_hub/pretrain/debug.yaml",
    f"litgpt pretrain pythia-14m {TOKENIZER} {TEXT} --train.lr_warmup_steps=200 --optimizer.lr 0.005",
    f"litgpt pretrain EleutherAI/pythia-160m {TOKENIZER} {TEXT} --train.max_tokens 10_000_000 --out_dir out/model",
    f"litgpt pretrain pythia-160m {TOKENIZER} {TEXT} --train.max_tokens 1_000_000",
    f"litgpt pretrain pythia-160m --initial_checkpoint_dir EleutherAI/pythia-160m {TOKENIZER} {TEXT} "
    "--train.max_tokens 1_000_000 --out_dir out/new_model",
    f'litgpt pretrain pythia-160m --resume "auto" {TOKENIZER} {TEXT} --train.max_tokens 1_000_000',
    "litgpt download EleutherAI/pythia-160m --tokenizer_only true",
    "litgpt download EleutherAI/pythia-160m --tokenizer_only True",
    "litgpt convert_pretrained_checkpoint out/pretrain/final out/converted_model",
    "litgpt finetune_lora EleutherAI/pythia-160m",
    "litgpt finetune EleutherAI/pythia-160m",
]


@pytest.fixture
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory: the recipes, texts, and what `litgpt download` writes, without the weights."""
    (tmp_path / "config_hub").symlink_to(ROOT / "config_hub")
    (tmp_path / "custom_texts").mkdir()
    (tmp_path / "out" / "pretrain" / "final").mkdir(parents=True)
    for name in ("a.txt", "b.txt"):
        (tmp_path / "custom_texts" / name).write_text("a")
    for name in ("pythia-14m", "pythia-160m"):
        model, shape = tmp_path / "checkpoints" / "EleutherAI" / name, lookup_config(name)
        model.mkdir(parents=True)
        (model / "model_config.yaml").write_text(json.dumps(shape.to_dict()))
        Tokenizer(BPE({"a": 0, "b": 1}, [])).save(str(model / "tokenizer.json"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize("line", LINES)
def test_a_line_as_typed(line, litgpt):
    command = COMMANDS[line.split()[1]]
    recipe = litgpt(*shlex.split(line)[1:]).recipe
    assert recipe is not None
    if not command.check:
        return
    check = import_object(f"litgpt.train.early_checks:{command.check}")
    if "1_000_000" in line:
        cure = "set train.max_tokens: 1048576, or train.global_batch_size: 488"
        with pytest.raises(UserError, match=f"train.max_tokens: 1000000 is less than one step .*; {cure}"):
            check(recipe)
        recipe = replace(recipe, train=replace(recipe.train, global_batch_size=488))
    check(recipe)


def test_the_list_of_models(capsys):
    assert cli.main(["pretrain", "list"]) == 0
    assert {"Gemma-2b", "Llama-2-7b-hf", "Mixtral-8x7B-v0.1", "pythia-14m"} <= set(capsys.readouterr().out.split())


def test_the_help_of_the_page(litgpt):
    assert "--data.train_data_path" in litgpt("pretrain", "--data.help", "TextFiles").out
