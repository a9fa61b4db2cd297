"""Write a model as a part of the published one that it was read from, with the other parts as they came."""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from litgpt.files import read_json_object
from litgpt.model.config import Config
from litgpt.model.hf_config import WholeKeys
from litgpt.model.hf_config_values import Values
from litgpt.model.names import CARRIED
from litgpt.model.registry import Family
from litgpt.store.weight_files import choose_weights, open_weights

STALE_KEYS = ("quantization_config", "dtype", "torch_dtype")
"""The keys of a `config.json` that are of its weights, which are written anew."""


@dataclass(frozen=True)
class CarriedParts:
    """The other parts of a published model, of which a model is one.

    Attributes:
        folder: of the published model.
        family: of the part that is read.
        whole: how that part is published.
        values: the `config.json` of the published model.
    """

    folder: Path
    family: Family
    whole: WholeKeys
    values: Values

    def add_tensors(self, tensors: Iterable[tuple[str, Tensor]], config: Config) -> Iterator[tuple[str, Tensor]]:
        """The published tensors of the part that is read, under their names in the whole, and those of the others."""
        for name, tensor in tensors:
            yield self.whole.start + name, tensor
        source = open_weights(self.folder)
        for name in source.names:
            if self.family.tensors.get_skip_reason(name, config) == CARRIED:
                yield name, source.read(name)

    def add_settings(self, part: Values) -> dict[str, Any]:
        """The `config.json` of the whole, from that of the part that is read."""
        whole = drop_stale_keys(self.values)
        if self.whole.key is None:
            nested = {key: value for key, value in part.items() if key.endswith("_config")}
            merged = {key: {**drop_stale_keys(whole.get(key) or {}), **value} for key, value in nested.items()}
            return {**whole, **part, **merged}
        before = drop_stale_keys(self.values[self.whole.key])
        return {**whole, "torch_dtype": part["torch_dtype"], self.whole.key: {**before, **part}}

    def copy_files(self, target: Path) -> None:
        """Copy the further files that the whole needs, and the target does not have."""
        for path in (path for pattern in self.whole.files for path in sorted(self.folder.glob(pattern))):
            if not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)


def drop_stale_keys(values: Values) -> dict[str, Any]:
    """The keys of a `config.json` that are not of its weights."""
    return {key: value for key, value in values.items() if key not in STALE_KEYS}


def find_carried_parts(folder: Path, family: Family) -> CarriedParts | None:
    """The other parts of the published model in a folder, of which one is of a family; None if it is not of parts.

    None too for a folder without weights, such as one of a tokenizer, whose model is not that which is written.
    """
    values = read_json_object(folder / "config.json")
    if family.whole is None or not family.is_whole(values) or choose_weights(folder) is None:
        return None
    return CarriedParts(folder, family, family.whole, values)
