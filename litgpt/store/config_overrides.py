"""Change fields of the configuration of saved weights that no tensor depends on."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from litgpt.errors import UserError
from litgpt.model.config import Config, override_fields
from litgpt.store.published_tensor import list_parameters


def override_config(config: Config, overrides: Mapping[str, Any]) -> Config:
    """The config with some fields changed; a mapping changes single keys of a mapping.

    Prediction layers may be left out, but no other tensor.

    Args:
        overrides: values by field. None leaves a field as it is, and removes a key of a mapping.

    Raises:
        UserError: naming a field that is wrong, or changes the shape of a tensor.
    """
    values = config.to_dict()
    given = override_fields(values, overrides)
    if not given:
        return config
    changed = Config(**{**values, **given})
    layers = min(config.n_prediction_layers, changed.n_prediction_layers)
    old, new = list_shapes(replace(config, n_prediction_layers=layers)), list_shapes(changed)
    for name in (*old, *new):
        if old.get(name) != new.get(name):
            sizes = f"{old.get(name, 'no tensor')} to {new.get(name, 'no tensor')}"
            key = find_key_of_shape(config, given)
            raise UserError(f"model_config.{key}: {given[key]} changes {name} from {sizes}; leave it out")
    return changed


def list_shapes(config: Config) -> dict[str, list[int]]:
    """The shapes of all parameters of a model."""
    return {name: list(parameter.shape) for name, parameter in list_parameters(config).items()}


def find_key_of_shape(config: Config, given: Mapping[str, Any]) -> str:
    """The first of some fields that changes the shape of a parameter by itself, or else the first of them."""
    for key, value in given.items():
        try:
            if list_shapes(Config(**{**config.to_dict(), key: value})) != list_shapes(config):
                return key
        except UserError:
            continue  # it needs another one of them
    return next(iter(given))
