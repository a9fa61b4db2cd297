"""Build the optimizer that a recipe names, over the parameters that decay and those that do not."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib import import_module
from typing import Any

import torch
from torch import nn

from litgpt.errors import UserError
from litgpt.parallel.galore_layout import check_galore_layout
from litgpt.recipe.optimizer import SGD, AdamW, AdamW8bit, Custom, GaLore, Muon, Optimizer
from litgpt.train.galore import LowRankAdamW

Named = list[tuple[str, nn.Parameter]]


def build_optimizers(
    settings: Optimizer, model: nn.Module, *, factor: Callable[[str], float] = lambda _name: 1.0
) -> list[torch.optim.Optimizer]:
    """The optimizers of a run; more than one where a rule or a learning rate suits a part of the parameters only.

    Every parameter group has its peak learning rate under `peak_lr`.

    Args:
        factor: what the learning rate of a parameter, given by name, is multiplied by.

    Raises:
        UserError: if the class cannot be found, built, or used on this model.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    built = []
    for share in sorted({factor(name) for name, _ in named}):
        for optimizer in BUILDERS[type(settings)](settings, [pair for pair in named if factor(pair[0]) == share]):
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"] * share
            built.append(optimizer)
    return built


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Set the learning rate of every parameter group to `share` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share


def decay_groups(named: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which decay, and biases, norms and other vectors, which do not."""
    matrices = [parameter for name, parameter in named if is_matrix(name, parameter)]
    vectors = [parameter for name, parameter in named if not is_matrix(name, parameter)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix or a stack of them, and no stack of biases or norms."""
    return parameter.dim() > 1 and not name.endswith("bias") and ".norm" not in name


def _adamw(settings: AdamW, named: Named) -> list[torch.optim.Optimizer]:
    arguments = asdict(settings) | {"fused": True if settings.fused is None else settings.fused}
    return [torch.optim.AdamW(decay_groups(named, arguments.pop("weight_decay")), **arguments)]


def _sgd(settings: SGD, named: Named) -> list[torch.optim.Optimizer]:
    arguments = asdict(settings)
    return [torch.optim.SGD(decay_groups(named, arguments.pop("weight_decay")), **arguments)]


def _muon(settings: Muon, named: Named) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks (Jordan et al. 2024), AdamW for embedding, head and vectors."""
    inner = [
        (name, parameter)
        for name, parameter in named
        if name.startswith("blocks.") and parameter.dim() == 2 and is_matrix(name, parameter)
    ]
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


def _galore(settings: GaLore, named: Named) -> list[torch.optim.Optimizer]:
    """GaLore for the matrices inside blocks that are longer on both sides than the rank, AdamW for the rest."""
    matrices = [pair for pair in named if pair[0].startswith("blocks.") and is_matrix(*pair)]
    inner = [pair for pair in matrices if min(pair[1].shape[-2:]) > settings.rank]
    if not inner:
        most = max((min(matrix.shape[-2:]) for _, matrix in matrices), default=1) - 1
        raise UserError(
            f"optimizer.rank: {settings.rank} is not below the sides of any trained matrix; "
            + (f"give at most {most}" if most else "use AdamW")
        )
    for _, matrix in inner:
        check_galore_layout(matrix)
    arguments = asdict(settings)
    galore = LowRankAdamW([parameter for _, parameter in inner], **arguments)
    shared = {key: arguments[key] for key in ("lr", "betas", "eps")}
    outer = [pair for pair in named if pair not in inner]
    return [galore, torch.optim.AdamW(decay_groups(outer, settings.weight_decay), fused=True, **shared)]


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
        raise UserError(f"optimizer.init_args: {arguments} are not accepted by {settings.path} ({error})") from None


def dotted_class(path: str) -> Any:
    """The class behind a dotted path.

    Raises:
        UserError: if its package is not installed or has no such class.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"optimizer: {path} cannot be imported ({error}); use AdamW") from None


BUILDERS: dict[type, Any] = {
    AdamW: _adamw,
    SGD: _sgd,
    Muon: _muon,
    AdamW8bit: _adamw_8bit,
    GaLore: _galore,
    Custom: _custom,
}
