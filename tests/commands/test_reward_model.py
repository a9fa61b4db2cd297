"""`litgpt rm`: a language model becomes a reward model, whose folder and adapter transformers and PEFT score alike."""

import csv
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from litgpt.cli import main
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.store.load_model import load_model
from tests.commands.test_finetune import base
from tests.processes import join_ranks, run_litgpt, start_ranks

__all__ = ["base"]
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
FLAGS: dict[str, Any] = {
    "precision": "32-true",
    "data": "Preferences",
    "data.sources": "[rows.jsonl]",
    "data.val_fraction": 0.2,
    "data.num_workers": 0,
    "data.prompt_style": "alpaca",
    "train.max_steps": 8,
    "train.epochs": "null",
    "train.global_batch_size": 8,
    "train.micro_batch_size": 4,
    "train.lr_warmup_steps": 1,
    "train.save_interval": 4,
    "train.lr_decay_style": "constant",
    "eval.interval": 4,
    "optimizer.lr": 0.02,
}
FULL = {"tuner": "Full", "optimizer.lr": 0.005}


def train(folder: Path, base: Path, *, ranks: int = 1, code: int = 0, **changes: Any) -> str:
    """The output of a run on pairs whose chosen answer is polite."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": f"What is {n}?", "chosen": f"It is {n}, thanks.", "rejected": f"No {n}!", "margin": n % 2}
        for n in range(60)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {**FLAGS, "devices": ranks, **{key.replace("__", "."): value for key, value in changes.items()}}
    argv = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    codes = join_ranks(start_ranks(run_litgpt, "rm", str(base), "--out_dir", "out", *argv, folder=folder, ranks=ranks))
    output = "".join(path.read_text() for path in sorted(folder.glob("rank-*.log")))
    assert codes == [code] * ranks, output
    return output


def read_column(folder: Path, name: str) -> dict[int, float]:
    with (folder / "out/logs/csv/version_0/metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


@torch.no_grad()
def score(folder: Path) -> Tensor:
    """The scores (B, T, 1) of a model folder."""
    model = GPT(Config.from_checkpoint(folder)).eval()
    load_model(model, folder)
    return model(IDS)


@torch.no_grad()
def score_in_transformers(model: Any) -> Tensor:
    return model.score(model.base_model(IDS, use_cache=False)[0])


def load_classifier(folder: Path) -> Any:
    settings = {"dtype": torch.float32, "output_loading_info": True}
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **settings)
    return model.eval(), report


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of LoRA."""
    folder = tmp_path_factory.mktemp("tuned")
    output = train(folder, base)
    assert "val accuracy" in output
    return folder


def test_the_accuracy_rises_and_transformers_computes_the_same_scores(tuned: Path) -> None:
    accuracies = read_column(tuned, "val_rewards/accuracies")
    assert accuracies[8] == 1.0
    assert read_column(tuned, "loss")[8] < read_column(tuned, "loss")[1]
    final = tuned / "out/final"
    model, report = load_classifier(final)
    assert not any(report.values()), report
    expected = score(final)
    assert expected.std() > 0.1
    torch.testing.assert_close(score_in_transformers(model), expected, atol=1e-5, rtol=1e-5)


def test_the_adapter_holds_the_scores_and_peft_loads_it(tuned: Path, base: Path) -> None:
    adapter = tuned / "out/adapter"
    values = json.loads((adapter / "adapter_config.json").read_text())
    assert values["task_type"] == "SEQ_CLS" and values["modules_to_save"] == ["score"]
    model, _ = load_classifier(base)
    adapted = peft.PeftModel.from_pretrained(model, str(adapter)).eval().merge_and_unload()
    torch.testing.assert_close(score_in_transformers(adapted), score(tuned / "out/final"), atol=1e-5, rtol=1e-5)


def test_an_adapter_is_merged_into_the_language_model(tuned: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "merged"
    assert main(["merge_lora", str(tuned / "out/adapter"), "--output_dir", str(output)]) == 0
    assert "score gap" in capsys.readouterr().out
    torch.testing.assert_close(score(output), score(tuned / "out/final"), atol=1e-6, rtol=1e-5)
    assert main(["merge_lora", str(tuned / "out/step-00000008"), "--output_dir", str(tmp_path / "step")]) == 0
    torch.testing.assert_close(score(tmp_path / "step"), score(tuned / "out/final"), atol=1e-6, rtol=1e-5)


def test_an_adapter_of_peft_for_scores_is_merged(base: Path, tmp_path: Path) -> None:
    model, _ = load_classifier(base)
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    assert main(["merge_lora", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]) == 0
    expected = score_in_transformers(adapted.merge_and_unload())
    torch.testing.assert_close(score(tmp_path / "merged"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("tuner", "ranks"),
    [("LoRA", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("LoRA", 2), ("Full", 1), ("Full", 2)))],
)
def test_a_resumed_run_is_the_same_to_the_bit(base: Path, tmp_path: Path, tuner: str, ranks: int) -> None:
    changes: dict[str, Any] = FULL if tuner == "Full" else {}
    train(tmp_path / "whole", base, ranks=ranks, **changes)
    train(tmp_path / "broken", base, ranks=ranks, **{**changes, "train.max_steps": 4})
    train(tmp_path / "broken", base, ranks=ranks, **changes, resume="auto")
    assert read_column(tmp_path / "broken", "loss") == read_column(tmp_path / "whole", "loss")
    first, second = (load_file(tmp_path / name / "out/final/model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(first[name], second[name]) for name in first) and "score.weight" in first


def test_a_reward_model_is_trained_further_and_not_as_a_language_model(tuned: Path, tmp_path: Path) -> None:
    final = tuned / "out/final"
    train(tmp_path, final, **FULL, train__max_steps=1)
    assert read_column(tmp_path, "loss")[1] < 0.2
    for command in ("dpo", "finetune"):
        rows = {"dpo": "Preferences", "finetune": "Conversations"}[command]
        argv = [command, str(final), "--data", rows, "--data.sources", "[rows.jsonl]", "--out_dir", "other"]
        assert join_ranks(start_ranks(run_litgpt, *argv, folder=tmp_path)) == [1]
        assert "is a reward model; train it with litgpt rm" in (tmp_path / "rank-0.log").read_text()
    assert join_ranks(start_ranks(run_litgpt, "generate", str(final), folder=tmp_path)) == [1]
    assert "is a reward model, which computes scores, not text" in (tmp_path / "rank-0.log").read_text()


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"tuner": "IA3"}, 1, "tuner: IA3 does not train the new module score; use LoRA, LISA or Full"),
        ({"lora_head": "true"}, 1, "'head' matches nothing in this model"),
    ],
)
def test_settings_without_effect_are_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], code: int, message: str
) -> None:
    assert message in train(tmp_path, base, code=code, **changes)
