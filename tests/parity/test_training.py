"""Twenty steps against a plain PyTorch loop over transformers' model: same weights, same batches, same losses."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from litgpt.data.stream.batch import Batch
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.optimizer import AdamW
from litgpt.recipe.train import LossArgs, TrainArgs
from litgpt.store.load_model import load_model
from litgpt.train.objective import next_token
from litgpt.train.optimizer import build_optimizers, set_learning_rate
from litgpt.train.schedule import Schedule
from litgpt.train.step import train_step
from litgpt.train.train_state import TrainState

STEPS, PEAK, FLOOR, WARMUP = 20, 3e-3, 1e-4, 4
REFERENCES = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=96,
            max_position_embeddings=32,
        )
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=96,
            max_position_embeddings=32,
        )
    ),
}


def batches() -> list[torch.Tensor]:
    """Rows of 25 tokens, 8 a step, with something to learn in them."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 96, (STEPS, 8, 1), generator=generator)
    return list((starts + torch.arange(25) ** 2) % 96)


def reference_losses(model: PreTrainedModel) -> list[float]:
    """The loop that anyone would write."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95))
    losses = []
    for step, rows in enumerate(batches()):
        gone = (step - WARMUP) / (STEPS - WARMUP)
        cosine = FLOOR + 0.5 * (1 + math.cos(math.pi * gone)) * (PEAK - FLOOR)
        for group in adamw.param_groups:
            group["lr"] = PEAK * (step + 1) / WARMUP if step < WARMUP else cosine
        loss = F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses


def train_model(folder: Path) -> list[float]:
    model = GPT(Config.from_checkpoint(folder))
    load_model(model, folder)
    settings = AdamW(lr=PEAK, weight_decay=0.1, betas=(0.9, 0.95))
    train_state = TrainState(model, build_optimizers(settings, model), torch.device("cpu"), PRECISIONS["32-true"])
    schedule = Schedule.from_args(TrainArgs(min_lr=FLOOR), peak=PEAK, warmup=WARMUP, steps=STEPS)
    losses = []
    for step, rows in enumerate(batches()):
        set_learning_rate(train_state.optimizers, schedule.at(step) / PEAK)
        micro = [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in rows.split(2)]
        losses.append(train_step(train_state, micro, next_token(LossArgs(chunk_rows=16)), max_norm=1.0).loss)
    return losses


@pytest.mark.parametrize("name", REFERENCES)
def test_twenty_steps_equal_a_plain_loop(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = REFERENCES[name]()
    reference.save_pretrained(tmp_path)
    losses = train_model(tmp_path)
    expected = reference_losses(reference.train())
    assert expected[-1] < expected[0] - 0.1
    assert losses == pytest.approx(expected, abs=1e-5)
