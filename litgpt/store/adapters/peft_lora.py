"""Convert LoRA to and from PEFT's format: tensors under their published names, and settings."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.names import TensorMapping
from litgpt.model.registry import find_family
from litgpt.recipe.keys import find_nearest
from litgpt.recipe.tuner import LoRA
from litgpt.store.adapters import lora_pairs, peft_experts
from litgpt.store.adapters.lora_config import build_lora_config, read_lora_settings, read_scale
from litgpt.store.adapters.lora_pairs import COPY_SUFFIX, LoRAPart, get_added_name, strip_ending
from litgpt.store.adapters.peft_experts import BASE_LAYER, is_fused
from litgpt.store.published_tensor import list_parameters

PREFIX = "base_model.model."
PAIR = re.compile(r"(?P<layer>.+)\.(?P<half>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.default)?(\.weight)?")
MAGNITUDE = re.compile(r"(?P<layer>.+)\.lora_magnitude_vector(\.default)?(\.weight)?")
PEFT_WRAPPERS = re.compile(r"(\.base_layer|\.modules_to_save\.default|\.modules_to_save)+\.")
Mappings = Mapping[str, TensorMapping]


def list_published_mappings(config: Config) -> dict[str, TensorMapping]:
    """The mappings of all published tensors by name, including a head that is tied to the embedding.

    A tensor that has another name in transformers' modules than in files is listed under both names; its mapping has
    that of the module.
    """
    family, names = find_family(config), list(list_parameters(config))
    if family is None:
        return {name: TensorMapping(name, (name,), "rename") for name in names}
    mappings = family.tensors.map_names(names, config)
    if config.tie_embeddings:
        (head,) = family.tensors.map_names(["head.weight"], config)
        mappings.append(TensorMapping(head.hf_name, ("embedding.weight",), "rename"))
    named: dict[str, TensorMapping] = {}
    for mapping in mappings:
        ends = [end for end in family.module_names if mapping.hf_name.endswith(f".{end}")]
        module = mapping.hf_name.removesuffix(ends[0]) + family.module_names[ends[0]] if ends else mapping.hf_name
        named |= dict.fromkeys((mapping.hf_name, module), replace(mapping, hf_name=module))
    return named


def convert_lora_to_peft(
    tensors: Mapping[str, Tensor], settings: LoRA, config: Config, base: str
) -> tuple[dict[str, Tensor], dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """PEFT's tensors, the parts of each layer's pair for our notes, and the content of `adapter_config.json`.

    Raises:
        UserError: if PEFT has no format for a tensor.
    """
    published: dict[str, Tensor] = {}
    layers: dict[str, tuple[TensorMapping, list[LoRAPart]]] = {}
    unconverted, parameters, named = set(tensors), list_parameters(config), list_published_mappings(config)
    adapted_parameters = peft_experts.list_adapted_parameters(named)
    mappings = {mapping.hf_name: mapping for mapping in named.values()}
    parts_of = {hf_name: lora_pairs.find_parts(mapping, tensors) for hf_name, mapping in mappings.items()}
    wrapped_names = peft_experts.name_wrapped_pairs([hf_name for hf_name, parts in parts_of.items() if parts])
    wrappers = Counter(name.split(BASE_LAYER)[0] for name in wrapped_names.values())
    for hf_name, mapping in mappings.items():
        layer, parts = strip_ending(hf_name), parts_of[hf_name]
        is_parameter = hf_name in adapted_parameters
        if parts:
            layers[layer] = (mapping, parts)
            pair = lora_pairs.join_pair(mapping, parts, tensors, parameters, config)
            pair = peft_experts.flatten_pair(*pair, config) if is_fused(mapping) else pair
            published |= name_pair(wrapped_names[hf_name], mapping, *pair)
            unconverted -= {name for part in parts for name in (part.a, part.b)}
        magnitudes = [get_added_name(name, "lora_magnitude") for name in mapping.names]
        can_have_magnitude = bool(parts) and not is_parameter and not is_embedding(layer, mapping)
        if can_have_magnitude and all(name in tensors for name in magnitudes):
            expert = mapping.expert
            rows = [tensors[name] if expert is None else tensors[name][expert] for name in magnitudes]
            published[f"{PREFIX}{layer}.lora_magnitude_vector"] = lora_pairs.join_rows(mapping, rows, config)
            unconverted -= set(magnitudes)
        copies = [name + COPY_SUFFIX for name in mapping.names]
        if all(name in tensors for name in copies) and not (is_fused(mapping) and is_parameter):
            module, _, key = hf_name.rpartition(".")
            wrapped = f"{module}{BASE_LAYER * wrappers[module]}.{key}" if key.endswith("bias") else hf_name
            published[PREFIX + wrapped] = mapping.join([tensors[name] for name in copies], config)
            unconverted -= set(copies)
    if unconverted:
        raise UserError(f"{min(unconverted)}: not supported in PEFT's format; merge the adapter into its base instead")
    copy_names = [name.removeprefix(PREFIX) for name in published if ".lora_" not in name]
    notes = {layer: [part.to_dict() for part in parts] for layer, (_, parts) in layers.items()}
    return published, notes, build_lora_config(layers, copy_names, adapted_parameters, settings, base)


def is_embedding(layer: str, mapping: TensorMapping) -> bool:
    """Whether a published layer is the embedding itself, not a head tied to it."""
    return mapping.names == ("embedding.weight",) and not layer.endswith("head")


def name_pair(layer: str, mapping: TensorMapping, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """A pair under PEFT's names; the pair of an embedding is that of the transposed matrix."""
    if is_embedding(layer, mapping):
        return {f"{PREFIX}{layer}.lora_embedding_A": b.mT, f"{PREFIX}{layer}.lora_embedding_B": a.mT}
    return {f"{PREFIX}{layer}.lora_A.weight": a, f"{PREFIX}{layer}.lora_B.weight": b}


@dataclass
class PEFTTensors:
    """The tensors of a PEFT file by kind: pairs and DoRA's magnitudes by layer, trained copies by published name."""

    pairs: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)


def convert_lora_from_peft(
    published: Mapping[str, Tensor], values: Mapping[str, Any], notes: Any, config: Config
) -> tuple[LoRA, dict[str, Tensor]]:
    """Our settings and tensors of a LoRA adapter in PEFT's format.

    Pairs whose rank or scale differs from that of the settings are padded and scaled.

    Args:
        values: the content of `adapter_config.json`.
        notes: our entry of the file's metadata; None for an adapter that was written by other software.
    """
    mappings = list_published_mappings(config)
    mappings |= peft_experts.map_fused_experts(mappings)
    peft = sort_by_kind(published, mappings, values.get("target_parameters") or [], config)
    collector = TensorCollector(config)
    scales = {layer: read_scale(layer, values) for layer in peft.pairs} if not notes else {}
    scale = Counter(scales.values()).most_common(1)[0][0] if scales else 1.0
    rank = max((pair["a"].shape[-2] for pair in peft.pairs.values()), default=0 if notes else int(values["r"]))
    for layer, pair in peft.pairs.items():
        mapping, a, b = find_weight_mapping(layer, mappings), pair["a"], pair["b"]
        if notes:
            parts = [LoRAPart.from_dict(part) for part in notes["parts"][layer]]
            collector.add(mapping, lora_pairs.split_pair(mapping, parts, a, b, config))
            continue
        b = b if scales[layer] == scale else b * (scales[layer] / scale)
        missing_ranks = rank - a.shape[-2]
        a, b = pad(a, (0, 0, 0, missing_ranks)), pad(b, (0, missing_ranks))
        collector.add(mapping, lora_pairs.split_foreign_pair(mapping, a, b, config))
    for layer, rows in peft.magnitudes.items():
        mapping = find_weight_mapping(layer, mappings)
        parts_by_name = lora_pairs.split_rows_by_name(mapping, rows.flatten(), config)
        collector.add(mapping, {get_added_name(name, "lora_magnitude"): part for name, part in parts_by_name.items()})
    for hf_name, tensor in peft.copies.items():
        mapping = find_mapping(hf_name, mappings)
        copies = zip(mapping.names, mapping.split(tensor, config), strict=True)
        collector.add(mapping, {name + COPY_SUFFIX: part for name, part in copies})
    tensors = collector.stack_experts()
    return LoRA(**notes["settings"]) if notes else read_lora_settings(values, tensors, rank, scale), tensors


def sort_by_kind(
    published: Mapping[str, Tensor], mappings: Mappings, target_parameters: Iterable[str], config: Config
) -> PEFTTensors:
    """Sort the tensors of a PEFT file by kind; converts pairs to those of (out, in) matrices or stacks of them."""
    peft = PEFTTensors()
    wrapped_names = peft_experts.name_wrapped_pairs(peft_experts.match_target_parameters(target_parameters, mappings))
    layers = {wrapped: strip_ending(hf_name) for hf_name, wrapped in wrapped_names.items()}
    for name, tensor in published.items():
        if match := PAIR.fullmatch(name):
            half, is_of_embedding = match["half"][-1], "embedding" in match["half"]
            key = {"A": "b", "B": "a"}[half] if is_of_embedding else half.lower()
            peft.pairs[layers.get(match["layer"], match["layer"])][key] = tensor.mT if is_of_embedding else tensor
        elif match := MAGNITUDE.fullmatch(name):
            peft.magnitudes[match["layer"]] = tensor
        else:
            peft.copies[PEFT_WRAPPERS.sub(".", name)] = tensor
    for layer, pair in peft.pairs.items():
        if pair.keys() != {"a", "b"}:
            raise UserError(f"{layer}: only one of lora_A and lora_B is in the file")
        if is_fused(mapping := find_weight_mapping(layer, mappings)):
            columns = list_parameters(config)[mapping.names[0]].shape[-1]
            pair["a"], pair["b"] = peft_experts.unflatten_pair(mapping, pair["a"], pair["b"], columns, config)
    return peft


def find_mapping(hf_name: str, mappings: Mappings) -> TensorMapping:
    """The mapping of a published tensor.

    Raises:
        UserError: if the model has no such tensor.
    """
    if hf_name not in mappings:
        nearest = find_nearest(hf_name, mappings)
        raise UserError(f"{hf_name}: no tensor of this name in the model" + (f"; it has {nearest}" if nearest else ""))
    return mappings[hf_name]


def find_weight_mapping(layer: str, mappings: Mappings) -> TensorMapping:
    """The mapping of a published layer's matrix."""
    return mappings[layer] if layer in mappings else find_mapping(f"{layer}.weight", mappings)


class TensorCollector:
    """Collects our tensors from published ones: experts one by one, the embedding also from a tied head."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tensors: dict[str, Tensor] = {}
        self.experts: dict[str, dict[int, Tensor]] = defaultdict(dict)

    def add(self, mapping: TensorMapping, tensors: Mapping[str, Tensor]) -> None:
        """Add our tensors of a published one.

        Raises:
            UserError: if a head that is tied to the embedding has another update than the embedding.
        """
        for name, tensor in tensors.items():
            if mapping.expert is not None:
                self.experts[name][mapping.expert] = tensor
            elif not torch.equal(self.tensors.setdefault(name, tensor), tensor):
                raise UserError(f"{mapping.hf_name}: differs from the embedding's, but the model ties them")

    def stack_experts(self) -> dict[str, Tensor]:
        """All tensors, experts stacked; an expert without an update has zeros."""
        for name, experts in self.experts.items():
            zeros = torch.zeros_like(next(iter(experts.values())))
            self.tensors[name] = torch.stack([experts.get(expert, zeros) for expert in range(self.config.n_expert)])
        return self.tensors
