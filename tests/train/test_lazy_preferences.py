"""Samples that are tokenized when they are read may turn out to have no trained tokens; they count nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.data.modules.preferences import Preferences
from litgpt.data.stream.batch import Batch
from litgpt.model.gpt import GPT
from litgpt.recipe.data import BatchShape
from litgpt.recipe.preference import PreferenceArgs
from litgpt.recipe.train import LossArgs
from litgpt.train.answer_scores import count_labels
from litgpt.train.kto import rated_answers
from litgpt.train.objective import Objective
from litgpt.train.preference import paired_answers
from litgpt.train.reward import pair_rewards
from litgpt.train.step import compute_gradients
from tests.data.conversation_rows import write
from tests.data.templates import write_tokenizer
from tests.train.pairs import SHAPE, build_state

PAIR = {"prompt": "the fox", "chosen": "the quick fox", "rejected": "the dog"}
RATED = {"prompt": "the fox", "completion": "the quick fox", "label": True}
OBJECTIVES: dict[str, tuple[dict[str, Any], Callable[[], Objective]]] = {
    "pairs": (PAIR, lambda: paired_answers(PreferenceArgs(rpo_alpha=0.5), LossArgs())),
    "kto": (RATED, lambda: rated_answers(PreferenceArgs(loss_type="kto"), LossArgs())),
    "reward": (PAIR, lambda: pair_rewards(PreferenceArgs(loss_type="reward"))),
}


def build_model(output: str, rows: int, seed: int) -> GPT:
    torch.manual_seed(seed)
    model = GPT(replace(SHAPE, padded_vocab_size=rows, output=output)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", OBJECTIVES)
def test_lazily_read_samples_without_targets_count_nothing(tmp_path: Path, name: str) -> None:
    row, build = OBJECTIVES[name]
    rows = [*({**row, "prompt": f"the fox {'quick ' * number}"} for number in range(3)), {**row, "weight": 0}]
    source = str(write(tmp_path / "rows.jsonl", rows))
    tokenizer = write_tokenizer(tmp_path / "tokenizer", "chatml")
    data = Preferences(
        [source], cache_dir=tmp_path / "cache", tokenize="lazy", on_error="drop", val_fraction=0.0, num_workers=0
    )
    data.set_objective(name)
    data.connect(tokenizer)
    data.setup()
    batch = next(iter(data.train_stream(BatchShape(4, 4, 64))))
    trained = count_labels(batch) > 0
    assert trained.tolist().count(False) == 2

    def train(batch: Batch) -> tuple[float, float, torch.Tensor]:
        objective, output = build(), "score" if name == "reward" else "logits"
        models = [build_model(output, tokenizer.id_limit, seed) for seed in (0, 1)]
        state = build_state(*models)
        counts = objective.count_batches([batch])
        loss, _ = compute_gradients(state, objective.prepare(state, [batch]), objective, counts=counts)
        return loss, counts[0], torch.cat([parameter.grad.flatten() for parameter in models[0].parameters()])

    loss, count, gradient = train(batch)
    other, same, expected = train(batch.select_answers(trained))
    assert count == same == 3 and loss == pytest.approx(other, rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
