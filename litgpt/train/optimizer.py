"""Build the optimizer that a recipe names, over the parameters that decay and those that do not."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib import import_module
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from litgpt.adapt.parts import find_part
from litgpt.errors import UserError
from litgpt.parallel.galore_layout import check_galore_layout
from litgpt.recipe.keys import list_settings
from litgpt.recipe.optimizer import (
    SGD,
    AdamW,
    AdamW8bit,
    Custom,
    GaLore,
    Muon,
    Optimizer,
    PrecisionAwareAdamW,
)
from litgpt.recipe.part_rates import PartRates
from litgpt.recipe.tuner import Tuner
from litgpt.store.safetensors_files import get_shard
from litgpt.train.galore import LowRankAdamW
from litgpt.train.muon import StackedMuon
from litgpt.train.precision_aware import PrecisionAwareOptimizer

Named = list[tuple[str, nn.Parameter]]
EQUAL_RATES = PartRates()


def build_optimizers(
    settings: Optimizer, model: nn.Module, tuner: Tuner | None = None, rates: PartRates = EQUAL_RATES
) -> list[torch.optim.Optimizer]:
    """Build the optimizers of a run: several if parameters differ in their optimizer or learning rate.

    Every parameter group has its peak learning rate as `peak_lr`, and every trained parameter is in one group.

    Args:
        tuner: the finetuning method, which may multiply the learning rate of some parameters.
        rates: the learning rates of parts of a model that sees or hears, in place of those of the settings.

    Raises:
        UserError: if the class cannot be imported or initialized, or does not support this model.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if check := PARAMETER_CHECKS.get(type(settings)):
        check(settings, named)
    members: dict[tuple[float, str], Named] = {}
    for name, parameter in named:
        multiplier, part = tuner.get_lr_multiplier(name) if tuner else 1.0, find_part(name)
        members.setdefault((multiplier, part if part in rates.given else ""), []).append((name, parameter))
    optimizers = []
    for (multiplier, part), pairs in sorted(members.items(), key=itemgetter(0)):
        for optimizer in BUILDERS[type(settings)](settings, pairs):
            for group in optimizer.param_groups:
                group["peak_lr"] = rates.given.get(part, group["lr"]) * multiplier
            optimizers.append(optimizer)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    grouped = Counter(id(parameter) for group in groups for parameter in group["params"])
    assert grouped == Counter(id(parameter) for _, parameter in named)
    return optimizers


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], fraction: float) -> None:
    """Set the learning rate of every parameter group to a fraction of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * fraction


def allocate_states(optimizer: torch.optim.Optimizer) -> None:
    """Give an AdamW of torch the states that it has before its first step, which otherwise allocates them.

    In the heap of a CPU, what stays is then not between activations, whose space is used again as a whole.
    """
    if type(optimizer) is not torch.optim.AdamW or optimizer.defaults["amsgrad"]:
        return
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32), **moments}


def build_groups(named: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Build the parameter groups: matrices with weight decay; biases, norms and other vectors without."""
    matrices = [parameter for name, parameter in named if is_matrix(name, parameter)]
    vectors = [parameter for name, parameter in named if not is_matrix(name, parameter)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix or a stack of matrices, not of biases or norms."""
    return parameter.dim() > 1 and not name.endswith("bias") and ".norm" not in name


def _adamw(settings: AdamW, named: Named) -> list[torch.optim.Optimizer]:
    arguments = asdict(settings) | {"fused": settings.fused is not False}
    return [torch.optim.AdamW(build_groups(named, arguments.pop("weight_decay")), **arguments)]


def _precision_aware_adamw(settings: PrecisionAwareAdamW, named: Named) -> list[torch.optim.Optimizer]:
    names = {parameter: name for name, parameter in named}
    return [PrecisionAwareOptimizer(build_groups(named, settings.weight_decay), settings, names)]


def _sgd(settings: SGD, named: Named) -> list[torch.optim.Optimizer]:
    arguments = asdict(settings)
    return [torch.optim.SGD(build_groups(named, arguments.pop("weight_decay")), **arguments)]


def _muon(settings: Muon, named: Named) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, also of experts; AdamW for embedding, head and vectors."""
    matrices, others = split_block_matrices(named, lambda name, matrix: matrix.dim() == 2 or ".experts." in name)
    lr, betas, eps = settings.adamw_lr, settings.adamw_betas, settings.adamw_eps
    groups = build_groups(others, settings.weight_decay)
    muon = [StackedMuon(matrices, settings)] if matrices else []
    return [*muon, *_adamw_or_none(groups, lr=settings.lr if lr is None else lr, betas=betas, eps=eps)]


def _galore(settings: GaLore, named: Named) -> list[torch.optim.Optimizer]:
    """GaLore for the matrices inside blocks that are longer on both sides than the rank, AdamW for the rest."""
    matrices, others = split_block_matrices(named, lambda _, matrix: min(matrix.shape[-2:]) > settings.rank)
    for matrix in matrices:
        check_galore_layout(matrix)
    groups = build_groups(others, settings.weight_decay)
    rest = _adamw_or_none(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    return [LowRankAdamW(matrices, settings), *rest] if matrices else rest


def check_galore_rank(settings: GaLore, named: Named) -> None:
    """Check that GaLore projects any of the parameters that are trained.

    Raises:
        UserError: with a rank for which it does.
    """
    in_blocks, _ = split_block_matrices(named, lambda *_: True)
    most = max((min(matrix.shape[-2:]) for matrix in in_blocks), default=1) - 1
    if most < settings.rank:
        raise UserError(
            f"optimizer.rank: {settings.rank} is not below the sides of any trained matrix; "
            + (f"give at most {most}" if most else "use AdamW")
        )


def _adamw_or_none(groups: list[dict[str, Any]], **arguments: Any) -> list[torch.optim.Optimizer]:
    """AdamW of the parameters beside the matrices of blocks; a finetuning method may train none of them."""
    return [torch.optim.AdamW(groups, fused=True, **arguments)] if groups else []


def split_block_matrices(
    named: Named, condition: Callable[[str, nn.Parameter], bool]
) -> tuple[list[nn.Parameter], Named]:
    """Split parameters into the matrices inside blocks that meet a condition, and the others with their names."""
    matrices = {
        name: p for name, p in named if name.startswith("blocks.") and is_matrix(name, p) and condition(name, p)
    }
    return list(matrices.values()), [pair for pair in named if pair[0] not in matrices]


def _adamw_8bit(settings: AdamW8bit, named: Named) -> list[torch.optim.Optimizer]:
    if any(get_shard(parameter).is_sharded for _, parameter in named):
        raise UserError(
            "optimizer: AdamW8bit is not supported with sharded parameters; use PrecisionAwareAdamW with "
            "exp_avg_dtype: 8bit and exp_avg_sq_dtype: 8bit"
        )
    arguments = asdict(settings) | {"betas": tuple(settings.betas)}
    groups = build_groups(named, arguments.pop("weight_decay"))
    return [import_optimizer("bitsandbytes.optim.AdamW8bit")(groups, **arguments)]


def _custom(settings: Custom, named: Named) -> list[torch.optim.Optimizer]:
    """Any class; its weight decay, given or by default, applies to matrices only, as for the classes above."""
    cls, arguments = import_optimizer(settings.path), {"lr": settings.lr, **settings.arguments}
    decay = arguments.get("weight_decay", list_settings(cls).get("weight_decay", (Any, None))[1])
    groups = [{"params": [p for _, p in named]}] if decay is None else build_groups(named, decay)
    check_first_step(settings.path, cls, groups, arguments)
    optimizer = cls(groups, **arguments)
    if any("lr" not in group for group in optimizer.param_groups):
        raise UserError(f"optimizer: {settings.path} has no lr in its param_groups; use a class that has one, or AdamW")
    return [optimizer]


def check_first_step(path: str, cls: Any, groups: list[dict[str, Any]], arguments: dict[str, Any]) -> None:
    """Check that an optimizer of a class can be initialized and take a step on the run's device.

    Raises:
        UserError: with the reason if not, naming an argument without which it can.
    """
    if (reason := try_step(cls, groups, arguments)) is None:
        return
    for name, value in arguments.items():
        others = {other: arguments[other] for other in arguments if other != name}
        if name != "lr" and try_step(cls, groups, others) is None:
            raise UserError(f"optimizer.{name}: {value} is not accepted by {path} ({reason}); leave it out")
    raise UserError(f"optimizer.init_args: {arguments} are not accepted by {path} ({reason}); use AdamW")


def try_step(cls: Any, groups: list[dict[str, Any]], arguments: dict[str, Any]) -> str | None:
    """Take a step on zeros of the shape of the smallest parameter of each group; returns the error, or None."""
    trial_groups = []
    for group in groups:
        zeros = nn.Parameter(torch.zeros_like(min(group["params"], key=torch.Tensor.numel)))
        zeros.grad = torch.zeros_like(zeros)
        trial_groups.append({**group, "params": [zeros]})
    try:
        cls(trial_groups, **arguments).step()
    except Exception as error:  # classes check their arguments in any way, some of them at the first step
        return (str(error) or type(error).__name__).splitlines()[0][:200]
    return None


def import_optimizer(path: str) -> Any:
    """Import the class at a dotted path.

    Raises:
        UserError: if its package is not installed or does not have the class.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"optimizer: {path} cannot be imported ({error}); use AdamW") from None


BUILDERS: dict[type, Any] = {
    AdamW: _adamw,
    PrecisionAwareAdamW: _precision_aware_adamw,
    SGD: _sgd,
    Muon: _muon,
    AdamW8bit: _adamw_8bit,
    GaLore: _galore,
    Custom: _custom,
}
PARAMETER_CHECKS: dict[type, Any] = {GaLore: check_galore_rank}
"""What an optimizer requires of all parameters that are trained."""
