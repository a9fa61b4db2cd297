"""The configuration of a model, and how to construct it from a name, a file or a checkpoint folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litgpt.files import read_mapping
from litgpt.mappings import drop_nulls, merge_mappings
from litgpt.model.registry import lookup_config, read_config
from litgpt.model.transformer_config import TransformerConfig


def override_fields(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are overridden, with their new values: mappings are merged with those of `values`.

    None leaves a field as it is, and removes a key of a mapping.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    merged = merge_mappings(values, given)
    return {key: drop_nulls(merged[key]) if isinstance(values.get(key), Mapping) else merged[key] for key in given}


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
