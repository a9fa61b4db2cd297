"""What ranks of a recipe for many devices would hold: models on meta, among processes that are not there."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from litgpt.model.config import Config
from litgpt.parallel.mesh import Mesh
from litgpt.train.run_spec import RunSpec
from litgpt.train.setup import on_meta


def numbers_of(model: torch.nn.Module) -> int:
    """How many numbers this rank's part of the parameters has."""
    parameters = (one.to_local() if isinstance(one, DTensor) else one for one in model.parameters())
    return sum(one.numel() for one in parameters)


def worker(folder: Path, recipe: Any, config: Config, ranks: Iterable[int]) -> None:
    """Write down, by rank, how many numbers its part of the model has."""
    spec = RunSpec("test", config, None, None, None)  # type: ignore[arg-type]
    world = recipe.devices * recipe.num_nodes
    held = {}
    for rank in ranks:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        mesh = Mesh(recipe.parallel.resolve_dims(world), "cpu")
        held[rank] = numbers_of(on_meta(recipe, spec, mesh, torch.device("cpu")))
        dist.destroy_process_group()
    (folder / "held.json").write_text(json.dumps(held))
