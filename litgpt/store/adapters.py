"""Adapters on disk: PEFT's folders, read and written, whatever parts of ours a published layer holds in one.

A published layer that is several of ours (phi-3's `qkv_proj` is our q, k and v) has one pair A, B: the parts' A stand
one below the other, and their B side by side, each in its own rows and columns. A part's pair of first values (see
`adapt.lora`) is one more part, with B turned to its negative. Which rows and columns are whose is in the file's
metadata; in a folder by others, the parts of a layer share its A.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.files import read_json, staged_folder, write_json
from litgpt.model.config import Config
from litgpt.model.names import Step
from litgpt.model.registry import family_of
from litgpt.recipe.tuner import LoRA
from litgpt.store.reading import shapes_of
from litgpt.store.tensors import TensorFiles, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
START = "base_model.model."
COPY = "_trained"
FIRST = "_first"
Tensors = Mapping[str, Tensor]
Pair = tuple[str, str, int]  # our tensor, "" or FIRST, and the rank


@dataclass(frozen=True)
class Adapter:
    """What a folder says of an adapter: its settings, its tensors under our names, and the base it was made for."""

    settings: LoRA
    tensors: dict[str, Tensor]
    base: str


def steps_of(config: Config) -> list[Step]:
    """How each published tensor is made of ours; under our own names where no published architecture has the shape."""
    family, names = family_of(config), list(shapes_of(config))
    return family.tensors.writing(names, config) if family else [Step(name, (name,), "rename") for name in names]


def added_to(ours: str, key: str) -> str:
    """The name of a parameter that a tuner adds beside one of ours."""
    return ours.removesuffix("weight") + key if ours.endswith(".weight") else f"{ours}_{key}"


def layer_of(theirs: str) -> str:
    """The published layer that holds a weight or a bias."""
    return theirs.removesuffix(".weight").removesuffix(".bias")


def save(
    folder: Path | str, tensors: Tensors, *, config: Config, settings: LoRA, base: str = "", replace: bool = False
) -> None:
    """Write an adapter as a PEFT folder, whole or not at all.

    Args:
        tensors: what the tuner added or trains, whole, on the CPU, under our names.
        base: the name or path of the model that it was made for.
        replace: take the place of a folder that exists.

    Raises:
        UserError: if the folder holds something already, or PEFT has no form for a tensor.
    """
    published, pairs, left = to_peft(tensors, config)
    if left:
        raise UserError(f"{min(left)}: a PEFT folder has no place for it alone; train its whole layer or leave it out")
    notes = {"settings": asdict(settings), "pairs": pairs}
    with staged_folder(Path(folder), replace=replace) as staged:
        whole = {name: tensor.detach().contiguous() for name, tensor in published.items()}
        write_tensors(staged / WEIGHTS, whole, {"format": "pt", "litgpt": json.dumps(notes)})
        write_json(staged / CONFIG, peft_config(published, pairs, settings, config, base))


def to_peft(tensors: Tensors, config: Config) -> tuple[dict[str, Tensor], dict[str, list[Pair]], set[str]]:
    """PEFT's tensors, the parts of each layer's pair, and those of our tensors that it has no form for."""
    published: dict[str, Tensor] = {}
    pairs: dict[str, list[Pair]] = {}
    left, shapes, steps = set(tensors), shapes_of(config), steps_of(config)
    for step in with_tied_head(steps, config):
        layer = layer_of(step.theirs)
        if parts := parts_of(step, tensors):
            a, b = joined_pair(step, parts, tensors, shapes, config)
            pairs[layer] = parts
            embedding = step.ours == ("embedding.weight",) and layer != "lm_head"
            published |= in_embedding(layer, a, b) if embedding else in_linear(layer, a, b)
            left -= {added_to(ours, f"lora_{half}{first}") for ours, first, _ in parts for half in "ab"}
        for key, name in (("lora_magnitude", "lora_magnitude_vector.weight"), (COPY, step.theirs[len(layer) + 1 :])):
            names = [ours + COPY if key == COPY else added_to(ours, key) for ours in step.ours]
            if all(name in tensors for name in names):
                plain = step if key == COPY else replace(step, transposed=False)
                inner = "base_layer." if key == COPY and name == "bias" and was_adapted(step, tensors) else ""
                published[f"{START}{layer}.{inner}{name}"] = plain.join([tensors[name] for name in names], config)
                left -= set(names)
    return published, pairs, left
