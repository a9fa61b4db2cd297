"""Build the optimizer that a recipe names, over the parameters that decay and those that do not."""

from collections.abc import Iterable
from dataclasses import asdict
from importlib import import_module
from typing import Any

import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.recipe.optimizer import SGD, AdamW, AdamW8bit, Custom, Muon, Optimizer

Named = list[tuple[str, nn.Parameter]]


def build(settings: Optimizer, model: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizers of a run; more than one where a rule suits a part of the parameters only.

    Every parameter group has its peak learning rate under `peak_lr`.

    Raises:
        UserError: if the class cannot be found, built, or used on this model.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizers = BUILDERS[type(settings)](settings, trained)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Give every parameter group `share` of its peak learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share


def decay_groups(named: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which decay, and biases, norms and other vectors, which do not."""
    matrices = [parameter for _, parameter in named if parameter.dim() > 1]
    vectors = [parameter for _, parameter in named if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _adamw(settings: AdamW, named: Named) -> list[torch.optim.Optimizer]:
    arguments = asdict(settings) | {"fused": True if settings.fused is None else settings.fused}
    return [torch.optim.AdamW(decay_groups(named, arguments.pop("weight_decay")), **arguments)]


def _sgd(settings: SGD, named: Named) -> list[torch.optim.Optimizer]:
    arguments = asdict(settings)
    return [torch.optim.SGD(decay_groups(named, arguments.pop("weight_decay")), **arguments)]


def _muon(settings: Muon, named: Named) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks (Jordan et al. 2024), AdamW for embedding, head and vectors."""
    inner = [(name, parameter) for name, parameter in named if name.startswith("blocks.") and parameter.dim() == 2]
    outer = [pair for pair in named if pair not in inner]
    muon = torch.optim.Muon(
        [parameter for _, parameter in inner],
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
        ns_steps=settings.ns_steps,
        adjust_lr_fn=settings.adjust_lr_fn,
    )
    adamw = torch.optim.AdamW(
        decay_groups(outer, settings.weight_decay),
        lr=settings.lr if settings.adamw_lr is None else settings.adamw_lr,
        betas=settings.adamw_betas,
        eps=settings.adamw_eps,
        fused=True,
    )
    return [muon, adamw]


def _adamw_8bit(settings: AdamW8bit, named: Named) -> list[torch.optim.Optimizer]:
    arguments = asdict(settings)
    arguments["betas"] = tuple(arguments["betas"])
    weight_decay = arguments.pop("weight_decay")
    return [dotted_class("bitsandbytes.optim.AdamW8bit")(decay_groups(named, weight_decay), **arguments)]


def _custom(settings: Custom, named: Named) -> list[torch.optim.Optimizer]:
    arguments = dict(settings.arguments)
    groups = decay_groups(named, arguments["weight_decay"]) if "weight_decay" in arguments else [p for _, p in named]
    try:
        return [dotted_class(settings.path)(groups, **arguments)]
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer.init_args: {arguments} do not suit {settings.path} ({error})") from None


def dotted_class(path: str) -> Any:
    """The class behind a dotted path.

    Raises:
        UserError: if its package is not installed or has no such class.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"optimizer: {path} cannot be imported ({error}); AdamW would do") from None


BUILDERS: dict[type, Any] = {AdamW: _adamw, SGD: _sgd, Muon: _muon, AdamW8bit: _adamw_8bit, Custom: _custom}
