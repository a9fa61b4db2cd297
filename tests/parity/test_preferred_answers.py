"""A real instruction model learns to prefer answers by a rule that can be checked: words of an even number of letters.

`LITGPT_TEST_ASSETS` names a folder with `SmolLM2`, a model folder of Hugging Face's; the test takes minutes.
"""

import csv
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
ANIMALS = (
    *("cow", "horse", "goat", "sheep", "duck", "mouse", "bear", "tiger", "lion", "zebra"),
    *("wolf", "camel", "deer", "eagle", "frog", "otter", "donkey", "giraffe", "monkey", "dolphin"),
    *("rabbit", "lobster", "parrot", "penguin", "turkey", "buffalo", "elephant", "butterfly", "squirrel", "crocodile"),
)
SHORT = {
    "--data": "Preferences",
    "--data.sources": "[pairs.jsonl]",
    "--data.val_fraction": "0.25",
    "--data.num_workers": "0",
    "--precision": "32-true",
    "--train.max_seq_length": "128",
    "--train.global_batch_size": "16",
    "--train.micro_batch_size": "16",
    "--train.lr_warmup_steps": "2",
    "--optimizer.lr": "5e-4",
    "--eval.max_iters": "-1",
    "--eval.initial_validation": "true",
}


@pytest.fixture(scope="module")
def model() -> Path:
    folder = Path(os.environ.get("LITGPT_TEST_ASSETS", "nowhere")) / "SmolLM2"
    if not (folder / "config.json").is_file():
        pytest.skip("LITGPT_TEST_ASSETS names no folder with SmolLM2")
    return folder


def build_pairs(count: int) -> list[dict[str, str]]:
    """Questions for an animal, with one of an even and one of an odd number of letters."""
    draw = random.Random(0)
    even, odd = ([word for word in ANIMALS if len(word) % 2 == rest] for rest in (0, 1))
    return [
        {"prompt": ask(number), "chosen": draw.choice(even).capitalize(), "rejected": draw.choice(odd).capitalize()}
        for number in range(count)
    ]


def ask(number: int) -> str:
    """A question for an animal."""
    return f"Name an animal for card {number} of the game. Answer with one word."


def read_validation(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv with metrics of an evaluation."""
    with next(folder.glob("logs/csv/version_*/metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("val_loss")]
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def align(folder: Path, model: Path, *flags: str) -> list[dict[str, float]]:
    """The metrics of the evaluations of a run."""
    words = [word for pair in SHORT.items() for word in pair]
    assert main(["align", str(model), *words, "--out_dir", str(folder), *flags]) == 0
    return read_validation(folder)


def test_a_real_model_learns_to_prefer_words_of_even_length(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in build_pairs(240)))
    # without a reference, the rewards are the log-probabilities: the accuracy is that of the model as it is
    before, *_ = align(Path("before"), model, "--preference.reference_free", "true", "--train.max_steps", "1")
    assert 0.3 < before["val_rewards/accuracies"] < 0.7
    first, *_, last = align(
        Path("out"), model, "--train.epochs", "1", "--lora_mlp", "true", "--lora_projection", "true"
    )
    assert first["val_loss"] == pytest.approx(0.6931, abs=1e-4) and first["val_rewards/margins"] == 0
    print({"before": before, "first": first, "last": last})
    assert last["val_rewards/accuracies"] > 0.9
    assert last["val_logps/chosen"] > first["val_logps/chosen"] - 3  # of about 5 tokens

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("out/final")
    scores = []
    for folder in (model, "out/final"):
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        scores.append([score(network, tokenizer, pair) for pair in build_pairs(260)[240:]])
    margins = [after - base for base, after in zip(*scores, strict=True)]
    preferred = [sum(value > 0 for value in values) for values in scores]
    print({"of 20 new pairs in transformers": dict(zip(("before", "after"), preferred, strict=True))})
    assert sum(margin > 0 for margin in margins) >= 18


@torch.no_grad()
def score(network: Any, tokenizer: Any, pair: dict[str, str]) -> float:
    """The difference of the log-probabilities of the two answers of a pair, by transformers."""
    totals = []
    for name in ("chosen", "rejected"):
        question = [{"role": "user", "content": pair["prompt"]}]
        start = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(start, return_tensors="pt").input_ids
        ids = tokenizer(f"{start}{pair[name]}<|im_end|>", return_tensors="pt").input_ids
        log_probs = network(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        totals.append(float(log_probs[prompt.shape[1] - 1 :].sum()))
    return totals[0] - totals[1]
