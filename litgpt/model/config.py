"""The configuration of a model, and how to construct it from a name, a file or a checkpoint folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litgpt.files import read_mapping
from litgpt.model.registry import lookup_config, read_config
from litgpt.model.transformer_config import TransformerConfig


def merge_fields(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `overrides` that are not None, each merged with that of `values` if both are mappings."""
    given = {key: value for key, value in overrides.items() if value is not None}
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), Mapping):
            merged = {**values[key], **value}
            given[key] = {name: part for name, part in merged.items() if part is not None}
    return given


class Config(TransformerConfig):
    """The configuration of a model, with LitGPT's ways to construct it."""

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "Config":
        """The configuration of a known model (its name, the hub's name, or org/name), with some fields overridden.

        Sizes that are derived from others by default (head_size, n_query_groups, the plain MLP's intermediate_size)
        follow when those are overridden.
        """
        values = lookup_config(name).to_dict()
        if values["head_size"] == values["n_embd"] // values["n_head"]:
            values["head_size"] = None
        if values["n_query_groups"] == values["n_head"]:
            values["n_query_groups"] = None
        if values["mlp_class_name"] == "GptNeoxMLP" and values["intermediate_size"] == 4 * values["n_embd"]:
            values["intermediate_size"] = None
        return cls(**{**values, **overrides})

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> "Config":
        """The configuration in a `model_config.yaml`, with some fields overridden.

        Raises:
            UserError: if the file is missing, is not a YAML mapping, or a field has an invalid value.
        """
        return cls(**{**read_mapping(Path(path)), **overrides})

    @classmethod
    def from_checkpoint(cls, path: str | Path, **overrides: Any) -> "Config":
        """The configuration of the model in a checkpoint folder, with some fields overridden."""
        return cls(**{**read_config(Path(path)).to_dict(), **overrides})
