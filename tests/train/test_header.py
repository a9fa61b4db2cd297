"""The header of a run: its first rows are printed before torch is imported, all of them in a fixed order."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from litgpt.train.header import format_rows, list_early_rows

PRETRAIN = ("pretrain", "toy", "--data=TextFiles", "--data.train_data_path=text", "--model_config={n_layer: 1}")
DATA = ("Data", "TextFiles text")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, an adapter, and a run with two checkpoints."""
    for path in ("model", "adapter", "run/final", "run/step-00000009", "run/step-00001000"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "run/final/config.json").write_text("{}")
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "start"),
    [
        (PRETRAIN, "random weights, seed 42"),
        ((*PRETRAIN, "--initial_checkpoint_dir=model"), "weights of model"),
        ((*PRETRAIN, "--out_dir=run", "--resume=auto"), "Resuming training from run/step-00001000, after step 1,000"),
        ((*PRETRAIN, "--out_dir=new", "--resume=auto"), "random weights, seed 42"),
        ((*PRETRAIN, "--resume=run/step-00000009"), "Resuming training from run/step-00000009, after step 9"),
        ((*PRETRAIN, "--resume=elsewhere"), "Resuming training from elsewhere"),
        (("finetune", "model"), "weights of model"),
        (("finetune", "model", "--initial_adapter_dir=adapter"), "weights of model, adapter of adapter"),
        (("finetune", "model", "--initial_adapter_dir=run"), None),
        (("finetune", "run"), None),
        (("finetune", "Qwen/Qwen3-0.6B"), None),
    ],
)
def test_what_is_known_before_torch(folder, litgpt, argv, start):  # noqa: ARG001
    data = DATA if argv[0] == "pretrain" else ("Data", "Alpaca data/alpaca")
    assert list_early_rows(litgpt(*argv).recipe) == [data, *([("Start", start)] if start else [])]


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ((), "sigmoid; beta 0.1; reference: the initial weights"),
        (("loss_type=simpo",), "simpo; beta 2"),
        (("loss_type=cpo", "cpo_alpha=0.5"), "cpo; beta 0.1; loss of chosen answers x 0.5"),
        (("loss_type=[sigmoid, sft]", "loss_weights=[1, 0.5]"), None),
        (("reference_free=true", "beta=0.3"), "sigmoid; beta 0.3; no reference (reference_free)"),
        (("reference=other", "sync_ref_model=true"), "sigmoid; beta 0.1; reference: other, moved every 512 steps"),
        (
            ("precompute_ref_log_probs=true",),
            "sigmoid; beta 0.1; reference: the initial weights, computed before training",
        ),
        (("loss_type=reward",), "reward"),
    ],
)
def test_the_loss_its_strength_and_the_reference(litgpt, flags, shown):
    flags = [f"--preference.{flag}" for flag in flags]
    recipe = litgpt("align", "model", "--data=Preferences", "--data.sources=pairs.jsonl", *flags).recipe
    shown = shown or "sigmoid + 0.5 x sft; beta 0.1; loss of chosen answers x 0.5; reference: the initial weights"
    assert recipe.preference.describe() == shown


def test_the_first_rows_need_no_torch(folder):
    code = """if True:
        import json, sys
        from contextlib import nullcontext
        from litgpt import cli

        def find(path, find=cli.import_object):
            is_later = path.endswith((":run", ":explain_out_of_memory"))
            return (lambda *_: nullcontext()) if is_later else find(path)

        cli.import_object = find
        assert cli.main(json.loads(sys.argv[1])) == 0
        sys.exit(sorted({"torch", "lightning", "transformers"} & set(sys.modules)) or 0)
    """
    (folder / "text").mkdir()
    for name in ("a", "b"):
        (folder / "text" / f"{name}.txt").write_text("a")
    argv = ["pretrain", "pythia-14m", *PRETRAIN[2:4], "--tokenizer.kind=bytes", "--model_config.padded_vocab_size=512"]
    done = subprocess.run([sys.executable, "-c", code, json.dumps(argv)], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [DATA, ("Start", "random weights, seed 42")]
    assert done.stdout == f"litgpt pretrain pythia-14m: output in out/pretrain\n{format_rows(rows)}\n"


def test_rows_fit_the_terminal():
    path = "/a/" + "long/" * 16 + "path"
    lines = format_rows([("Data", "word " * 30), ("Start", f"weights of {path}")]).splitlines()
    assert max(map(len, lines[:-1])) <= 80 and lines[0].startswith("Data      word")
    assert lines[1].startswith(" " * 10 + "word") and lines[-2:] == ["Start     weights of", " " * 10 + path]
