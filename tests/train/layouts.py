"""Models in layouts, and training steps with gradients that are the same in every layout."""

from collections.abc import Iterable
from typing import Any

import torch

from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize, seeded_generator
from litgpt.parallel.apply import copy_full_tensor, parallelize
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.parallel import ParallelArgs

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "shards": (2, {"data_shard": 2}),
    "tensor": (2, {"tensor": 2}),
    "tensor and shards": (4, {"tensor": 2, "data_shard": 2}),
    "replicas and shards": (4, {"data_replicate": 2, "data_shard": 2}),
    "uneven shards": (3, {"data_shard": 3}),
    "experts": (4, {"tensor": 2, "data_shard": 2, "expert": 2, "expert_tensor": 2}),
    "experts and shards": (4, {"data_shard": 4, "expert": 2}),
    "rows of experts": (8, {"data_shard": 4, "tensor": 2}),
}


def build_model(config: Config, layout: str, precision_name: str, seed: int) -> GPT:
    """A model in a layout."""
    ranks, degrees = LAYOUTS[layout]
    parallel, precision = ParallelArgs(**degrees), PRECISIONS[precision_name]
    mesh = Mesh(parallel.resolve_dims(ranks), "cpu") if ranks > 1 else None
    with torch.device("meta"):
        model = GPT(config).to(precision.storage)
    parallelize(model, mesh, parallel, precision=precision, compile_blocks=False)
    model.to_empty(device="cpu")
    initialize(model, seed, write=copy_full_tensor)
    return model


def train_on_drawn_gradients(model: GPT, optimizers: Iterable[torch.optim.Optimizer], steps: range) -> None:
    """Optimizer steps with gradients that are functions of the step and the parameter's name."""
    for step in steps:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=seeded_generator(f"{name}/{step}"))
                parameter.grad = torch.zeros_like(parameter)
                copy_full_tensor(parameter.grad, drawn.to(parameter.dtype))
        for optimizer in optimizers:
            optimizer.step()
