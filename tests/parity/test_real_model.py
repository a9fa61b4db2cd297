"""A real pretrained model: its text against transformers' token for token, and training goes on from it.

`LITGPT_TEST_ASSETS` names a folder in which `SmolLM2` is a model folder of Hugging Face's; these tests take minutes.
"""

import csv
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt import LLM
from tests.processes import join_ranks, run_litgpt, start_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PROMPTS = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the mountains,",
    "7 + 5 =",
]
QUESTIONS = PROMPTS[:2]
"""Asked through the chat template; the others are texts to go on with."""


@pytest.fixture(scope="module")
def folder() -> Path:
    root = os.environ.get("LITGPT_TEST_ASSETS")
    if not root or not (Path(root) / "SmolLM2" / "config.json").is_file():
        pytest.skip("LITGPT_TEST_ASSETS names no folder with SmolLM2")
    return Path(root) / "SmolLM2"


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    llm = LLM.load(folder, distribute=None)
    llm.distribute(accelerator="cpu", precision="32-true")
    return llm


@pytest.fixture(scope="module")
def hf_model(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_equals_transformers(prompt: str, llm: LLM, hf_model: Any, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if prompt in QUESTIONS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    else:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    asked = prompt in QUESTIONS
    assert llm.prompt_tokens(prompt, chat_template=asked) == ids[0].tolist()
    expected = hf_model.generate(ids, max_new_tokens=60, do_sample=False, attention_mask=torch.ones_like(ids))
    settings: dict[str, Any] = {"max_new_tokens": 60, "temperature": 0, "chat_template": asked}
    actual = llm.generate(prompt, return_as_token_ids=True, **settings)
    ends = [position for position, token in enumerate(expected[0].tolist()) if token == 2 and position >= ids.shape[1]]
    new = expected[0, ids.shape[1] : ends[0] if ends else None]
    assert actual.tolist() == new.tolist()
    assert llm.generate(prompt, **settings) == tokenizer.decode(new, skip_special_tokens=True)
    print(f"{prompt!r}: {len(new)} tokens equal: {tokenizer.decode(new)[:60]!r}", file=sys.stderr)


def test_training_goes_on_from_it(folder: Path, tmp_path: Path) -> None:
    """Some steps on the standard library's own prose lower the loss on held-out pages of it."""
    import pydoc_data.topics as topics

    pages = list(topics.topics.values())
    (tmp_path / "text").mkdir()
    for name, some in (("val", pages[::8]), ("train", [page for position, page in enumerate(pages) if position % 8])):
        (tmp_path / "text" / f"{name}.txt").write_text("\n".join(some), encoding="utf-8")
    recipe = {
        "model_name": "SmolLM2-135M-Instruct",
        "initial_checkpoint_dir": str(folder),
        "tokenizer_dir": str(folder),
        "out_dir": "out",
        "precision": "32-true",
        "data": {
            "class_path": "TextFiles",
            "init_args": {
                "train_data_path": "text/train.txt",
                "val_data_path": "text/val.txt",
                "num_workers": 0,
            },
        },
        "train": {
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "max_seq_length": 128,
            "max_steps": 12,
            "lr_warmup_steps": 2,
            "max_norm": 1.0,
            "min_lr": 0,
            "save_interval": None,
        },
        "eval": {"interval": 12, "max_iters": 8, "initial_validation": True, "final_validation": True},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 5e-5, "weight_decay": 0.0}},
        "devices": 1,
        "logger_name": "csv",
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    processes = start_ranks(run_litgpt, "pretrain", "--config", "recipe.yaml", folder=tmp_path)
    assert join_ranks(processes, timeout=1500) == [0], (tmp_path / "rank-0.log").read_text()[-3000:]
    with next((tmp_path / "out" / "logs").rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("val_loss")]
    losses = [float(row["val_loss"]) for row in rows]
    print(f"validation loss {losses[0]:.4f} -> {losses[-1]:.4f}", file=sys.stderr)
    assert math.isfinite(losses[0]) and losses[0] < 4.5  # a trained model: chance is ln 49152 = 10.8
    assert losses[-1] < losses[0] - 0.05
    text = LLM.load(tmp_path / "out" / "final", distribute=None).generate("The class", max_new_tokens=8, temperature=0)
    assert text.strip()
