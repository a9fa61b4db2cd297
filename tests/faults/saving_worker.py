"""A process that changes a small model and saves after every step, until it is killed."""

from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from litgpt.store.checkpoint_load import find_latest, load_checkpoint
from litgpt.store.checkpoint_save import Checkpoints

WIDTH = 200


def save_forever(folder: Path, ranks: int, saved_steps: Connection) -> None:
    """Fill the model with 1, 2, 3 ... and save it each time, starting at the latest; send each saved step."""
    model = nn.Linear(WIDTH, WIDTH)
    if ranks > 1:
        dist.init_process_group("gloo")
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    checkpoints = Checkpoints(folder, keep=2, warn=lambda _line: None)
    start = find_latest(folder, warn=lambda _line: None)
    step = load_checkpoint(start, model, optimizer, warn=lambda _line: None)["value"] if start else 0
    while True:
        step += 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
        checkpoints.save(step, model, optimizer, {"value": step})
        checkpoints.commit()
        saved_steps.send(step)
