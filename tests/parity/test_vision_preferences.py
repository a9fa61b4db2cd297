"""Preferences with images against transformers: losses of DPO and KTO and all gradients, by its log-probabilities."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from litgpt.data import Preferences
from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.data.tokenizer import Tokenizer
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.data import BatchShape
from litgpt.recipe.preference import PreferenceArgs
from litgpt.recipe.train import LossArgs
from litgpt.store.load_model import load_model
from litgpt.train.kto import rated_answers
from litgpt.train.preference import paired_answers
from litgpt.train.reference import Reference, copy_values
from litgpt.train.step import add_gradients
from litgpt.train.train_state import TrainState
from tests.parity.test_vision_training import build_processor, compare_gradients_of, process
from tests.vision_model import COLORS, draw_image, write_rows, write_vision_model

BETA = 0.1
QUESTION = {"role": "user", "content": "<image>Which color?"}
TWO = {"role": "user", "content": "<image> or <image>?"}
CHATS: list[tuple[list[dict[str, Any]], list[str], str, str]] = [
    ([QUESTION], ["red.png"], "It is red.", "blue"),
    ([TWO], ["blue.png", "red.png"], "the first", "the second one"),
    ([{"role": "user", "content": "Hello"}], [], "Hi.", "No"),
    (
        [TWO, {"role": "assistant", "content": "1"}, {"role": "user", "content": "Why?"}],
        ["red.png"] * 2,
        "so",
        "hm, no",
    ),
]
"""The prompt, its images, the chosen answer and the rejected one."""


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write_pairs(folder: Path) -> Path:
    """Rows of pairs in the forms of TRL, ms-swift and LLaMA-Factory."""
    rows: list[dict[str, Any]] = []
    for number, (prompt, images, chosen, rejected) in enumerate(CHATS):
        forms: list[dict[str, Any]] = [
            {"prompt": prompt, "chosen": [answer(chosen)], "rejected": [answer(rejected)]},
            {"messages": [*prompt, answer(chosen)], "rejected_response": rejected},
            {"chosen": [*prompt, answer(chosen)], "rejected": [*prompt, answer(rejected)]},
            {"conversations": prompt, "chosen": answer(chosen), "rejected": answer(rejected)},
        ]
        rows.append(forms[number] | ({"images": images} if images else {}))
    return write_rows(folder, rows)


def write_rated(folder: Path) -> Path:
    """Rated rows."""
    rows = []
    for number, (prompt, images, chosen, rejected) in enumerate(CHATS):
        text, label = (chosen, True) if number % 2 else (rejected, False)
        rows.append({"messages": [*prompt, answer(text)], "label": label} | ({"images": images} if images else {}))
    return write_rows(folder, rows)


def prepare(
    folder: Path, kind: str, path: Path, objective: str
) -> tuple[list[Batch], list[Any], TrainState, list[Any]]:
    """The micro-batches of a row each, the inputs of transformers for each answer, and policy and reference of both."""
    models = [write_vision_model(folder / name, kind, seed=seed) for seed, name in enumerate(("policy", "reference"))]
    data = Preferences(
        str(path), val_fraction=0.0, num_workers=0, shuffle=False, cache_dir=folder / "cache", padding=True
    )
    data.set_objective(objective)
    data.connect(Tokenizer(models[0]), 1, 256)
    data.prepare_data()
    shape = BatchShape(micro_batch_size=1, global_batch_size=4, max_seq_length=256, rank=0, ranks=1, seed=0)
    stream = iter(data.train_stream(shape))
    batches = [next(stream) for _ in CHATS]

    policy, other = (GPT(Config.from_checkpoint(model)) for model in models)
    load_model(policy, models[0])
    load_model(other, models[1])
    reference = Reference(copy_values(other, dict(other.named_parameters())))
    state = TrainState(policy, [], torch.device("cpu"), PRECISIONS["32-true"], reference=reference)
    theirs = [
        transformers.AutoModelForImageTextToText.from_pretrained(model, dtype="float32", attn_implementation="eager")
        for model in models
    ]
    processor = build_processor(models[0], kind)
    inputs = []
    for number, (prompt, images, chosen, rejected) in enumerate(CHATS):
        texts = [chosen, rejected]
        if objective == "kto":
            following = CHATS[(number + 1) % len(CHATS)]
            texts = [chosen if number % 2 else rejected, following[3] if number % 2 else following[2]]
        columns = {"images": images} if images else {}
        inputs.append([process(processor, {"messages": [*prompt, answer(text)]} | columns, folder) for text in texts])
    return batches, inputs, state, theirs


def score(models: list[Any], inputs: list[Any], batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """The log-probability of each of two answers by the policy, with gradients, and by the reference."""
    scores = []
    for row, sample in enumerate(inputs):
        size = sample["input_ids"].shape[1]
        assert (
            sample["input_ids"][0].tolist() == batch.ids[row, :size].tolist() and (batch.answers[row, size:] < 0).all()
        )  # type: ignore[index]
        if "image_grid_thw" in sample:
            token = models[0].config.image_token_id
            sample["mm_token_type_ids"] = (sample["input_ids"] == token).int()
        labels = batch.labels[row, :size]
        kept = labels != IGNORE
        values = []
        for model in models:
            with torch.set_grad_enabled(model is models[0]):
                log_probs = model(**sample).logits[0].log_softmax(-1)
            values.append(log_probs[kept].gather(1, labels[kept][:, None]).sum())
        scores.append((values[0], values[1]))
    return scores


@pytest.mark.parametrize(
    "kind", ["llava", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen2_vl", "llava_next"))]
)
def test_dpo_equals_transformers(kind: str, tmp_path: Path) -> None:
    for name, color in COLORS.items():
        draw_image(tmp_path / f"{name}.png", color)
    batches, inputs, state, theirs = prepare(tmp_path, kind, write_pairs(tmp_path), "pairs")
    losses = []
    for sample, batch in zip(inputs, batches, strict=True):
        (chosen, chosen_reference), (rejected, rejected_reference) = score(theirs, sample, batch)
        losses.append(-F.logsigmoid(BETA * (chosen - chosen_reference - rejected + rejected_reference)))
    expected = torch.stack(losses).mean()
    objective = paired_answers(PreferenceArgs(beta=BETA), LossArgs(chunk_rows=16))
    gradients = add_gradients(state, batches, objective)
    assert gradients.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    expected.backward()
    compare_gradients_of(state.core, theirs[0], state.core.config)
    images = [0 if batch.media is None else len(batch.media.grids) for batch in batches]
    pictures = {"llava_next": 3}.get(kind, 1)  # of an image
    # the answers share them, and those of the last row are the same
    assert images == [1 * pictures, 2 * pictures, 0, 1 * pictures]


@pytest.mark.parametrize("kind", ["llava", pytest.param("qwen2_vl", marks=pytest.mark.slow)])
def test_kto_equals_transformers(kind: str, tmp_path: Path) -> None:
    for name, color in COLORS.items():
        draw_image(tmp_path / f"{name}.png", color)
    batches, inputs, state, theirs = prepare(tmp_path, kind, write_rated(tmp_path), "kto")
    rated, mismatched = zip(*(score(theirs, *each) for each in zip(inputs, batches, strict=True)), strict=True)
    kl = torch.stack([policy - reference for policy, reference in mismatched]).mean().detach().clamp(min=0)
    losses = []
    for number, (policy, reference) in enumerate(rated):
        margin = BETA * (policy - reference - kl)
        losses.append(1 - (margin if number % 2 else -margin).sigmoid())
    expected = torch.stack(losses).mean()
    objective = rated_answers(PreferenceArgs(loss_type="kto", beta=BETA), LossArgs(chunk_rows=16))
    gradients = add_gradients(state, batches, objective)
    assert gradients.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    expected.backward()
    compare_gradients_of(state.core, theirs[0], state.core.config)
