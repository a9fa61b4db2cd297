"""LLaMA-Pro: blocks added between a model's own, at first without effect; they alone are trained (arXiv 2401.02415)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.errors import UserError
from litgpt.model.config import PER_LAYER, Config
from litgpt.model.gpt import GPT
from litgpt.model.init import copy_into
from litgpt.recipe.tuner import LLaMAPro


def order(layers: int, settings: LLaMAPro) -> list[tuple[int, bool]]:
    """For each block of the grown model: the block of the base that it is or copies, and whether it is added.

    Raises:
        UserError: if the blocks do not fall into equal groups, or groups are too small for what each gets.
    """
    new, groups = settings.new_blocks, settings.groups or settings.new_blocks
    if new > layers:
        raise UserError(f"tuner.new_blocks: {new} are more than the model's own blocks; give at most {layers}")
    if new % groups or layers % groups:
        fit = " or ".join(str(count) for count in range(1, layers + 1) if not layers % count and not new % count)
        raise UserError(f"tuner.groups: {groups} divides not both {layers} blocks and {new} new ones; give {fit}")
    size, each = layers // groups, new // groups
    found = []
    for end in range(size, layers + 1, size):
        found += [(layer, False) for layer in range(end - size, end)]
        found += [(layer, True) for layer in range(end - each, end)]
    return found


def grown(config: Config, settings: LLaMAPro) -> Config:
    """The shape of a model with blocks added, each of the kind that it copies.

    Raises:
        UserError: if they cannot be added evenly.
    """
    sources = [layer for layer, _ in order(config.n_layer, settings)]
    lists = {key: getattr(config, key) for key in PER_LAYER}
    changes: dict[str, Any] = {
        key: [marks[layer] for layer in sources] for key, marks in lists.items() if marks is not None
    }
    if config.first_k_dense_replace:
        changes["first_k_dense_replace"] = sum(layer < config.first_k_dense_replace for layer in sources)
    return replace(config, n_layer=len(sources), **changes)


def added(model: GPT, settings: LLaMAPro) -> set[int]:
    """The numbers of the added blocks of a grown model."""
    layers = model.config.n_layer - settings.new_blocks
    return {number for number, (_, new) in enumerate(order(layers, settings)) if new}


def attach(model: GPT, settings: LLaMAPro) -> None:
    """Train the added blocks of a model of a grown shape, and nothing else."""
    new = added(model, settings)
    for name, parameter in model.named_parameters():
        part, _, rest = name.partition(".")
        if part != "blocks" or int(rest.split(".")[0]) not in new:
            parameter.requires_grad_(False)


@torch.no_grad()
def fill(
    model: GPT,
    tensors: Iterable[tuple[str, Tensor]],
    settings: LLaMAPro,
    *,
    write: Callable[[nn.Parameter, Tensor], None] = copy_into,
) -> None:
    """Fill a grown model from the base's tensors, whole, by name; added blocks are copies that add nothing yet."""
    parameters = dict(model.named_parameters())
    layers = order(model.config.n_layer - settings.new_blocks, settings)
    for name, tensor in tensors:
        for grown_name, new in copies_of(name, layers):
            if grown_name in parameters:
                quiet = quieted(model.config, grown_name) if new else None
                write(parameters[grown_name], tensor if quiet is None else torch.full_like(tensor, quiet))


def copies_of(name: str, layers: list[tuple[int, bool]]) -> Iterator[tuple[str, bool]]:
    """The names that a parameter of the base has in the grown model, and whether each is that of an added block."""
    part, _, rest = name.partition(".")
    if part != "blocks":
        yield name, False
        return
    number, _, inner = rest.partition(".")
    for place, (layer, new) in enumerate(layers):
        if layer == int(number):
            yield f"blocks.{place}.{inner}", new


def quieted(config: Config, name: str) -> float | None:
    """The value by which a parameter keeps its block from adding anything to the residual stream; None: its own.

    That is what adds last: the output matrix of attention and of the feed-forward layer, or the norm after it. A matrix
    of zeros before a norm would make the norm's slope one over the root of its epsilon.
    """
    branch, *inner = name.split(".")[2:]
    normed = {"attention": config.post_attention_norm, "mlp": config.post_mlp_norm}.get(branch)
    if branch in ("norm_1_post", "norm_2_post"):
        return -1.0 if config.norm_class_name.startswith("Offset") and inner == ["weight"] else 0.0
    if normed is None or (normed and config.norm_class_name != "BareLayerNorm"):
        return None
    layer = inner[-2] if inner[-1] in ("weight", "bias") else inner[-1].removesuffix("_bias")
    return 0.0 if layer == {"attention": "out", "mlp": "down"}[branch] else None
