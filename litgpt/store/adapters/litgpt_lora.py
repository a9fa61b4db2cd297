"""Folders of LitGPT's LoRA runs: `lit_model.pth.lora` and `hyperparameters.yaml`, read as an adapter."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.names import TensorMapping, count_rows
from litgpt.model.registry import load_litgpt_table
from litgpt.recipe.finetune import LORA_SWITCHES
from litgpt.recipe.tuner import LoRA
from litgpt.store.adapters.lora_pairs import LoRAPart
from litgpt.store.adapters.peft_lora import Taken
from litgpt.store.legacy import load_state_dict
from litgpt.store.published_tensor import list_parameters

WEIGHTS, SETTINGS = "lit_model.pth.lora", "hyperparameters.yaml"


def settings_in(folder: Path) -> dict[str, Any]:
    """What a folder says of the run that it is from.

    Raises:
        UserError: if it does not.
    """
    path = folder / SETTINGS
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it tells what {WEIGHTS} was trained beside") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not the settings of a run")
    return values


def load(folder: Path, config: Config) -> tuple[LoRA, dict[str, Tensor]]:
    """Settings and tensors, under our names, of the adapter in a folder.

    Raises:
        UserError: if a file is missing or damaged, or the adapter is for a model of another shape.
    """
    values, pairs = settings_in(folder), pairs_in(folder / WEIGHTS)
    steps = {step.hf_name: step for step in load_litgpt_table().map_names(list(list_parameters(config)), config)}
    enabled = [LORA_SWITCHES[f"lora_{name}"][0] for name in ("query", "key", "value") if values.get(f"lora_{name}")]
    taken = Taken(config)
    for layer, pair in pairs.items():
        step = steps.get(f"{layer}.weight")
        if step is None or pair.keys() != {"A", "B"}:
            raise UserError(f"{folder / WEIGHTS}: {layer} has no pair for this model; load the adapter's own base")
        try:
            taken.add(step, split(step, pair["A"], pair["B"], enabled, config))
        except (RuntimeError, ValueError):  # of torch, at sizes that do not add up
            sizes = f"A {list(pair['A'].shape)} and B {list(pair['B'].shape)}"
            raise UserError(f"{folder / WEIGHTS}: {layer} has {sizes}, which do not fit {SETTINGS}") from None
    tensors = taken.whole()
    try:
        return LoRA(
            r=values["lora_r"],
            alpha=values["lora_alpha"],
            dropout=values.get("lora_dropout", 0.0),
            target_modules=sorted({re.sub(r"[._]lora_[ab]$", "", name) for name in tensors}),
        ), tensors
    except KeyError as error:
        raise UserError(f"{folder / SETTINGS}: {error.args[0]} is missing") from None


def pairs_in(path: Path) -> dict[str, dict[str, Tensor]]:
    """The A and B of every layer in a file."""
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in load_state_dict(path).items():
        layer, _, half = name.partition(".lora_")
        pairs[layer.removesuffix(".linear")][half] = tensor
    return pairs


def split(step: TensorMapping, a: Tensor, b: Tensor, enabled: list[str], config: Config) -> dict[str, Tensor]:
    """Our pairs of a layer: of queries, keys and values those that were enabled, one below the other in A and in B."""
    ours = [name for name in step.names if len(step.names) == 1 or name.split(".")[-2] in enabled]
    rows = [b.shape[0]] if len(step.names) == 1 else [count_rows(config, name) for name in ours]
    found: dict[str, Tensor] = {}
    for name, one, other in zip(ours, a.chunk(len(ours)), b.split(rows), strict=True):
        part = LoRAPart(name, first=False, rank=one.shape[0])
        found |= {part.parameter_name("a"): one, part.parameter_name("b"): other}
    return found
