"""What a rank does in the tests of layouts: saves under every one, loads under every other, compares bits."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.store.checkpoint_load import load_checkpoint
from litgpt.store.checkpoint_save import Checkpoints
from litgpt.store.load_model import load_model
from litgpt.store.save_model import save_model
from litgpt.store.state_dict import iter_model_tensors, iter_optimizer_state
from tests.store.models import random_model

LAYOUTS = {2: ["plain", "ddp", "fsdp"], 4: ["ddp", "fsdp", "hsdp"]}
OPTIMIZERS = {2: ["fused"], 4: ["fused", "sgd"]}


class Tied(nn.Module):
    """A small model with uneven rows, a one-element bias, a tied head, a frozen layer and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.middle = nn.Linear(6, 7)
        self.narrow = nn.Linear(7, 1)
        self.frozen = nn.Linear(1, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.narrow(torch.tanh(self.middle(self.embedding(ids))))
        return self.head(self.frozen(hidden))


def build(layout: str, seed: int, optimizer: str = "adamw") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: nn.Module = Tied()
    model.seen += seed
    if layout in ("fsdp", "hsdp"):
        shape = (dist.get_world_size(),) if layout == "fsdp" else (2, dist.get_world_size() // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        fully_shard(model.middle, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif layout == "ddp":
        model = DistributedDataParallel(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer == "sgd":
        return model, torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    return model, torch.optim.AdamW(trained, lr=0.01 * seed, fused=optimizer == "fused")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        ids = (torch.arange(12).view(3, 4) * (step + 2)) % 11
        model(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    values = [*iter_model_tensors(model), *iter_optimizer_state(model, [optimizer])]
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)).detach().clone()
        for name, value in values
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], what: str) -> None:
    assert one.keys() == other.keys(), (what, one.keys() ^ other.keys())
    for name in one:
        assert one[name].dtype == other[name].dtype, (what, name)
        assert torch.equal(one[name], other[name]), (what, name)


def check_loads(folder: Path, expected: dict[str, Tensor], layouts: list[str], optimizer: str) -> None:
    for layout in layouts:
        model, fresh = build(layout, 2, optimizer)
        progress = load_checkpoint(folder, model, fresh, warn=lambda _line: None)
        assert progress["tokens"] == 12345678901
        assert_same(expected, whole_state(model, fresh), f"{folder} -> {layout}")
        if optimizer != "sgd":
            assert fresh.param_groups[0]["lr"] == 0.02, "settings are those of the run that goes on"


def check_layouts(folder: Path) -> None:
    """What a rank does; `<folder>/one` holds a checkpoint taken by a single process."""
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    layouts = LAYOUTS[ranks]
    model, optimizer = build("plain", 1)
    load_checkpoint(folder / "one" / "step-00000001", model, optimizer, warn=lambda _line: None)
    check_loads(folder / "one" / "step-00000001", whole_state(model, optimizer), layouts, "adamw")
    for kind in OPTIMIZERS[ranks]:
        for layout in layouts:
            model, optimizer = build(layout, 1, kind)
            train(model, optimizer)
            model.eval()
            model(torch.zeros(1, 2, dtype=torch.int64))  # leaves FSDP2's root gathered
            checkpoints = Checkpoints(folder / f"{layout}{ranks}-{kind}")
            checkpoints.save(8, model, optimizer, {"tokens": 12345678901})
            saved_state = whole_state(model, optimizer)
            train(model, optimizer, 1)  # must not leak into what is being written
            saved = checkpoints.commit()
            assert saved is not None
            check_loads(saved, saved_state, layouts, kind)
    dist.barrier()
    dist.destroy_process_group()


def check_model_folders(folder: Path) -> None:
    """What a rank does with `<folder>/model`: load it into a sharded model, write that again, be refused as one."""
    dist.init_process_group("gloo")
    model = random_model(Config.from_checkpoint(folder / "model"), seed=1)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    load_model(model, folder / "model")
    save_model(folder / "again", model, config=model.config)
    with pytest.raises(UserError, match="not empty"):
        save_model(folder / "again", model, config=model.config)
    return dist.destroy_process_group()
