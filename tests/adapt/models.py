"""A small model with an adapter, its base in transformers, and steps of training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from litgpt import adapt
from litgpt.adapt.targets import get_base_names
from litgpt.model.gpt import GPT
from litgpt.model.registry import find_family
from litgpt.recipe.tuner import Tuner
from litgpt.store.adapters.folder import save_adapter_folder
from litgpt.store.adapters.saved_adapter import BaseSettings
from litgpt.store.save_model import save_model_folder
from tests.store.models import random_model, small

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))


def build_adapted(settings: Tuner, name: str = "Qwen2.5-0.5B", **changes: Any) -> GPT:
    """A random model with a tuner attached and initialized in float32, as PEFT does, then made float64."""
    model = random_model(small(name, **changes))
    adapt.attach(model, settings)
    adapt.initialize_adapter(model, settings, 0)
    return model.double()


@torch.no_grad()
def perturb(model: GPT, seed: int = 3) -> None:
    """Add normal noise to the trained parameters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapt.get_adapter_parameters(model).values():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def copy_base(model: GPT) -> dict[str, Tensor]:
    """A copy of the base's parameters."""
    names = get_base_names(model)
    return {name: value.detach().clone() for name, value in model.named_parameters() if name in names}


def build_merged(model: GPT) -> GPT:
    """A model without an adapter that has the merged weights."""
    merged = random_model(model.config, seed=9).to(next(model.parameters()).dtype)
    merged.load_state_dict(dict(adapt.merge_adapter(model)))
    return merged


def build_transformers_model(model: GPT, folder: Path) -> Any:
    """The base in transformers, in float32."""
    save_model_folder(folder, config=model.config, tensors=copy_base(model), dtype=torch.float32)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def map_published_modules(model: GPT) -> dict[str, str]:
    """The published name of each of our modules that maps to a single one."""
    family = find_family(model.config)
    assert family is not None
    mappings = family.tensors.map_names(sorted(get_base_names(model)), model.config)
    return {
        mapping.names[0].rpartition(".")[0]: mapping.hf_name.rpartition(".")[0]
        for mapping in mappings
        if len(mapping.names) == 1
    }


def compute_loss(scores: Tensor) -> Tensor:
    """Mean loss of the next token."""
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def train_steps(model: nn.Module, scores: Callable[[], Tensor], count: int, **settings: Any) -> list[float]:
    """Losses of AdamW steps; eps is large enough that gradients of rounding errors change nothing."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, **{"lr": 1e-2, "eps": 1e-5, **settings})
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = compute_loss(scores())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def save_adapter(folder: Path, model: GPT, settings: Tuner, **base_settings: Any) -> None:
    """Save the adapter of a model to `adapter`, with its base in the folder `base` beside it."""
    tensors = {name: value.detach().clone() for name, value in adapt.get_adapter_parameters(model).items()}
    save_adapter_folder(
        folder / "adapter",
        tensors,
        config=model.config,
        settings=settings,
        base=str(folder / "base"),
        base_settings=BaseSettings(**base_settings),
    )
