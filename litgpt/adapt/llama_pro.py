"""LLaMA-Pro: only inserted blocks, initialized to the identity, are trained (Wu et al. 2024, arXiv 2401.02415)."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import Writer, copy_into
from litgpt.model.transformer_config import PER_LAYER
from litgpt.recipe.tuner import BlockOrder, LLaMAPro, Tuner


def expand_config(config: Config, settings: Tuner) -> Config:
    """The config of the model to train, with the blocks that the tuner inserts into the base model.

    Raises:
        UserError: if they cannot be distributed evenly.
    """
    order = settings.get_block_order(config.n_layer)
    if order is None:
        return config
    sources = [layer for layer, _ in order]
    lists = {key: getattr(config, key) for key in PER_LAYER}
    changes: dict[str, Any] = {
        key: [values[layer] for layer in sources] for key, values in lists.items() if values is not None
    }
    if config.first_k_dense_replace:
        changes["first_k_dense_replace"] = sum(layer < config.first_k_dense_replace for layer in sources)
    return replace(config, n_layer=len(sources), **changes)


def freeze_base_blocks(model: GPT, settings: LLaMAPro) -> None:
    """Freeze everything but the inserted blocks of a model with an expanded shape."""
    order = settings.get_block_order(model.config.n_layer - settings.new_blocks)
    new = {number for number, (_, is_new) in enumerate(order) if is_new}
    for name, parameter in model.named_parameters():
        module, _, rest = name.partition(".")
        if module != "blocks" or int(rest.split(".")[0]) not in new:
            parameter.requires_grad_(False)


@torch.no_grad()
def load_expanded(
    model: GPT, tensors: Iterable[tuple[str, Tensor]], order: BlockOrder, *, write: Writer = copy_into
) -> None:
    """Fill a model with an expanded shape from the base's full tensors; inserted blocks are copies with zero output.

    Args:
        order: of the expanded model's blocks.
        write: stores a full value into a parameter, which may be sharded.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in tensors:
        for expanded_name, is_new in iter_expanded_names(name, order):
            if expanded_name in parameters:
                value = get_identity_value(model.config, expanded_name) if is_new else None
                write(parameters[expanded_name], tensor if value is None else torch.full_like(tensor, value))


def iter_expanded_names(name: str, order: BlockOrder) -> Iterator[tuple[str, bool]]:
    """The names that a parameter of the base has in the expanded model, and whether each is in an inserted block."""
    module, _, rest = name.partition(".")
    if module != "blocks":
        yield name, False
        return
    number, _, inner = rest.partition(".")
    beyond = int(number) - len({layer for layer, _ in order})
    if beyond >= 0:  # a prediction layer
        yield f"blocks.{len(order) + beyond}.{inner}", False
    for position, (layer, is_new) in enumerate(order):
        if layer == int(number):
            yield f"blocks.{position}.{inner}", is_new


def get_identity_value(config: Config, name: str) -> float | None:
    """The value of a parameter with which its block does not change the residual stream; None to keep the copied value.

    Only the last operation of a branch has one: the output matrix of attention and of the feed-forward layer, or the
    norm after it. A zero matrix before a norm would multiply gradients by 1 / sqrt(epsilon) of the norm.
    """
    branch, *inner = name.split(".")[2:]
    normed = {"attention": config.post_attention_norm, "mlp": config.post_mlp_norm}.get(branch)
    if branch in ("norm_1_post", "norm_2_post"):
        return -1.0 if config.norm_class_name.startswith("Offset") and inner == ["weight"] else 0.0
    if normed is None or (normed and config.norm_class_name != "BareLayerNorm"):
        return None
    layer = inner[-2] if inner[-1] in ("weight", "bias") else inner[-1].removesuffix("_bias")
    return 0.0 if layer == {"attention": "out", "mlp": "down"}[branch] else None
