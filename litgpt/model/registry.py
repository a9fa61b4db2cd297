"""Find a model's configuration: by name in `families/*.yaml`, or from the files of a folder.

A family file is data: the keys of the architecture's `config.json` (see `hf_config.ConfigKeys`), the names of tensors
(`tensors`, `ignored`, ...; see `names.build_name_table`) and the models (`shapes`, as config fields or `config.json`;
`defaults` apply to those with config fields). A family `like` another inherits its entries, except those set to null.
A file with `towers` describes models with a tower; see `tower_families`.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from litgpt.errors import UserError, name_file
from litgpt.files import read_json, read_mapping
from litgpt.model.hf_config import ConfigKeys, ImageHeadKeys, WholeKeys
from litgpt.model.hf_config_experts import normalize_expert_fields
from litgpt.model.hf_config_layers import has_bias
from litgpt.model.hf_config_towers import TowerKeys
from litgpt.model.hf_config_values import unsupported_key
from litgpt.model.names import NameTable, build_name_table
from litgpt.model.tower_families import TOWER_PARTS, expand_tower_family, merge_parent_file
from litgpt.model.transformer_config import TransformerConfig

CONFIG_FILES = ("model_config.yaml", "config.json")
# Fields that do not change what the model computes.
LABELS = ("name", "hf_config", "dropout", "padding_multiple", "vocab_size")
# Entries that a family inherits, key by key.
INHERITED = ("fixed", "config", "translated", "expect", "missing", "tensors")


@dataclass(frozen=True, kw_only=True)
class Family(ConfigKeys):
    """A published architecture: the configs it supports, the keys of its config.json, the names of its tensors.

    Attributes:
        unused: config fields that have no effect.
        divisible: two config fields; transformers requires the first to be a multiple of the second.
        order: precedence among the families that can express a config, lowest first.
        differs_in_litgpt: config fields that LitGPT does not have, or gives another value.
        module_names: ends of tensor names in files, and their names in transformers' modules.
        module_starts: the same of starts.
        transposed_in_peft: whether PEFT reads stacked (in, out) matrices as (out, in).
    """

    name: str
    tensors: NameTable
    shapes: Mapping[str, Mapping[str, Any]]
    unused: list[str] = field(default_factory=list)
    divisible: list[str] = field(default_factory=list)
    order: int = 1
    differs_in_litgpt: list[str] = field(default_factory=list)
    hub_names: Mapping[str, str] = field(default_factory=dict)
    module_names: Mapping[str, str] = field(default_factory=dict)
    module_starts: Mapping[str, str] = field(default_factory=dict)
    transposed_in_peft: bool = False

    def name_module(self, hf_name: str) -> str:
        """The name in transformers' modules of a tensor with this name in files."""
        end = next((end for end in self.module_names if hf_name.endswith(f".{end}")), None)
        name = hf_name if end is None else hf_name.removesuffix(end) + self.module_names[end]
        start = next((start for start in self.module_starts if name.startswith(start)), None)
        return name if start is None else self.module_starts[start] + name.removeprefix(start)

    def can_express(self, config: TransformerConfig) -> bool:
        """Whether a config, written as this architecture's config.json and read back, computes the same."""
        towers = [part for part in TOWER_PARTS if getattr(config, part) is not None]
        if towers != [tower.part for tower in self.towers] or (self.nested and not self.towers):
            return False
        if self.divisible and getattr(config, self.divisible[0]) % getattr(config, self.divisible[1]):
            return False
        try:
            reread = self.read(self.config_json(config))
        except UserError:
            return False
        return is_equivalent(normalize_config(reread, self.unused), normalize_config(config, self.unused))


def normalize_config(config: TransformerConfig, unused: list[str]) -> dict[str, Any]:
    """The fields of a config without labels and with derived values, equal if two configs compute the same."""
    values = {key: value for key, value in config.to_dict().items() if key not in (*LABELS, *unused)}
    if config.rope_condense_ratio != 1 and config.rope_adjustments is None:
        values |= {"rope_adjustments": {"factor": config.rope_condense_ratio}, "rope_condense_ratio": 1}
    layers = range(config.n_layer)
    return {
        **values,
        **{key: has_bias(config, key) for key in ("attn_bias", "attn_out_bias", "mlp_bias")},
        "attention_scores_scalar": config.attention_scores_scalar or config.head_size,
        "sliding_window_indices": [config.is_local(layer) for layer in layers],
        "rope_layers": [config.rope_of(layer) for layer in layers],
        "rope_indices": None,
        "norm_qk_type": config.norm_qk_type if config.norm_qk else None,
        **normalize_expert_fields(config),
    }


def is_equivalent(a: Any, b: Any) -> bool:
    """Whether two values are equal, numbers up to the rounding of a reciprocal."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(is_equivalent(a[key], b[key]) for key in a)
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-9)
    return bool(a == b)


def merge_parent_family(name: str) -> dict[str, Any]:
    """The entries of a family, with those inherited from the family that it is `like`."""
    data = dict(load_family_files()[name])
    base = merge_parent_family(data.pop("like")) if "like" in data else {}
    for key in INHERITED:
        entries = data.get(key, {})
        inherited = {name: value for name, value in base.get(key, {}).items() if name not in entries}
        data[key] = {name: value for name, value in {**entries, **inherited}.items() if value is not None}
    for key in ("ignored", "prefix", "unused", "divisible", "module_names", "copies"):
        if key in base:
            data.setdefault(key, base[key])
    return data


TABLE_KEYS = ("ignored", "unread", "carried", "prefix", "starts", "copies")
"""The entries of a file that belong to its table of names, beside `tensors`."""


def build_family(data: dict[str, Any]) -> Family:
    """Build a family from the entries of its file."""
    defaults, rows = data.pop("defaults", {}), data.pop("shapes", [])
    for_table = {key: data.pop(key) for key in TABLE_KEYS if key in data}
    tensors = build_name_table(data["name"], data.pop("tensors"), **for_table)
    data["towers"] = [TowerKeys(**tower) for tower in data.get("towers", [])]
    if "whole" in data:
        data["whole"] = WholeKeys(**data["whole"])
    if "image_head" in data:
        data["image_head"] = ImageHeadKeys(**data["image_head"])
    family = Family(**data, tensors=tensors, shapes={})
    shapes, hub_names = {}, {}
    for row in rows:
        shape = build_member_fields(family, row, defaults)
        for entry in row["names"]:
            ((name, hub),) = entry.items() if isinstance(entry, dict) else ((entry.split("/")[-1], entry),)
            shapes[name] = shape
            hub_names[name] = hub
    return replace(family, shapes=shapes, hub_names=hub_names)


def build_member_fields(family: Family, row: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The config fields of a model of a family, given as fields (`shape`) or as a `config.json` (`published`)."""
    if "published" in row:
        return {**family.read(row["published"]).to_dict(), **row.get("shape", {})}
    shape = row["shape"]
    padded = {"vocab_size": shape["padded_vocab_size"]} if "padded_vocab_size" in shape else {}
    return {"vocab_size": defaults.get("padded_vocab_size"), **defaults, **padded, **shape}


@cache
def load_family_files(folder_name: str = "families") -> dict[str, dict[str, Any]]:
    """The contents of the files in `families/`, or `towers/`, by name."""
    folder = files("litgpt.model") / folder_name
    paths = sorted((path for path in folder.iterdir() if path.name.endswith(".yaml")), key=str)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, if PyYAML was built with libyaml
    mappings = [yaml.load(path.read_text(encoding="utf-8"), loader) for path in paths]  # noqa: TID251, a safe one
    return {mapping["name"]: mapping for mapping in mappings}


@cache
def load_families() -> dict[str, Family]:
    """All supported architectures, by name."""
    published = {name: data for name, data in load_family_files().items() if "model_type" in data}
    merged = {name: merge_parent_family(name) for name, data in published.items() if "towers" not in data}
    towers = load_family_files("towers")
    for name in (name for name, data in published.items() if "towers" in data):
        entries = expand_tower_family(merge_parent_file(published, name), merged, towers)
        merged |= {entry["name"]: entry for entry in entries}
    return {name: build_family(dict(data)) for name, data in merged.items()}


@cache
def load_format_table(name: str) -> NameTable:
    """The table of the tensor names of a file format: litgpt, gguf or megatron."""
    data = load_family_files()[name]
    return build_name_table(name, data["tensors"], **{key: data[key] for key in TABLE_KEYS if key in data})


def load_litgpt_table() -> NameTable:
    """The table of LitGPT's parameter names."""
    return load_format_table("litgpt")


def list_model_names() -> list[str]:
    """All names that `lookup_config` knows, family by family."""
    return [name for family in load_families().values() for name in family.shapes]


def lookup_config(name: str) -> TransformerConfig:
    """The config of a known model: its name in the family file, on the hub, or org/name.

    Raises:
        UserError: with the nearest known names.
    """
    for family in load_families().values():
        for local_name, hub in family.hub_names.items():
            if name in (local_name, hub, hub.split("/")[-1]):
                org, _, hub_name = hub.rpartition("/")
                labels = {"name": local_name, "hf_config": {"org": org, "name": hub_name} if org else {}}
                return TransformerConfig(**{**family.shapes[local_name], **family.fixed, **labels})
    near = difflib.get_close_matches(name.split("/")[-1], list_model_names(), 3)
    hint = f"did you mean {', '.join(near)}?" if near else "`litgpt pretrain list` names them all"
    raise UserError(f"model {name!r} is not known; {hint}")


def find_family(config: TransformerConfig) -> Family | None:
    """The published architecture that can express a config, None if there is none.

    Of several it is the one that lists the model, else the one it was read from, else that with the lowest order.
    """

    def preference(family: Family) -> tuple[bool, bool, int]:
        is_source = config.hf_config.get("model_type") == family.model_type
        return config.name not in family.shapes, not is_source, family.order

    ranked = sorted(load_families().values(), key=preference)
    return next((family for family in ranked if family.can_express(config)), None)


def has_config(folder: Path) -> bool:
    """Whether a folder has a file with the configuration of a model."""
    return any((folder / name).is_file() for name in CONFIG_FILES)


def read_config(folder: Path) -> TransformerConfig:
    """The config of the model in a folder, from `model_config.yaml`, else `config.json`.

    Raises:
        UserError: if both are missing, one is malformed, or the architecture is not supported.
    """
    if (folder / "model_config.yaml").is_file():
        return read_model_config(folder / "model_config.yaml")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: has no model_config.yaml or config.json; use the folder of a model")
    try:
        values = read_json(folder / "config.json")
    except RecursionError:
        raise UserError(f"{folder / 'config.json'}: nested too deeply to be the config of a model") from None
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.json'}: holds {type(values).__name__}, not a mapping")
    with name_file(folder / "config.json", "model_config"):
        if family := find_published_family(values):
            return family.read(values, name=folder.resolve().name)
    families = load_families().values()
    whole = [family.whole.model_type for family in families if family.whole is not None]
    supported = ", ".join(dict.fromkeys([*(family.model_type for family in families), *whole]))
    raise UserError(f"{folder / 'config.json'}: model_type: {values.get('model_type')!r} is not one of {supported}")


def find_published_family(values: Mapping[str, Any]) -> Family | None:
    """The family of a `config.json`, by its model type, that of its decoder and that of its tower; None without one.

    Raises:
        UserError: if the family is not known with this decoder, or this tower.
    """
    families = [
        family
        for family in load_families().values()
        if family.is_whole(values) or family.model_type == values.get("model_type")
    ]
    values = families[0].select_part(values) if families else values
    for key in dict.fromkeys(["text_config", *(key for family in families for key in family.part_types)]):
        part = values.get(key)
        given = part.get("model_type") if isinstance(part, dict) else None
        types: list[Any] = [family.part_types.get(key, given) for family in families]
        if given is None or not families:
            continue
        if key != "text_config" and len(set(types)) == 1:  # older folders have another type of the only tower
            continue
        if given not in types:
            raise unsupported_key(f"{key}.model_type", given, " or ".join(dict.fromkeys(map(str, types))))
        families = [family for family, kind in zip(families, types, strict=True) if kind == given]
    return families[0] if families else None


def read_model_config(path: Path) -> TransformerConfig:
    """The config in a `model_config.yaml`; fields that LitGPT does not have are those of the model with its name."""
    values = read_mapping(path)
    if "tie_embeddings" not in values:
        for family in load_families().values():
            shape = family.shapes.get(str(values.get("name")))
            if shape is not None:
                published = {**shape, **family.fixed}
                keys = ("tie_embeddings", *family.differs_in_litgpt)
                values = {**values, **{key: published[key] for key in keys if key in published}}
    with name_file(path, "model_config"):
        return TransformerConfig(**values)
