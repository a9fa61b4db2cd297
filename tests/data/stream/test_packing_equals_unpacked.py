"""Samples packed in one row give the loss and the gradients that each gives alone, whatever the architecture."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from litgpt.data.render.example import Example
from litgpt.data.stream.batch import IGNORE, Batch, to_batch
from litgpt.data.stream.samples import SampleRows
from litgpt.model.config import Config
from litgpt.model.gpt import GPT

BASE: dict[str, Any] = {
    "block_size": 64,
    "padded_vocab_size": 50,
    "n_layer": 2,
    "n_head": 4,
    "n_query_groups": 2,
    "n_embd": 32,
    "intermediate_size": 48,
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
}
SHAPES: dict[str, dict[str, Any]] = {
    "rotary": BASE,
    "learned positions": BASE
    | {
        "position_embedding": "learned",
        "norm_class_name": "LayerNorm",
        "mlp_class_name": "GptNeoxMLP",
        "bias": True,
        "n_query_groups": 4,
        "tie_embeddings": True,
    },
    "sliding window": BASE | {"sliding_window_size": 4, "sliding_window_indices": [1, 0]},
    "softcapped, parallel": BASE | {"attention_logit_softcapping": 5.0, "parallel_residual": True},
    "experts": BASE
    | {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 24},
}


class Held:
    """Samples in memory, as the rows of a stream read them."""

    def __init__(self, sizes: list[int]) -> None:
        order = np.random.default_rng(3)
        self.files: list[Any] = [type("File", (), {"weighted": False, "channels": [None], "fingerprint": "x"})]
        self.table = np.zeros((len(sizes), 4), np.int64)
        self.lengths = np.array(sizes)
        self.examples = [
            Example(order.integers(0, 50, size, np.int32), (order.random(size) < 0.7).astype(np.float32))
            for size in sizes
        ]

    def read(self, piece: int) -> Example:
        return self.examples[piece]


SIZES = [9, 1, 17, 4, 2, 11]


def batches(rows: list[list[int]] | None, *, padding: bool = False) -> list[Batch]:
    held: Any = Held(SIZES)
    built = SampleRows(held, None if rows is None else [np.array(row) for row in rows], None, padding=padding)
    if padding:
        return [to_batch(built.micro_batch(0, built.count))]
    return [to_batch(built.micro_batch(row, 1)) for row in range(built.count)]


def learnt(model: GPT, given: list[Batch], **changes: Any) -> tuple[float, dict[str, torch.Tensor], int]:
    """The mean loss over all labels, its gradients, and the number of labels."""
    targets = sum(batch.targets for batch in given)
    model.zero_grad()
    total = 0.0
    for batch in given:
        inputs = {"positions_BT": batch.positions, "documents_BT": batch.documents} | changes
        scores = model(batch.ids, **inputs)
        loss = F.cross_entropy(scores.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")
        (loss / targets).backward()
        total += loss.item() / targets
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return total, grads, targets


def apart(one: tuple[float, dict[str, torch.Tensor], int], other: tuple[float, dict[str, torch.Tensor], int]) -> float:
    """The largest difference: of the losses, or of a gradient relative to its largest number.

    A gradient that is nothing but rounding, as that of a key's bias is, is held against the largest of all.
    """
    assert one[1].keys() == other[1].keys() and one[2] == other[2]
    least = 1e-6 * max(float(grad.abs().max()) for grad in other[1].values())
    ratios = [
        float((one[1][name] - grad).abs().max()) / max(float(grad.abs().max()), least)
        for name, grad in other[1].items()
    ]
    return max(abs(one[0] - other[0]), *ratios)


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> GPT:
    torch.manual_seed(1)
    built = GPT(Config(name="tiny", **SHAPES[request.param]))
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return built.double()


def test_packed_equals_unpacked(model: GPT) -> None:
    alone = learnt(model, batches(None))
    assert alone[2] == sum(int((example.weights[1:] > 0).sum()) for example in Held(SIZES).examples)
    assert apart(learnt(model, batches([[0, 1, 2], [3, 4, 5]])), alone) < 1e-9
    assert apart(learnt(model, batches([[5, 3, 1, 0, 4, 2]])), alone) < 1e-9
    assert apart(learnt(model, batches(None, padding=True)), alone) < 1e-9
    assert apart(learnt(model, batches([[2, 0, 1], [5, 4, 3]], padding=True)), alone) < 1e-9


def test_without_the_mask_it_does_not(model: GPT) -> None:
    """What keeps the samples apart is the mask: without it the same test fails, as it does without new positions."""
    alone, packed = learnt(model, batches(None)), batches([[0, 1, 2], [3, 4, 5]])
    assert apart(learnt(model, packed, documents_BT=None), alone) > 1e-3
    if model.position_embedding is not None:
        assert apart(learnt(model, packed, positions_BT=None), alone) > 1e-3
    leaky = batches([[0, 1, 2], [3, 4, 5]])
    for batch in leaky:  # the last token of a sample does not predict the first one of the next
        batch.labels = F.pad(batch.ids[:, 1:], (0, 1), value=IGNORE)
    assert learnt(model, leaky)[2] > alone[2]
