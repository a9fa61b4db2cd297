"""Count the parameters on each rank of a recipe for many devices: models on meta, a fake process group."""

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
from litgpt.train.build_state import build_meta_model
from litgpt.train.run_spec import RunSpec


def count_local_parameters(model: torch.nn.Module) -> int:
    """The number of elements of this rank's shards."""
    return sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())


def worker(folder: Path, recipe: Any, config: Config, ranks: Iterable[int]) -> None:
    """Write the number of elements on each rank to `held.json`."""
    spec = RunSpec("test", config, None, None, None)  # type: ignore[arg-type]
    world = recipe.devices * recipe.num_nodes
    held = {}
    for rank in ranks:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        mesh = Mesh(recipe.parallel.resolve_dims(world), "cpu")
        held[rank] = count_local_parameters(build_meta_model(recipe, spec, mesh, torch.device("cpu")))
        dist.destroy_process_group()
    (folder / "held.json").write_text(json.dumps(held))
