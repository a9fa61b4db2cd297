"""Feed-forward layers that do not save the product of gate and up, which their backward pass nearly computes anyway."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.model.gpt import GPT
from litgpt.model.layers import GatedMLP, apply_swiglu
from litgpt.model.surgery import wrap_forward


class ProjectedSwiGLU(torch.autograd.Function):
    """(silu(gate) * up) W^T, of gate and up (..., H) and a matrix W (D, H); (..., D) in the type of gate.

    Values and gradients are the same to the bit as those of two functions.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight_DH: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight_DH)
        return F.linear(F.silu(gate).mul_(up), weight_DH.to(gate.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, weight_DH = ctx.saved_tensors
        activated = F.silu(gate)
        product = activated * up
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = (grad.flatten(0, -2).T @ product.flatten(0, -2)).to(weight_DH.dtype)
        grad_product = (grad.flatten(0, -2) @ weight_DH.to(grad.dtype)).view_as(gate)
        torch.mul(grad_product, up, out=product)
        return torch.ops.aten.silu_backward(product, gate), activated.mul_(grad_product), grad_weight


def recompute_products(model: GPT) -> None:
    """Let the feed-forward layers compute their products of gate and up again, if nothing else changes these layers."""
    for module in model.modules():
        if type(module) is GatedMLP and module.gating is apply_swiglu and is_plain(module) and is_plain(module.down):
            set_forward(module)


def set_forward(module: GatedMLP) -> None:
    """Let a layer compute its product again."""
    wrap_forward(module, lambda _: partial(project_swiglu, module))


def is_plain(module: nn.Module) -> bool:
    """Whether a module has its class's forward method and no hooks, and if linear, is an `nn.Linear` without bias."""
    is_linear = not isinstance(module, nn.Linear) or (type(module) is nn.Linear and module.bias is None)
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return is_linear and "forward" not in vars(module) and not any(hooks)


def project_swiglu(mlp: GatedMLP, x: Tensor) -> Tensor:
    """`mlp(x)`; as it was if its last layer has changed since, for example by a hook."""
    gate, up = mlp.project(x)
    if torch.is_grad_enabled() and is_plain(mlp.down):
        return ProjectedSwiGLU.apply(gate, up, mlp.down.weight)
    return mlp.down(mlp.gating(gate, up))
