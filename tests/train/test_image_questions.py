"""Answers about held-out images during a run: how they are sampled, kept and shown."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.cli import main
from litgpt.data import Conversations
from litgpt.data.media.positions import build_media_positions
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.data import BatchShape
from litgpt.store.load_model import load_model
from litgpt.train.evaluate import sample_continuation
from litgpt.train.image_questions import ImageQuestion, list_image_questions
from litgpt.train.train_state import TrainState
from tests.processes import join_ranks, run_litgpt, start_ranks
from tests.vision_model import write_color_rows, write_vision_model

SHAPE = BatchShape(micro_batch_size=1, global_batch_size=1, max_seq_length=200, rank=0, ranks=1, seed=0)
FLAGS = [
    *("--data", "Conversations", "--data.num_workers", "0", "--precision", "32-true", "--train.max_steps", "4"),
    *("--train.global_batch_size", "2", "--train.micro_batch_size", "2", "--train.max_seq_length", "200"),
    *("--train.lr_warmup_steps", "0", "--train.save_interval", "2", "--eval.interval", "2"),
    *("--eval.max_new_tokens", "5"),
]


def ask(folder: Path, kind: str, which: Any = "first", rows: str = "rows.jsonl") -> tuple[ImageQuestion, ...]:
    data = Conversations(str(folder / rows), val_fraction=0.0, shuffle=False, num_workers=0, cache_dir=folder / "cache")
    data.connect(Tokenizer(folder / kind), 1, 200)
    data.prepare_data()
    stream = data.train_stream(SHAPE)
    return list_image_questions(stream.samples, which, 0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["smolvlm", "qwen2_vl", "gemma3", "paligemma"])
def test_answers_equal_those_of_whole_forward_passes(kind: str, tmp_path: Path) -> None:
    write_vision_model(tmp_path / kind, kind)
    write_color_rows(tmp_path)
    model = GPT(Config.from_checkpoint(tmp_path / kind)).double()
    load_model(model, tmp_path / kind)
    state = TrainState(model, [], torch.device("cpu"), PRECISIONS["64-true"])
    questions = ask(tmp_path, kind)
    assert [question.name for question in questions] == ["red.png", "green.png", "blue.png", "white.png"]
    for question in (*questions[:1], *ask(tmp_path, kind, which=8)[:1]):  # with one image, and with two
        batch, ids = question.load(), list(question.ids)
        assert batch.media is not None and model.vision is not None
        for _ in range(6):
            positions = build_media_positions(model.vision.shape, ids, batch.media.grids)[None]
            sections = positions if model.config.rope_sections else None
            prompts = torch.arange(len(ids))[None] < len(question.ids)
            with torch.no_grad():
                logits = model(torch.tensor([ids]), positions_BT=sections, prompts_BT=prompts, media=batch.media)
            ids.append(int(logits[0, -1].argmax()))
        settings: Any = {"max_new_tokens": 6, "window": 200, "seed": 0, "top_k": 1, "prompt_batch": batch}
        assert question.ids + sample_continuation(state, question.ids, **settings) == ids


def test_questions_are_prompts_with_images_and_their_answers(tmp_path: Path) -> None:
    write_vision_model(tmp_path / "smolvlm")
    write_color_rows(tmp_path)
    tokenizer = Tokenizer(tmp_path / "smolvlm")
    both = ask(tmp_path, "smolvlm", which=8)[0]
    assert both.name == "red.png, blue.png" and len(both.draw_thumbnails()) == 2
    assert tokenizer.decode(both.text_ids).split() == ["User:", "or", ":", "which", "is", "blue?", "Assistant:"]
    assert tokenizer.decode(both.target).strip() == "2"
    with pytest.raises(UserError, match=r"evaluate_example: 10 of 10 samples with images; use 0 to 9"):
        ask(tmp_path, "smolvlm", which=10)


def finetune(folder: Path, kind: str, out: str, *flags: str) -> list[str]:
    rows = str(folder / "rows.jsonl")
    words = ["finetune_full", str(folder / kind), *FLAGS, "--data.sources", rows, "--data.val_sources", rows]
    return [*words, "--data.cache_dir", str(folder / "cache"), "--out_dir", str(folder / out), *flags]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_the_report_shows_images_beside_answers(tmp_path: Path) -> None:
    write_vision_model(tmp_path / "smolvlm")
    write_color_rows(tmp_path)
    assert main(finetune(tmp_path, "smolvlm", "out")) == 0
    rows = read_rows(tmp_path / "out")
    assert [(row["step"], row["question"]) for row in rows] == [(step, n) for step in (2, 4) for n in range(4)]
    assert [len(row.get("seen", [])) for row in rows] == [1] * 4 + [0] * 4, "an image is in the file once"
    assert {row["target"].strip() for row in rows} == {"red", "green", "blue", "white"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(page.count(row["seen"][0]) == 1 for row in rows[:4])
    assert "img-src data:" in page and page.count("In the data") == 4
    assert main(finetune(tmp_path, "smolvlm", "out", "--resume", "true", "--train.max_steps", "6")) == 0
    assert [row["step"] for row in read_rows(tmp_path / "out")] == [2] * 4 + [4] * 4 + [6] * 4
    assert (tmp_path / "out" / "report.html").read_text().count("2 earlier") == 4


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["pipeline", "context"])
def test_answers_of_two_ranks_are_those_of_one_process(axis: str, tmp_path: Path) -> None:
    write_vision_model(tmp_path / "qwen2_vl", "qwen2_vl")
    write_color_rows(tmp_path)
    assert main(finetune(tmp_path, "qwen2_vl", "one")) == 0
    words = finetune(tmp_path, "qwen2_vl", "two", "--devices", "2", f"--parallel.{axis}", "2")
    assert join_ranks(start_ranks(run_litgpt, *words, folder=tmp_path, ranks=2)) == [0, 0]
    assert read_rows(tmp_path / "one") == read_rows(tmp_path / "two")
