"""The gradient of one set of samples, however it is cut in micro-batches, packed, padded and spread over ranks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from litgpt.data.render.example import Example
from litgpt.data.stream.batch import Batch, to_batch
from litgpt.data.stream.samples import SampleRows
from litgpt.recipe.train import LossArgs
from tests.layouts.gradient_worker import SHAPE, compute_batch_gradients

SIZES = (9, 1, 11, 4, 2, 12, 7, 5)
"""Tokens of each sample; the second has none to predict, and of the fourth none is trained."""
PACKS: dict[str, list[list[int]] | None] = {
    "unpacked": None,
    "packed in 4": [[5, 0], [3], [2, 1, 4], [6, 7]],
    "packed in 2": [[1, 3, 5, 6], [0, 2, 4, 7]],
}
Gradients = tuple[dict[str, torch.Tensor], float]


class Held:
    """The samples, as the rows of a stream read them."""

    def __init__(self) -> None:
        order = np.random.default_rng(3)
        self.files: list[Any] = [type("File", (), {"weighted": False, "channels": [None], "fingerprint": "x"})]
        self.table, self.lengths = np.zeros((len(SIZES), 4), np.int64), np.array(SIZES)
        self.examples = [
            Example(order.integers(0, 50, size, np.int32), ((order.random(size) < 0.7) & (number != 3)).astype("f4"))
            for number, size in enumerate(SIZES)
        ]

    def read(self, piece: int) -> Example:
        return self.examples[piece]


def open_reader(packs: list[list[int]] | None, padding: bool, rank: int, ranks: int, micro: int) -> list[Batch]:
    """One rank's micro-batches of `micro` rows, dealt out as a stream does."""
    held: Any = Held()
    rows = SampleRows(held, None if packs is None else [np.array(pack) for pack in packs], None, padding=padding)
    return [to_batch(rows.micro_batch(first, micro)) for first in range(rank * micro, rows.count, ranks * micro)]


def gradient(packs: str, padding: bool, degrees: tuple[int, int], rank: int, micro: int, **loss: Any) -> Gradients:
    """Every parameter's full gradient, and the loss."""
    batches = open_reader(PACKS[packs], padding, rank, degrees[0] * degrees[1], micro)
    return compute_batch_gradients(batches, degrees, replace(SHAPE, block_size=64), LossArgs(chunk_rows=7, **loss))


def apart(one: Gradients, other: Gradients) -> float:
    """The largest difference: of the losses, or of a gradient relative to its norm."""
    differences = [((one[0][name] - value).norm() / value.norm()).item() for name, value in other[0].items()]
    return max([*differences, abs(one[1] - other[1])])


def whole(**loss: Any) -> Gradients:
    """What one process makes of all samples in one micro-batch, unpacked."""
    return gradient("unpacked", False, (1, 1), 0, len(SIZES), **loss)


def compare(alone: Gradients, rank: int, ranks: int, **loss: Any) -> dict[str, float]:
    """How far every cut is from that of one process."""
    worst = {}
    for packs, rows in PACKS.items():
        for micro in (1, 2, 4, 8):
            for degrees in ((ranks, 1), (1, ranks))[: 1 + (ranks > 1)]:
                for padding in (False, True)[: 1 + (degrees[0] == ranks)]:
                    if (len(rows) if rows else len(SIZES)) % (micro * ranks) == 0:
                        name = f"{packs}, {micro} a micro-batch, {degrees}" + ", padded" * padding
                        worst[name] = apart(gradient(packs, padding, degrees, rank, micro, **loss), alone)
    return worst


def worker(folder: Path) -> None:
    """One of two ranks; the first writes down the result."""
    alone = whole()  # before there is another process to add up with
    dist.init_process_group("gloo")
    worst = compare(alone, dist.get_rank(), 2)
    if dist.get_rank() == 0:
        (folder / "worst.json").write_text(json.dumps(worst))
    dist.barrier()
