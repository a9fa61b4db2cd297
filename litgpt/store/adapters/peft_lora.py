"""The tensors of PEFT's LoRA under their published names, made of ours and sorted back."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.names import TensorMapping
from litgpt.model.registry import find_family
from litgpt.recipe.keys import find_nearest
from litgpt.store.adapters.lora_pairs import (
    LoRAPart,
    find_parts,
    join_pair,
    join_rows,
    split_rows_of,
    tuner_parameter_name,
)
from litgpt.store.adapters.peft_experts import INNER, flat, is_whole_stack, parameters_in, stacked, targeted, wrapped
from litgpt.store.published_tensor import list_parameters

START = "base_model.model."
COPY = "_trained"
PAIR = re.compile(r"(?P<layer>.+)\.(?P<half>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.default)?(\.weight)?")
MAGNITUDE = re.compile(r"(?P<layer>.+)\.lora_magnitude_vector(\.default)?(\.weight)?")
Tensors = Mapping[str, Tensor]


def steps_of(config: Config) -> dict[str, TensorMapping]:
    """How each published tensor is made of ours, by its name; a head tied to the embedding is one more of it.

    What transformers' modules call otherwise than files do is there under both names, and called as in modules.
    """
    family, names = find_family(config), list(list_parameters(config))
    if family is None:
        return {name: TensorMapping(name, (name,), "rename") for name in names}
    steps = family.tensors.map_names(names, config)
    if config.tie_embeddings:
        (head,) = family.tensors.map_names(["head.weight"], config)
        steps.append(TensorMapping(head.hf_name, ("embedding.weight",), "rename"))
    found: dict[str, TensorMapping] = {}
    for step in steps:
        ends = [end for end in family.module_names if step.hf_name.endswith(f".{end}")]
        module = step.hf_name.removesuffix(ends[0]) + family.module_names[ends[0]] if ends else step.hf_name
        found |= dict.fromkeys((step.hf_name, module), replace(step, hf_name=module))
    return found


def layer_of(theirs: str) -> str:
    """The published layer that holds a weight or a bias."""
    return theirs.removesuffix(".weight").removesuffix(".bias")


def to_peft(tensors: Tensors, config: Config) -> tuple[dict[str, Tensor], dict[str, list[LoRAPart]], set[str]]:
    """PEFT's tensors, the parts of each layer's pair, and the names of ours that it has no form for."""
    published: dict[str, Tensor] = {}
    layers: dict[str, list[LoRAPart]] = {}
    left, shapes, steps = set(tensors), list_parameters(config), steps_of(config)
    parameters = parameters_in(steps)
    ours = {step.hf_name: (step, find_parts(step, tensors)) for step in steps.values()}
    called = wrapped([theirs for theirs, (_, parts) in ours.items() if parts])
    wrappings = Counter(name.split(INNER)[0] for name in called.values())
    for theirs, (step, parts) in ours.items():
        layer = layer_of(theirs)
        if parts:
            layers[layer] = parts
            pair = join_pair(step, parts, tensors, shapes, config)
            published |= named_pair(called[theirs], step, *(flat(*pair, config) if is_whole_stack(step) else pair))
            left -= {part.parameter_name(half) for part in parts for half in "ab"}
        lengths = [tuner_parameter_name(ours, "lora_magnitude") for ours in step.names]
        has_lengths = bool(parts) and theirs not in parameters and not is_embedding(layer, step)
        if has_lengths and all(name in tensors for name in lengths):
            rows = [tensors[name] if step.expert is None else tensors[name][step.expert] for name in lengths]
            published[f"{START}{layer}.lora_magnitude_vector"] = join_rows(step, rows, config)
            left -= set(lengths)
        copies = [ours + COPY for ours in step.names]
        if all(name in tensors for name in copies) and not (is_whole_stack(step) and theirs in parameters):
            module, _, key = theirs.rpartition(".")
            inner = f"{module}{INNER * wrappings[module]}.{key}" if key.endswith("bias") else theirs
            published[START + inner] = step.join([tensors[name] for name in copies], config)
            left -= set(copies)
    return published, layers, left


def is_embedding(layer: str, step: TensorMapping) -> bool:
    """Whether a published layer is the embedding itself, not a head tied to it."""
    return step.names == ("embedding.weight",) and not layer.endswith("head")


def named_pair(layer: str, step: TensorMapping, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """A pair under PEFT's names; that of an embedding is of its transposed matrix."""
    if is_embedding(layer, step):
        return {f"{START}{layer}.lora_embedding_A": b.mT, f"{START}{layer}.lora_embedding_B": a.mT}
    return {f"{START}{layer}.lora_A.weight": a, f"{START}{layer}.lora_B.weight": b}


@dataclass
class Sorted:
    """The tensors of a PEFT file by what they are: pairs and lengths of rows by layer, copies by published name."""

    pairs: dict[str, dict[str, Tensor]]
    lengths: dict[str, Tensor]
    copies: dict[str, Tensor]


def sort(published: Tensors, steps: Mapping[str, TensorMapping], endings: Iterable[str], config: Config) -> Sorted:
    """Sort the tensors of a PEFT file, whose `target_parameters` are these endings."""
    found = Sorted(defaultdict(dict), {}, {})
    layers = {name: layer_of(theirs) for theirs, name in wrapped(targeted(endings, steps)).items()}
    for name, tensor in published.items():
        if pair := PAIR.fullmatch(name):
            half, embedding = pair["half"][-1], "embedding" in pair["half"]
            key = {"A": "b", "B": "a"}[half] if embedding else half.lower()
            found.pairs[layers.get(pair["layer"], pair["layer"])][key] = tensor.mT if embedding else tensor
        elif length := MAGNITUDE.fullmatch(name):
            found.lengths[length["layer"]] = tensor
        else:
            found.copies[re.sub(r"(\.base_layer|\.modules_to_save\.default|\.modules_to_save)+\.", ".", name)] = tensor
    for layer, pair_of in found.pairs.items():
        if pair_of.keys() != {"a", "b"}:
            raise UserError(f"{layer}: only one of lora_A and lora_B is there")
        if is_whole_stack(step := weight_step(layer, steps)):
            columns = list_parameters(config)[step.names[0]].shape[-1]
            pair_of["a"], pair_of["b"] = stacked(step, pair_of["a"], pair_of["b"], columns, config)
    return found


def step_for(name: str, steps: Mapping[str, TensorMapping]) -> TensorMapping:
    """The step of a published tensor.

    Raises:
        UserError: if the model has no such tensor.
    """
    if name not in steps:
        near = find_nearest(name, steps)
        raise UserError(f"{name}: nothing in this model is called so" + (f"; it has {near}" if near else ""))
    return steps[name]


def weight_step(layer: str, steps: Mapping[str, TensorMapping]) -> TensorMapping:
    """The step of a published layer's matrix."""
    return steps[layer] if layer in steps else step_for(f"{layer}.weight", steps)


class Taken:
    """Our tensors as they come out of a file: those of experts one by one, the embedding's maybe from the head too."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tensors: dict[str, Tensor] = {}
        self.experts: dict[str, dict[int, Tensor]] = defaultdict(dict)

    def add(self, step: TensorMapping, tensors: Tensors) -> None:
        """Take in what a published tensor holds.

        Raises:
            UserError: if a head that is tied to the embedding has another update than the embedding.
        """
        for name, tensor in tensors.items():
            if step.expert is not None:
                self.experts[name][step.expert] = tensor
            elif not torch.equal(self.tensors.setdefault(name, tensor), tensor):
                raise UserError(f"{step.hf_name}: differs from the embedding's, but the model ties them")

    def whole(self) -> dict[str, Tensor]:
        """All tensors, experts stacked; an expert without an update has one of zeros."""
        for name, experts in self.experts.items():
            like = next(iter(experts.values()))
            self.tensors[name] = torch.stack(
                [experts.get(e, torch.zeros_like(like)) for e in range(self.config.n_expert)]
            )
        return self.tensors


def add_rest(taken: Taken, found: Sorted, steps: Mapping[str, TensorMapping], config: Config) -> None:
    """Take in the lengths of rows that DoRA trains, and copies."""
    for layer, rows in found.lengths.items():
        step = weight_step(layer, steps)
        parts = split_rows_of(step, rows.flatten(), config)
        taken.add(step, {tuner_parameter_name(ours, "lora_magnitude"): part for ours, part in parts.items()})
    for name, tensor in found.copies.items():
        step = step_for(name, steps)
        taken.add(step, {ours + COPY: part for ours, part in zip(step.names, step.split(tensor, config), strict=True)})
