"""Convert LoRA to and from PEFT's format: tensors under their published names, and settings."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
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
from litgpt.store.adapters.peft_options import MERGE, TASK_TYPES, find_training_error
from litgpt.store.adapters.saved_adapter import SavedAdapter, TokenRows
from litgpt.store.published_tensor import list_parameters

PREFIX = "base_model.model."
PAIR = re.compile(r"(?P<layer>.+)\.(?P<half>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.default)?(\.weight)?")
MAGNITUDE = re.compile(r"(?P<layer>.+)\.lora_magnitude_vector(\.default)?(\.weight)?")
TOKEN_ROWS = re.compile(r"(?P<layer>.+)\.token_adapter\.trainable_tokens_delta(\.default)?")
BASE_WEIGHT = re.compile(r"(?P<layer>.+?)(\.token_adapter)?(\.base_layer)+\.weight")
SUPERSEDED = re.compile(r".*(\.original_module\.|\.lora_velora_embed\b).*")  # the second is of the backward pass
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
        module = family.name_module(mapping.hf_name)
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
    embedding, _ = name_vocabulary_layers(config)
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
            published |= name_pair(wrapped_names[hf_name], *pair, is_embedding=layer == embedding)
            unconverted -= {name for part in parts for name in (part.a, part.b)}
        magnitudes = [get_added_name(name, "lora_magnitude") for name in mapping.names]
        can_have_magnitude = bool(parts) and not is_parameter and layer != embedding
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
    task_type = TASK_TYPES[config.output]
    return published, notes, build_lora_config(layers, copy_names, adapted_parameters, settings, base, task_type)


def name_vocabulary_layers(config: Config) -> tuple[str, str]:
    """The names of the embedding and of the head in transformers' modules, whether tied or not."""
    family, names = find_family(config), ("embedding.weight", "head.weight")
    mappings = [] if family is None else family.tensors.map_names(names, config)
    hf_names = {mapping.names[0]: mapping.hf_name for mapping in mappings}
    if family is not None:
        hf_names = {name: family.name_module(hf_name) for name, hf_name in hf_names.items()}
    embedding, head = (strip_ending(hf_names.get(name, name)) for name in names)
    return embedding, head


def name_pair(layer: str, a: Tensor, b: Tensor, *, is_embedding: bool) -> dict[str, Tensor]:
    """A pair under PEFT's names; the pair of an embedding is that of the transposed matrix."""
    if is_embedding:
        return {f"{PREFIX}{layer}.lora_embedding_A": b.mT, f"{PREFIX}{layer}.lora_embedding_B": a.mT}
    return {f"{PREFIX}{layer}.lora_A.weight": a, f"{PREFIX}{layer}.lora_B.weight": b}


@dataclass
class PEFTTensors:
    """The tensors of a PEFT file by kind.

    Attributes:
        pairs: A and B by published layer.
        magnitudes: of DoRA, by published layer.
        copies: trained copies, by published name.
        base_weights: weights of the base, by published name.
        token_rows: trained rows of the embedding or the head, by published layer.
    """

    pairs: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    base_weights: dict[str, Tensor] = field(default_factory=dict)
    token_rows: dict[str, Tensor] = field(default_factory=dict)

    def list_updates(self, layer: str) -> dict[str, Tensor]:
        """What is trained of a published layer, by kind."""
        updates = {"magnitude": self.magnitudes.get(layer), "copy": self.copies.get(f"{layer}.weight")}
        return self.pairs.get(layer, {}) | {key: tensor for key, tensor in updates.items() if tensor is not None}

    def list_row_counts(self, layer: str) -> set[int]:
        """The numbers of rows of a published layer's matrix in the file."""
        tensors = [self.copies.get(f"{layer}.weight"), self.base_weights.get(f"{layer}.weight")]
        tensors.append(self.pairs.get(layer, {}).get("b"))
        return {tensor.shape[0] for tensor in tensors if tensor is not None}


def convert_lora_from_peft(
    published: Mapping[str, Tensor], values: Mapping[str, Any], notes: Any, config: Config
) -> SavedAdapter:
    """A LoRA adapter in PEFT's format.

    Pairs whose rank or scale differs from that of the settings are padded and scaled.

    Args:
        values: the content of `adapter_config.json`.
        notes: our entry of the file's metadata; None for an adapter that was written by other software.
        config: of the base model.
    """
    mappings = list_published_mappings(config)
    peft = sort_by_kind(published, mappings | peft_experts.map_fused_experts(mappings), values, config)
    base = config
    config = replace(base, **notes.get("model", {})) if notes else find_trained_config(peft, values, base)
    mappings = list_published_mappings(config)
    mappings |= peft_experts.map_fused_experts(mappings)
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
    return SavedAdapter(
        settings=LoRA(**notes["settings"]) if notes else read_lora_settings(values, tensors, rank, scale),
        tensors=tensors,
        config=config,
        base_weights=convert_base_weights(peft, mappings, base, config),
        token_rows=read_token_rows(peft, values, mappings, config),
        training_error=find_training_error(values),
    )


def find_trained_config(peft: PEFTTensors, values: Mapping[str, Any], base: Config) -> Config:
    """The config of the model that PEFT trained: the base's, unless its embedding was untied or resized.

    PEFT trains a matrix of a tied embedding and head apart from the other one, unless `ensure_weight_tying` is set or
    both have the same updates.

    Raises:
        UserError: if embedding and head have different numbers of rows, or must be tied and are not.
    """
    if values.get("task_type") == TASK_TYPES["score"] and base.output != "score":
        if "score.weight" not in peft.copies:
            raise UserError("score.weight: missing in an adapter of SEQ_CLS; save it with modules_to_save: [score]")
        base = replace(base, output="score")
    embedding, head = name_vocabulary_layers(base)
    if embedding in peft.magnitudes:
        raise UserError(f"use_dora: true is not supported on the embedding; {MERGE}")
    counts = {layer: peft.list_row_counts(layer) for layer in (embedding, head)}
    changes: dict[str, Any] = {}
    match sorted(set().union(*counts.values())):
        case []:
            pass
        case [rows]:
            changes = {} if rows == base.padded_vocab_size else {"vocab_size": rows, "padded_vocab_size": rows}
        case rows:
            raise UserError(f"{embedding} and {head} have different numbers of rows: {', '.join(map(str, rows))}")
    updates, head_updates = peft.list_updates(embedding), peft.list_updates(head)
    is_same = updates.keys() == head_updates.keys() and all(torch.equal(updates[k], head_updates[k]) for k in updates)
    if base.tie_embeddings and (head in peft.token_rows or not (is_same or values.get("ensure_weight_tying"))):
        changes["tie_embeddings"] = False
        if embedding in peft.token_rows and head not in peft.token_rows:
            raise UserError(f"trainable_token_indices: not supported with an adapter of {head}, which the base ties")
    config = replace(base, **changes)
    if find_family(base) and not find_family(config):
        raise UserError(
            f"the adapter trains {embedding} or {head} alone, but the base ties them and its architecture has no "
            "untied form; train the adapter with ensure_weight_tying: true"
        )
    return config


def convert_base_weights(peft: PEFTTensors, mappings: Mappings, base: Config, config: Config) -> dict[str, Tensor]:
    """Our weights of the base in a PEFT file; one of two tied matrices stands for both."""
    weights: dict[str, Tensor] = {}
    for hf_name, tensor in peft.base_weights.items():
        mapping = find_mapping(hf_name, mappings)
        if mapping.expert is not None:
            raise UserError(f"{hf_name}: a weight of the base, and not supported in an adapter; remove it")
        weights |= zip(mapping.names, mapping.split(tensor, config), strict=True)
    both = ("embedding.weight", "head.weight")
    given = [weights[name] for name in both if name in weights]
    if base.tie_embeddings and not config.tie_embeddings and given:
        weights = dict.fromkeys(both, given[0]) | weights
    return weights


def read_token_rows(
    peft: PEFTTensors, values: Mapping[str, Any], mappings: Mappings, config: Config
) -> dict[str, TokenRows]:
    """The trained rows of tokens, by the name of our parameter.

    Raises:
        UserError: if they are not those of `trainable_token_indices`.
    """
    indices = values.get("trainable_token_indices") or {}
    embedding, _ = name_vocabulary_layers(config)
    by_end = indices if isinstance(indices, Mapping) else {embedding: indices}
    trained: dict[str, TokenRows] = {}
    for layer, rows in peft.token_rows.items():
        ids: list[int] = next((ids for end, ids in by_end.items() if layer.endswith(end)), [])
        if len(ids) != len(rows) or any(not 0 <= token < (config.padded_vocab_size or 0) for token in ids):
            raise UserError(f"trainable_token_indices: {len(ids)} tokens do not fit the {len(rows)} rows of {layer}")
        trained[find_weight_mapping(layer, mappings).names[0]] = TokenRows(torch.tensor(ids), rows)
    return trained


def sort_by_kind(
    published: Mapping[str, Tensor], mappings: Mappings, values: Mapping[str, Any], config: Config
) -> PEFTTensors:
    """Sort the tensors of a PEFT file by kind; converts pairs to those of (out, in) matrices or stacks of them."""
    peft = PEFTTensors()
    targets = peft_experts.match_target_parameters(values.get("target_parameters") or [], mappings)
    wrapped_names = peft_experts.name_wrapped_pairs(targets)
    layers = {wrapped: strip_ending(hf_name) for hf_name, wrapped in wrapped_names.items()}
    frozen = list_frozen_weights(values, config)
    for name in sorted(published, key=len, reverse=True):  # a plain name overrides a wrapped one
        tensor = published[name]
        if match := PAIR.fullmatch(name):
            half, is_of_embedding = match["half"][-1], "embedding" in match["half"]
            key = {"A": "b", "B": "a"}[half] if is_of_embedding else half.lower()
            peft.pairs[layers.get(match["layer"], match["layer"])][key] = tensor.mT if is_of_embedding else tensor
        elif match := MAGNITUDE.fullmatch(name):
            peft.magnitudes[match["layer"]] = tensor
        elif match := TOKEN_ROWS.fullmatch(name):
            peft.token_rows[match["layer"]] = tensor
        elif match := BASE_WEIGHT.fullmatch(name):
            peft.base_weights[f"{match['layer']}.weight"] = tensor
        elif name in frozen:
            peft.base_weights[name] = tensor
        elif not SUPERSEDED.fullmatch(name):
            peft.copies[PEFT_WRAPPERS.sub(".", name)] = tensor
    for layer, pair in peft.pairs.items():
        if pair.keys() != {"a", "b"}:
            raise UserError(f"{layer}: only one of lora_A and lora_B is in the file")
        if is_fused(mapping := find_weight_mapping(layer, mappings)):
            columns = list_parameters(config)[mapping.names[0]].shape[-1]
            pair["a"], pair["b"] = peft_experts.unflatten_pair(mapping, pair["a"], pair["b"], columns, config)
    return peft


def list_frozen_weights(values: Mapping[str, Any], config: Config) -> set[str]:
    """The published matrices that PEFT may save although it does not train them."""
    saved, vocabulary = tuple(values.get("modules_to_save") or ()), name_vocabulary_layers(config)
    trained = {layer for layer in vocabulary if layer.endswith(saved)}
    if trained and values.get("ensure_weight_tying"):
        trained = set(vocabulary)
    return {f"{layer}.weight" for layer in vocabulary if layer not in trained}


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
