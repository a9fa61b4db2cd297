"""Matrix products of a few rows on a CPU, by oneDNN with reordered weights.

torch multiplies a few rows with a matrix at a third of the memory's bandwidth. oneDNN's kernels reach two thirds of it
in float32, and twice the rate in bfloat16, if the matrix is reordered once (torch.compile does the same when it freezes
weights). The reordered copy takes as much memory as the matrix.
"""

from functools import partial

import torch
from torch import Tensor, nn

from litgpt.model.gpt import GPT
from litgpt.model.surgery import Function, wrap_forward

ROWS = 32  # the number of rows that the layout is for; measured to be as good for 1 to 512 of them
KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def read_version(weight: Tensor) -> tuple[int, int]:
    """A value that changes when the weight does: by an operation in place, or with other memory."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def can_reorder(weight: Tensor) -> bool:
    """Whether oneDNN has a kernel for this matrix: a plain one of 32 or 16 bits on a CPU."""
    is_plain = weight.layout is torch.strided and type(weight) in (Tensor, nn.Parameter) and weight.dim() == 2
    is_cpu = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return is_plain and is_cpu and weight.dtype in KERNEL_DTYPES and weight.is_contiguous()


class ReorderedMatrix:
    """A weight (N, K) in oneDNN's layout, which is made again when the weight changes."""

    def __init__(self) -> None:
        self.version: tuple[int, int] | None = None
        self.matrix: Tensor | None = None

    def __reduce__(self) -> tuple[type["ReorderedMatrix"], tuple[()]]:
        """Copies and pickles of a model reorder their own weights."""
        return ReorderedMatrix, ()

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x @ weight.T + bias, (..., K) -> (..., N)."""
        if self.version != (version := read_version(weight)):
            self.matrix = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
            self.version = version
        return torch.ops.mkldnn._linear_pointwise(x, self.matrix, bias, "none", [], "")


def is_reordered_product(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is computed by oneDNN: of inference, in the type of the weight."""
    is_inference = torch.is_inference_mode_enabled() and not torch.compiler.is_compiling()
    is_plain = x.dtype == weight.dtype and x.numel() > 0 and not torch.is_autocast_enabled("cpu")
    return is_inference and is_plain and can_reorder(weight)


class ReorderedForward:
    """The forward pass of a linear layer, in oneDNN's layout during inference."""

    def __init__(self, layer: nn.Linear, forward: Function) -> None:
        self.layer, self.forward, self.matrix = layer, forward, ReorderedMatrix()

    def __call__(self, x: Tensor) -> Tensor:
        """As `nn.Linear.forward`."""
        if not is_reordered_product(x, self.layer.weight):
            return self.forward(x)
        return self.matrix.multiply(x, self.layer.weight, self.layer.bias)


def reorder_linear_layers(model: GPT) -> None:
    """Let the linear layers of the blocks multiply by oneDNN in inference mode; training is as before."""
    for layer in model.blocks.modules():
        is_wrapped = isinstance(layer.__dict__.get("forward"), ReorderedForward)
        if type(layer) is nn.Linear and can_reorder(layer.weight) and not is_wrapped:
            wrap_forward(layer, partial(ReorderedForward, layer))
