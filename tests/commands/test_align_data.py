"""Data of `litgpt align` and its variants: modules and rows of another command, and runs on lazy and streamed rows."""

import json
from pathlib import Path

import pytest

from litgpt import cli
from tests.commands.test_finetune import write_base
from tests.runs import read_losses

COMMON = {"data.prompt_style": "alpaca", "data.num_workers": 0, "precision": "32-true", "train.log_interval": 1}
BATCHES = {"train.global_batch_size": 4, "train.micro_batch_size": 2, "train.lr_warmup_steps": 1}
PAIR = {"chosen": "many things", "rejected": "few"}
RATED = {"completion": "many things", "label": True}
PLAIN = {"completion": "many things"}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, row in (("pairs", PAIR), ("rated", RATED), ("plain", PLAIN)):
        lines = [json.dumps({"prompt": f"How many {number}?"} | row) for number in range(24)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return write_base(tmp_path)


def call(command: str, base: Path, module: str, rows: str, **settings: object) -> int:
    values = COMMON | BATCHES | {"data.sources": f"{rows}.jsonl"} | settings
    return cli.main(
        [
            command,
            str(base),
            "--data",
            module,
            *(word for key, value in values.items() for word in (f"--{key}", str(value))),
        ]
    )


@pytest.mark.parametrize(
    ("command", "module", "rows", "message"),
    [
        ("finetune", "Preferences", "pairs", "use litgpt align"),
        ("align", "Conversations", "pairs", "set data: Preferences, or use litgpt finetune"),
        ("finetune", "Conversations", "pairs", "use litgpt align with data: Preferences"),
        ("finetune", "Conversations", "rated", "use litgpt align with data: Preferences"),
        ("align", "Preferences", "rated", "rows with a label are for litgpt kto"),
        ("dpo", "Preferences", "plain", "not two answers"),
        ("rm", "Preferences", "rated", "rows with a label are for litgpt kto"),
        ("kto", "Preferences", "plain", "no label of true or false"),
    ],
)
def test_data_of_another_command_is_refused(
    base: Path, capsys: pytest.CaptureFixture[str], command: str, module: str, rows: str, message: str
) -> None:
    assert call(command, base, module, rows, **{"train.max_steps": 1}) in (1, 2)
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("litgpt: error: ") and message in last


@pytest.mark.parametrize(("command", "rows"), [("dpo", "pairs"), ("kto", "rated"), ("kto", "pairs")])
def test_lazy_rows_train_as_those_tokenized_ahead(base: Path, command: str, rows: str) -> None:
    losses = []
    for tokenize in ("ahead", "lazy"):
        settings = {"data.tokenize": tokenize, "train.max_steps": 3, "out_dir": f"{tokenize}/out"}
        assert call(command, base, "Preferences", rows, **settings) == 0
        losses.append(read_losses(Path(tokenize)))
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_streamed_pairs_train_and_resume(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    streamed = {"data.streaming": "true", "data.shuffle_buffer": 6, "data.val_rows": 2, "train.epochs": "null"}
    streamed |= {"train.save_interval": 2, "data.packing.enabled": "true", "data.packing.length": 80}
    streamed |= {"train.max_steps": 4}
    assert call("dpo", base, "Preferences", "pairs", **streamed, **{"out_dir": "whole/out"}) == 0
    resumed = {"out_dir": "rest/out", "resume": "whole/out/step-00000002"}
    assert call("dpo", base, "Preferences", "pairs", **streamed, **resumed) == 0
    whole, rest = read_losses(Path("whole")), read_losses(Path("rest"))
    assert list(whole) == [1, 2, 3, 4] and rest == {step: whole[step] for step in (3, 4)}
    loss, said = "sigmoid; beta 0.1; reference: the initial weights", capsys.readouterr().out
    assert said.count(f"\nLoss      {loss}\n") == 2 and loss in Path("rest/out/report.html").read_text()
    assert "\nChanged   out_dir: whole/out -> rest/out\n" in said


def test_both_answers_count_for_limits_on_tokens(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = {"train.max_seq_length": 200, "train.epochs": "null", "out_dir": "run/out"}
    assert call("dpo", base, "Preferences", "pairs", **limits, **{"train.max_tokens": 3300}) == 0
    assert list(read_losses(Path("run"))) == [1, 2]
    said = " ".join(capsys.readouterr().out.split())
    assert "of at most 400 tokens" in said and "2 of 4 samples, at most 1,600 tokens" in said
    assert call("dpo", base, "Preferences", "pairs", **limits | {"out_dir": "other", "train.max_tokens": 1000}) in (
        1,
        2,
    )
    assert "global_batch_size x max_seq_length x 2 answers = 1600 tokens" in capsys.readouterr().err
