"""Weights that models have in common, such as those of a base and its adapters, stored once."""

import torch
from torch import nn

from litgpt.infer.load import convert_model
from litgpt.model.gpt import GPT


@torch.no_grad()
def share_weights(model: GPT, base: GPT) -> bool:
    """Replace the weights of a model that equal those of its base, after a cast to their type, by these.

    Linear layers without an adapter are replaced as a whole, with the copies of their weights that an engine makes.

    Args:
        base: on the CPU, as the model; before an engine is made of either.

    Returns:
        Whether they have a matrix in common.
    """
    convert_model(model, torch.device("cpu"), base.output_weight.dtype)
    layers, is_related = dict(base.named_modules()), False
    for name, layer in list(model.named_modules()):
        base_parameters = layers[name]._parameters if name in layers else {}
        for key, parameter in layer._parameters.items():
            other = base_parameters.get(key)
            if parameter is not None and other is not None and has_equal_values(parameter, other):
                layer._parameters[key] = other
                is_related |= other.dim() > 1
        is_plain = type(layer) is nn.Linear and "forward" not in layer.__dict__
        if is_plain and all(layer._parameters[key] is base_parameters.get(key) for key in layer._parameters):
            model.set_submodule(name, layers[name])
    return is_related


def has_equal_values(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two parameters have the same values in the same type."""
    has_form = type(first) is type(second) and (first.shape, first.dtype) == (second.shape, second.dtype)
    return has_form and torch.equal(first, second)
