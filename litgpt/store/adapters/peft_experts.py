"""Pairs of parameters in PEFT's LoRA: of experts that are published as one tensor, and of the routers beside them.

The pair of a stack is flat in a file: A (E r, in), expert after expert, and B (out, r E), rank after rank. PEFT wraps a
module once for each of its parameters that has a pair, and names the pair by the wrapping: the last is called as the
module is, each one before it `.base_layer` more. A stack whose matrices are (in, out) but taken for (out, in) has the
pair of the transposed update.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.names import TensorMapping, is_stacked
from litgpt.model.registry import find_family

INNER = ".base_layer"


def is_whole_stack(step: TensorMapping) -> bool:
    """Whether a published tensor holds all experts."""
    return is_stacked(step.names[0]) and step.expert is None


def is_router(step: TensorMapping) -> bool:
    """Whether a published tensor is a router's matrix."""
    return step.names[0].endswith(".router.weight")


def parameters_in(steps: Mapping[str, TensorMapping]) -> set[str]:
    """The published tensors that PEFT adapts as parameters, not as layers."""
    stacks = {name for name, step in steps.items() if is_whole_stack(step) and not name.endswith("bias")}
    routers = {name for name, step in steps.items() if is_router(step)}
    return stacks | routers if stacks else set()


def held_stacked(steps: Mapping[str, TensorMapping]) -> dict[str, TensorMapping]:
    """The tensors in which transformers holds experts that are published one by one, and the routers beside them."""
    held: dict[str, TensorMapping] = {}
    for first in [step for step in steps.values() if step.expert == 0]:
        mlp = first.names[0].rpartition(".experts.")[0]
        gate, up, down = (f"{mlp}.experts.{name}" for name in ("gate", "up", "down"))
        module = f"model.layers.{mlp.split('.')[1]}.mlp"
        made = [
            TensorMapping(f"{module}.experts.gate_up_proj", (gate, up), "concat"),
            TensorMapping(f"{module}.experts.down_proj", (down,), "rename"),
            TensorMapping(f"{module}.gate.weight", (f"{mlp}.router.weight",), "rename"),
        ]
        held |= {step.hf_name: step for step in made}
    return held


def targeted(endings: Iterable[str], steps: Mapping[str, TensorMapping]) -> list[str]:
    """The published tensors that PEFT's `target_parameters` name, in the model's order.

    Raises:
        UserError: for biases of experts.
    """
    ends = tuple(f".{ending}" for ending in endings)
    names = [name for name, step in steps.items() if step.hf_name == name and f".{name}".endswith(ends)]
    if biases := [name for name in names if is_whole_stack(steps[name]) and name.endswith("bias")]:
        raise UserError(f"target_parameters: {biases[0]} will not do; {biases[0].removesuffix('_bias')} would")
    return names


def wrapped(parameters: Sequence[str]) -> dict[str, str]:
    """What PEFT calls the pair of each parameter that has one, given in the model's order."""
    modules = [name.rpartition(".")[0] for name in parameters]
    depths = [modules[at + 1 :].count(module) for at, module in enumerate(modules)]
    return {name: module + INNER * depth for name, module, depth in zip(parameters, modules, depths, strict=True)}


def flat(a: Tensor, b: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """A and B as PEFT keeps them of A (E, r, in) and B (E, out, r)."""
    if turned(config):
        a, b = b.mT, a.mT
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def stacked(step: TensorMapping, a: Tensor, b: Tensor, columns: int, config: Config) -> tuple[Tensor, Tensor]:
    """A (E, r, in) and B (E, out, r) of those that PEFT keeps; PEFT before 0.19 turned none, which shapes tell.

    Raises:
        UserError: if they are not of a rank for each expert.
    """
    if not a.dim() == b.dim() == 2 or a.shape[0] != b.shape[1] or a.shape[0] % config.n_expert:
        raise UserError(
            f"{step.hf_name}: A {list(a.shape)} and B {list(b.shape)} are no pairs of {config.n_expert} experts"
        )
    way = turned(config) if a.shape[1] == b.shape[0] else a.shape[1] != columns
    a, b = a.unflatten(0, (config.n_expert, -1)), b.unflatten(1, (-1, config.n_expert)).permute(2, 0, 1)
    return (b.mT, a.mT) if way else (a, b)


def turned(config: Config) -> bool:
    """Whether PEFT takes the matrices of this family's stacks for transposed ones."""
    family = find_family(config)
    return family is not None and family.turned_in_peft
