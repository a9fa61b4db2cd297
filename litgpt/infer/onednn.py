"""Matrix products of a few rows on a CPU, by oneDNN with reordered weights.

torch multiplies a few rows with a matrix at a third of the memory's bandwidth. oneDNN's kernels reach two thirds of it
in float32, and twice the rate in bfloat16, if the matrix is reordered once (torch.compile does the same when it freezes
weights). The reordered copy takes as much memory as the matrix.

One row in bfloat16 is the exception: torch's own kernel of a matrix and a vector, which it selects only where oneDNN is
switched off, reads the plain matrix at nearly the memory's bandwidth, 1.4 to 1.7 times as fast as the reordered one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
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


def is_eager_inference(x: Tensor) -> bool:
    """Whether a product with `x` is one of inference, in its own type, and not of a graph that is compiled."""
    is_inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return is_inference and x.numel() > 0 and not torch.is_autocast_enabled("cpu")


def is_half_row(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether `x` is one row in bfloat16, for plain matrices of the same type, in inference."""
    is_row = x.dtype is torch.bfloat16 and x.numel() == x.shape[-1] and is_eager_inference(x)
    return is_row and all(weight.dtype is torch.bfloat16 and can_reorder(weight) for weight in weights)


def multiply_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias for one row (..., K) by torch's own kernel, (..., N)."""
    with without_onednn():
        return F.linear(x, weight, bias)


@contextmanager
def without_onednn() -> Iterator[None]:
    """Compute with torch's own kernels."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


class ReorderedMatrix:
    """Weights (N, K), joined along N, in oneDNN's layout, which is made again when one of them changes."""

    def __init__(self) -> None:
        self.versions: list[tuple[int, int]] | None = None
        self.matrix: Tensor | None = None

    def __reduce__(self) -> tuple[type["ReorderedMatrix"], tuple[()]]:
        """Copies and pickles of a model reorder their own weights."""
        return ReorderedMatrix, ()

    def prepare(self, x: Tensor, weights: Sequence[Tensor]) -> bool:
        """Reorder the weights if they have changed; whether a product with `x` is computed by oneDNN.

        It is one of inference, in the type of the weights.
        """
        if not is_eager_inference(x):
            return False
        if (versions := [read_version(weight) for weight in weights]) != self.versions:
            if not all(map(can_reorder, weights)):
                return False
            joined = torch.cat([weight.detach() for weight in weights]) if len(weights) > 1 else weights[0].detach()
            self.matrix, self.versions = torch.ops.mkldnn._reorder_linear_weight(joined, ROWS), versions
        return x.dtype == weights[0].dtype

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x @ weight.T + bias with the prepared weights, (..., K) -> (..., N)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.matrix, bias, "none", [], "")


class ReorderedForward:
    """The forward pass of a linear layer, in oneDNN's layout during inference."""

    def __init__(self, layer: nn.Linear, forward: Function) -> None:
        self.layer, self.forward, self.matrix = layer, forward, ReorderedMatrix()

    def __call__(self, x: Tensor) -> Tensor:
        """As `nn.Linear.forward`."""
        weight = self.layer.weight
        if is_half_row(x, (weight,)):
            return multiply_row(x, weight, self.layer.bias)
        if not self.matrix.prepare(x, (weight,)):
            return self.forward(x)
        return self.matrix.multiply(x, self.layer.bias)


class JoinedProjections:
    """Linear layers of the same input, as one product in oneDNN's layout during inference.

    Three products of a third of the rows each take up to a fifth longer, because each starts with an empty pipeline.
    """

    def __init__(self, layers: Sequence[nn.Linear], project: Function) -> None:
        self.layers, self.project, self.matrix = layers, project, ReorderedMatrix()
        self.sizes = [layer.out_features for layer in layers]

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """The output of each layer, as a view of one tensor."""
        is_plain = all(
            type(part) is nn.Linear and is_reordered(part) and not part._forward_hooks for part in self.layers
        )
        weights = [layer.weight for layer in self.layers]
        if is_plain and is_half_row(x, weights):
            return [multiply_row(x, layer.weight, layer.bias) for layer in self.layers]
        if not is_plain or not self.matrix.prepare(x, weights):
            return self.project(x)
        biases: list[Tensor] = [layer.bias for layer in self.layers if layer.bias is not None]
        return self.matrix.multiply(x, torch.cat(biases) if biases else None).split(self.sizes, -1)


def is_reordered(layer: nn.Module) -> bool:
    """Whether the forward pass of a layer is a `ReorderedForward`, without another one around it."""
    return type(layer.__dict__.get("forward")) is ReorderedForward


def has_half_matrices(model: GPT) -> bool:
    """Whether all linear layers of the blocks that oneDNN could multiply are in bfloat16; false without any."""
    layers = [layer for layer in model.blocks.modules() if type(layer) is nn.Linear and can_reorder(layer.weight)]
    return bool(layers) and all(layer.weight.dtype is torch.bfloat16 for layer in layers)


def reorder_linear_layers(model: GPT) -> None:
    """Let the linear layers of the blocks multiply by oneDNN in inference mode; training is as before."""
    for layer in model.blocks.modules():
        if type(layer) is nn.Linear and can_reorder(layer.weight) and not is_reordered(layer):
            wrap_forward(layer, partial(ReorderedForward, layer))
    for module in model.blocks.modules():
        layers = [getattr(module, name) for name in getattr(module, "projections", ())]
        is_new = "project" not in module.__dict__ and all(map(is_reordered, layers))
        if is_new and len({layer.bias is None for layer in layers}) == 1:
            wrap_forward(module, partial(JoinedProjections, layers), "project")
