"""Find a model's shape: by name among `families/*.yaml`, or from the files of a folder.

A family file is data: the published architecture (`architectures`, `model_type`), our fields that all members share
(`fixed`), our fields beside the keys of a `config.json` (`config`, `rope`), keys that must have one of some values
(`expect`, the first is written), what transformers assumes for an absent key (`missing`), tensor names (`tensors`,
`ignored`) and the members (`defaults`, `shapes`).
"""

import difflib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from litgpt.errors import UserError
from litgpt.files import read_json
from litgpt.model.config import Config, read_mapping
from litgpt.model.names import Table, table

# Facts about a run or a label, not about what the model computes.
LABELS = ("name", "hf_config", "dropout", "padding_multiple", "vocab_size")
ROPE_FIELDS = ("rope_base", "rope_adjustments", "rope_condense_ratio")
# Our name of a rope setting, and the one in a config.json.
ROPE_SETTINGS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}
ROPE_TYPES = {"linear": ["factor"], "llama3": list(ROPE_SETTINGS)}


@dataclass(frozen=True)
class Family:
    """A published architecture: what it can express, how its config.json says it, how its tensors are called."""

    name: str
    architectures: list[str]
    model_type: str
    fixed: Mapping[str, Any]
    config: Mapping[str, str]
    rope: Mapping[str, str]
    expect: Mapping[str, list[Any]]
    missing: Mapping[str, Any]
    tensors: Table
    shapes: Mapping[str, Mapping[str, Any]]
    unused: list[str] = field(default_factory=list)
    divisible: list[str] = field(default_factory=list)
    differs_in_litgpt: list[str] = field(default_factory=list)
    hub_names: Mapping[str, str] = field(default_factory=dict)

    def expresses(self, config: Config) -> bool:
        """Whether this architecture computes exactly what the config says."""
        kept = (*self.config, *ROPE_FIELDS, *LABELS, *self.unused, *(["rotary_percentage"] * ("partial" in self.rope)))
        try:
            echo = Config(**{**{key: getattr(config, key) for key in kept}, **self.fixed})
        except UserError:
            return False
        whole = not self.divisible or getattr(config, self.divisible[0]) % getattr(config, self.divisible[1]) == 0
        one_scaling = config.rope_condense_ratio == 1 or config.rope_adjustments is None
        return echo == config and whole and one_scaling

    def config_json(self, config: Config) -> dict[str, Any]:
        """The `config.json` of a model of this shape, rope in the form before transformers 5 and in that since."""
        return {
            "architectures": list(self.architectures),
            "model_type": self.model_type,
            **{key: accepted[0] for key, accepted in self.expect.items()},
            **{key: getattr(config, ours) for ours, key in self.config.items()},
            **self._write_rope(config),
        }

    def read(self, values: Mapping[str, Any], *, name: str = "") -> Config:
        """The shape that a `config.json` of this architecture tells.

        Raises:
            UserError: naming a key whose value this model does not run.
        """
        values = {**self.missing, **values}
        for key, accepted in self.expect.items():
            if values.get(key) not in accepted:
                raise UserError(f"config.json: {key}: {values.get(key)!r} is not supported; use {accepted[0]!r}")
        known = {ours: values.get(key) for ours, key in self.config.items()}
        return Config(
            **{key: value for key, value in known.items() if value is not None},
            **self._read_rope(values),
            **self.fixed,
            name=name,
            vocab_size=known["padded_vocab_size"],
        )

    def _read_rope(self, values: Mapping[str, Any]) -> dict[str, Any]:
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise UserError(f"config.json: rope_parameters: {rope!r} is no mapping like {{rope_type: default}}")
        found = {"rope_base": rope.get("rope_theta", values.get(self.rope["theta"]))}
        if "partial" in self.rope:
            found["rotary_percentage"] = rope.get("partial_rotary_factor", values.get(self.rope["partial"]))
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        if kind in ROPE_TYPES:
            found["rope_adjustments"] = {key: rope.get(ROPE_SETTINGS[key]) for key in ROPE_TYPES[kind]}
        elif kind != "default":
            raise UserError(f"config.json: rope_type: {kind!r} is not supported; use default or {sorted(ROPE_TYPES)}")
        return found

    def _write_rope(self, config: Config) -> dict[str, Any]:
        adjustments = config.rope_adjustments or {}
        if config.rope_condense_ratio != 1:
            adjustments = {"factor": config.rope_condense_ratio}
        kind = next((kind for kind, keys in ROPE_TYPES.items() if set(keys) == set(adjustments)), "default")
        scaling = {"rope_type": kind, **{ROPE_SETTINGS[key]: value for key, value in adjustments.items()}}
        theta = float(config.rope_base)
        partial = {"partial_rotary_factor": config.rotary_percentage} if "partial" in self.rope else {}
        return {
            self.rope["theta"]: theta,
            **({self.rope["partial"]: config.rotary_percentage} if partial else {}),
            "rope_scaling": scaling if adjustments else None,
            "rope_parameters": {**scaling, "rope_theta": theta, **partial},
        }


def load_family(data: dict[str, Any]) -> Family:
    """A family out of its file's mapping."""
    defaults, shapes, hub_names = data.pop("defaults", {}), {}, {}
    for row in data.pop("shapes", []):
        padded = {"vocab_size": row["shape"]["padded_vocab_size"]} if "padded_vocab_size" in row["shape"] else {}
        shape = {"vocab_size": defaults["padded_vocab_size"], **defaults, **padded, **row["shape"]}
        for entry in row["names"]:
            ((name, hub),) = entry.items() if isinstance(entry, dict) else ((entry.split("/")[-1], entry),)
            shapes[name] = shape
            hub_names[name] = hub
    tensors = table(data["name"], data.pop("tensors"), data.pop("ignored", ()))
    return Family(**data, tensors=tensors, shapes=shapes, hub_names=hub_names)


@cache
def data_files() -> dict[str, dict[str, Any]]:
    """The mapping in every file of `families/`, by name."""
    folder = files("litgpt.model") / "families"
    paths = sorted((path for path in folder.iterdir() if path.name.endswith(".yaml")), key=str)
    mappings = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths]
    return {mapping["name"]: mapping for mapping in mappings}


@cache
def families() -> dict[str, Family]:
    """Every published architecture that the model runs, by name."""
    return {name: load_family(dict(data)) for name, data in data_files().items() if "model_type" in data}


@cache
def litgpt_names() -> Table:
    """The table to LitGPT's own parameter names."""
    return table("litgpt", data_files()["litgpt"]["tensors"])


def names() -> list[str]:
    """Every name that `find` knows, family by family."""
    return list(itertools.chain.from_iterable(family.shapes for family in families().values()))


def find(name: str) -> Config:
    """The shape of a named model: our name, the hub's, or org/name.

    Raises:
        UserError: with the nearest known names.
    """
    for family in families().values():
        for known, hub in family.hub_names.items():
            if name in (known, hub, hub.split("/")[-1]):
                org, _, hub_name = hub.rpartition("/")
                hf_config = {"org": org, "name": hub_name} if org else {}
                return Config(**{**family.shapes[known], **family.fixed, "name": known, "hf_config": hf_config})
    near = difflib.get_close_matches(name.split("/")[-1], names(), 3)
    hint = f"did you mean {', '.join(near)}?" if near else "`litgpt pretrain list` names them all"
    raise UserError(f"model {name!r} is not known; {hint}")


def family_of(config: Config) -> Family | None:
    """The published architecture that computes exactly this shape: the one that lists it, else the first, else None."""
    able = [family for family in families().values() if family.expresses(config)]
    return next((family for family in able if config.name in family.shapes), able[0] if able else None)


def read_shape(folder: Path) -> Config:
    """The shape of the model in a folder: `model_config.yaml`, else `config.json`.

    Raises:
        UserError: if neither is there, one is malformed, or the architecture is not one that the model runs.
    """
    if (folder / "model_config.yaml").is_file():
        return read_model_config(folder / "model_config.yaml")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no model_config.yaml or config.json in it; give the folder of a model")
    try:
        values = read_json(folder / "config.json")
    except RecursionError:
        raise UserError(f"{folder / 'config.json'}: nested too deeply to be the config of a model") from None
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.json'}: holds {type(values).__name__}, not a mapping")
    for family in families().values():
        if values.get("model_type") == family.model_type:
            return family.read(values, name=folder.resolve().name)
    known = ", ".join(family.model_type for family in families().values())
    raise UserError(f"{folder / 'config.json'}: model_type: {values.get('model_type')!r} is not one of {known}")


def read_model_config(path: Path) -> Config:
    """The shape in a `model_config.yaml`; what LitGPT's form of it cannot say comes from the model that it names."""
    values = read_mapping(path)
    if "tie_embeddings" not in values:
        for family in families().values():
            shape = family.shapes.get(str(values.get("name")))
            if shape is not None:
                published = {**shape, **family.fixed}
                said = ("tie_embeddings", *family.differs_in_litgpt)
                values = {**values, **{key: published[key] for key in said if key in published}}
    return Config(**values)
