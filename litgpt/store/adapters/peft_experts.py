"""LoRA on parameters in PEFT's format: experts that are published as one tensor, and their routers.

The pair of a stack is flat in a file: A (E r, in), expert by expert, and B (out, r E), rank by rank. PEFT wraps a
module once for each of its parameters that has a pair, and names the pair after the wrapper: the last pair has the
module's name, and each earlier one another `.base_layer`. If PEFT takes the (in, out) matrices of a stack for
(out, in), the pair is that of the transposed update.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.names import TensorMapping, is_stacked
from litgpt.model.registry import find_family

BASE_LAYER = ".base_layer"


def is_fused(mapping: TensorMapping) -> bool:
    """Whether a published tensor holds all experts."""
    return is_stacked(mapping.names[0]) and mapping.expert is None


def is_router(mapping: TensorMapping) -> bool:
    """Whether a published tensor is a router's matrix."""
    return mapping.names[0].endswith(".router.weight")


def list_adapted_parameters(mappings: Mapping[str, TensorMapping]) -> set[str]:
    """The published tensors that PEFT adapts as parameters, not as layers."""
    stacks = {name for name, mapping in mappings.items() if is_fused(mapping) and not name.endswith("bias")}
    routers = {name for name, mapping in mappings.items() if is_router(mapping)}
    return stacks | routers if stacks else set()


def map_fused_experts(mappings: Mapping[str, TensorMapping]) -> dict[str, TensorMapping]:
    """The fused tensors of transformers for experts that are published one by one, and their routers."""
    fused: dict[str, TensorMapping] = {}
    for first in [mapping for mapping in mappings.values() if mapping.expert == 0]:
        mlp = first.names[0].rpartition(".experts.")[0]
        gate, up, down = (f"{mlp}.experts.{name}" for name in ("gate", "up", "down"))
        module = f"model.layers.{mlp.split('.')[1]}.mlp"
        for hf_name, names, kind in (
            (f"{module}.experts.gate_up_proj", (gate, up), "concat"),
            (f"{module}.experts.down_proj", (down,), "rename"),
            (f"{module}.gate.weight", (f"{mlp}.router.weight",), "rename"),
        ):
            fused[hf_name] = TensorMapping(hf_name, names, kind)
    return fused


def match_target_parameters(target_parameters: Iterable[str], mappings: Mapping[str, TensorMapping]) -> list[str]:
    """The published tensors that PEFT's `target_parameters` select by the end of their name, in the model's order.

    Raises:
        UserError: for biases of experts.
    """
    ends = tuple(f".{ending}" for ending in target_parameters)
    names = [name for name, mapping in mappings.items() if mapping.hf_name == name and f".{name}".endswith(ends)]
    if biases := [name for name in names if is_fused(mappings[name]) and name.endswith("bias")]:
        weight = biases[0].removesuffix("_bias")
        raise UserError(f"target_parameters: {biases[0]} is not supported; use {weight}")
    return names


def name_wrapped_pairs(hf_names: Sequence[str]) -> dict[str, str]:
    """PEFT's names for the pairs of parameters, which are given in the model's order."""
    modules = [name.rpartition(".")[0] for name in hf_names]
    depths = [modules[number + 1 :].count(module) for number, module in enumerate(modules)]
    return {name: module + BASE_LAYER * depth for name, module, depth in zip(hf_names, modules, depths, strict=True)}


def flatten_pair(a: Tensor, b: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """PEFT's A (E r, in) and B (out, r E) of A (E, r, in) and B (E, out, r)."""
    if is_transposed_in_peft(config):
        a, b = b.mT, a.mT
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def unflatten_pair(mapping: TensorMapping, a: Tensor, b: Tensor, columns: int, config: Config) -> tuple[Tensor, Tensor]:
    """A (E, r, in) and B (E, out, r) of PEFT's A (E r, in) and B (out, r E).

    PEFT before 0.19 transposed no stacks, which the shapes show.

    Raises:
        UserError: if they do not have a rank for each expert.
    """
    if not a.dim() == b.dim() == 2 or a.shape[0] != b.shape[1] or a.shape[0] % config.n_expert:
        shapes = f"A {list(a.shape)} and B {list(b.shape)}"
        raise UserError(f"{mapping.hf_name}: {shapes} are not pairs of {config.n_expert} experts")
    is_transposed = is_transposed_in_peft(config) if a.shape[1] == b.shape[0] else a.shape[1] != columns
    a, b = a.unflatten(0, (config.n_expert, -1)), b.unflatten(1, (-1, config.n_expert)).permute(2, 0, 1)
    return (b.mT, a.mT) if is_transposed else (a, b)


def is_transposed_in_peft(config: Config) -> bool:
    """Whether PEFT takes the matrices of this family's stacks for transposed ones."""
    family = find_family(config)
    return family is not None and family.transposed_in_peft
