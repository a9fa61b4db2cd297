"""The command lines of LitGPT's page on pretraining, as typed: up to the point where the model is built, and run.

The slow tests run them with models of one small block under the names on the page.
"""

import io
import json
import os
import shlex
import shutil
import signal
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from litgpt import cli
from litgpt.errors import UserError
from litgpt.model.registry import lookup_config
from litgpt.recipe.commands import COMMANDS, import_object
from tests.hub import serve_hub
from tests.processes import join_ranks, start_ranks
from tests.recipes.test_tutorials import make_document, write_model

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


def test_what_the_page_downloads_is_what_its_other_lines_name(tmp_path, monkeypatch, capsys):
    """`litgpt download` from a server that answers as the hub does, with the tokenizer and with the weights."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "source" / "pythia-160m", SMALL | {"block_size": 2048})
    files = {path.name: path.read_bytes() for path in (tmp_path / "source" / "pythia-160m").iterdir()}
    files = {name: content for name, content in files.items() if name not in ("model_config.yaml", "manifest.json")}
    folder = tmp_path / "checkpoints" / "EleutherAI" / "pythia-160m"
    with serve_hub({"EleutherAI/pythia-160m": files}, monkeypatch) as hub:
        assert cli.main(["download", "EleutherAI/pythia-160m", "--tokenizer_only", "True"]) == 0
        assert "tokenizer.json" in hub.fetched and not any(folder.glob("*.safetensors"))
        assert cli.main(["download", "EleutherAI/pythia-160m"]) == 0
        assert hub.fetched.count("model.safetensors") == 1
        assert cli.main(["validate", "EleutherAI/pythia-160m"]) == 0
    assert "checkpoints/EleutherAI/pythia-160m: ready" in capsys.readouterr().out


SMALL = {"n_layer": 1, "n_embd": 16, "n_head": 2, "head_size": 8, "intermediate_size": 24, "block_size": 128}
SMALL |= {"padded_vocab_size": 512, "n_query_groups": 2}


def run_small(line: str) -> int:
    """Run a line with small models of the names that it gives."""
    from litgpt.model import config

    real = config.lookup_config
    config.lookup_config = lambda name: config.TransformerConfig(**real(name).to_dict() | SMALL)
    return cli.main(shlex.split(line)[1:])


@pytest.fixture
def _models(tmp_path: Path) -> None:
    """The working directory of a reader who has downloaded models, stories, instructions and texts."""
    (tmp_path / "config_hub").symlink_to(ROOT / "config_hub")
    for name in ("pythia-14m", "pythia-160m"):
        write_model(tmp_path / name / name, SMALL)
        shutil.move(tmp_path / name / name, tmp_path / "checkpoints" / "EleutherAI" / name)
    for number in range(4):
        path = tmp_path / "custom_texts" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(make_document(number) * 40)
    stories, rows = tmp_path / "data" / "tinystories", tmp_path / "data" / "alpaca"
    rows.mkdir(parents=True)
    (rows / "alpaca_data_cleaned_archive.json").write_text(
        json.dumps([{"instruction": f"Say {number}.", "input": "", "output": f"{number}"} for number in range(80)])
    )
    stories.mkdir()
    with tarfile.open(stories / "TinyStories_all_data.tar.gz", "w:gz") as archive:
        for number in range(3):
            content = json.dumps([{"story": make_document(seed)} for seed in range(100)]).encode()
            member = tarfile.TarInfo(f"data{number:02}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("_models")
@pytest.mark.parametrize("line", [line for line in LINES if line.split()[1].startswith(("pretrain", "finetune"))])
def test_a_line_runs_as_typed(tmp_path: Path, line: str) -> None:
    """Each line runs to its end, or, if that is 10 million tokens or more away, for some steps until Ctrl-C."""
    is_long = line.startswith("litgpt pretrain") and "max_tokens 1_000_000" not in line
    (process,) = start_ranks(run_small, line, folder=tmp_path)
    log = tmp_path / "rank-0.log"
    while is_long and process.is_alive() and not (log.is_file() and "step 4" in log.read_text()):
        time.sleep(0.1)
    if is_long:
        os.kill(process.pid, signal.SIGINT)
    assert join_ranks([process], timeout=600) == [0], log.read_text()
    (out,) = [path.parent for path in tmp_path.glob("out/**/recipe.yaml") if path.parent.name[:5] != "step-"]
    assert list(out.glob("step-*/manifest.json"))
    assert (out / "final" / "model.safetensors").is_file() == (not is_long)
    if "--resume" in line:  # once more: the run is complete
        assert join_ranks(start_ranks(run_small, line, folder=tmp_path)) == [0], log.read_text()
        assert "Resuming training from" in log.read_text()
    if "--out_dir" not in line and line.startswith("litgpt pretrain pythia-160m"):
        convert = next(line for line in LINES if "convert_pretrained_checkpoint" in line)
        assert join_ranks(start_ranks(run_small, convert, folder=tmp_path)) == [0], log.read_text()
        assert (tmp_path / "out/converted_model/model.safetensors").is_file()
