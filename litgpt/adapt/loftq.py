"""LoftQ: the update of a quantized matrix starts as the best one for the error of its quantization (Li et al. 2023)."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from litgpt.adapt.layers import gather_full, gather_value, own_parameter
from litgpt.adapt.lora import LoRALayer, decompose
from litgpt.adapt.quantization import QuantizedLinear
from litgpt.model.gpt import GPT
from litgpt.model.init import Writer, copy_into
from litgpt.recipe.tuner import LoRA

Tensors = Iterable[tuple[str, Tensor]]


@torch.no_grad()
def initialize_loftq(
    model: GPT, settings: LoRA, tensors: Tensors, *, device: torch.device | None = None, write: Writer = copy_into
) -> None:
    """Alternate between Q = q(W - s B A) and the SVD of W - Q, from A = B = 0 (algorithm 1).

    A matrix that is not quantized keeps its random A and zero B.

    Args:
        model: with its base and its adapter initialized.
        tensors: every parameter of the base in full, under our names.
        device: where to quantize; None for the device of each tensor.
        write: stores a full value into a parameter, which may be sharded.
    """
    for layer, weight in iter_quantized_weights(model, tensors, device):
        for number in range(settings.loftq_iterations):
            if number:  # in the first round, Q is the base as it was loaded
                for key in ("lora_a", "lora_b"):
                    write(own_parameter(layer, f"{key}_first"), gather_full(own_parameter(layer, key)))
                quantize_without_first(layer, weight, write)
            elif settings.stores_first:
                write(own_parameter(layer, "lora_b_first"), torch.zeros(own_parameter(layer, "lora_b_first").shape))
            error = weight - layer.dequantize_weight(gather_full, torch.float32).to(weight.device)
            for key, value in zip(("lora_a", "lora_b"), decompose(error, settings), strict=True):
                write(own_parameter(layer, key), value)


@torch.no_grad()
def quantize_for_adapter(
    model: GPT, tensors: Tensors, *, device: torch.device | None = None, write: Writer = copy_into
) -> None:
    """Quantize the matrices again as `initialize_loftq` did, for an adapter that was loaded.

    Args:
        tensors, device, write: as for `initialize_loftq`.
    """
    for layer, weight in iter_quantized_weights(model, tensors, device):
        quantize_without_first(layer, weight, write)


def iter_quantized_weights(model: GPT, tensors: Tensors, device: torch.device | None) -> Iterator[tuple[Any, Tensor]]:
    """Yield each quantized layer with an update, and its weight before quantization, in float32."""
    layers = dict(model.named_modules())
    for name, tensor in tensors:
        owner, _, key = name.rpartition(".")
        layer = layers.get(owner)
        if key == "weight" and isinstance(layer, QuantizedLinear) and isinstance(layer, LoRALayer):
            yield layer, tensor.to(device or tensor.device, torch.float32)


def quantize_without_first(layer: Any, weight: Tensor, write: Writer) -> None:
    """Quantize a weight without the update of `lora_a_first` and `lora_b_first`."""
    a, b = (gather_value(layer, f"{key}_first").to(weight.device) for key in ("lora_a", "lora_b"))
    for name, value in layer.quant_format.quantize(weight - layer.lora_scale * b @ a).items():
        write(own_parameter(layer, name), value)
