"""Load the adapters of LitGPT's LoRA runs from `lit_model.pth.lora` and `hyperparameters.yaml`."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import Tensor

from litgpt.errors import UserError, name_file
from litgpt.files import read_mapping
from litgpt.model.config import Config
from litgpt.model.names import TensorMapping, count_tensor_rows
from litgpt.model.registry import load_litgpt_table
from litgpt.recipe.finetune import LORA_SWITCHES
from litgpt.recipe.tuner import LoRA
from litgpt.store.adapters.lora_config import list_owners
from litgpt.store.adapters.lora_pairs import LoRAPart
from litgpt.store.adapters.peft_lora import TensorCollector
from litgpt.store.legacy import load_state_dict
from litgpt.store.published_tensor import list_parameters

LITGPT_WEIGHTS, LITGPT_SETTINGS = "lit_model.pth.lora", "hyperparameters.yaml"


def read_litgpt_settings(folder: Path) -> dict[str, Any]:
    """Read the settings of a LitGPT run from its folder.

    Raises:
        UserError: if they are missing or not readable.
    """
    path = folder / LITGPT_SETTINGS
    if not path.is_file():
        raise UserError(f"{path}: no such file; it has the settings of {LITGPT_WEIGHTS}")
    return read_mapping(path, "lora_r: 8")


def load_litgpt_lora(folder: Path, config: Config) -> tuple[LoRA, dict[str, Tensor]]:
    """Load the settings and, under our names, the tensors of the adapter in a folder.

    Raises:
        UserError: if a file is missing or damaged, or the adapter is for a model of another shape.
    """
    values, pairs, path = read_litgpt_settings(folder), read_pairs(folder / LITGPT_WEIGHTS), folder / LITGPT_WEIGHTS
    mappings = {mapping.hf_name: mapping for mapping in load_litgpt_table().map_names(list_parameters(config), config)}
    enabled = [LORA_SWITCHES[f"lora_{name}"][0] for name in ("query", "key", "value") if values.get(f"lora_{name}")]
    collector = TensorCollector(config)
    for layer, pair in pairs.items():
        mapping = mappings.get(f"{layer}.weight")
        if mapping is None or pair.keys() != {"A", "B"}:
            raise UserError(f"{path}: {layer} has no pair for this model; load the adapter's own base")
        try:
            collector.add(mapping, split_litgpt_pair(mapping, pair["A"], pair["B"], enabled, config))
        except (RuntimeError, ValueError):  # of torch, at sizes that do not add up
            sizes = f"A {list(pair['A'].shape)} and B {list(pair['B'].shape)}"
            raise UserError(f"{path}: {layer} has {sizes}, which do not fit {LITGPT_SETTINGS}") from None
    tensors = collector.stack_experts()
    try:
        with name_file(folder / LITGPT_SETTINGS, "tuner"):
            return LoRA(
                r=values["lora_r"],
                alpha=values["lora_alpha"],
                dropout=values.get("lora_dropout", 0.0),
                target_modules=list_owners(tensors, "lora_a"),
            ), tensors
    except KeyError as error:
        raise UserError(f"{folder / LITGPT_SETTINGS}: {error.args[0]} is missing") from None


def read_pairs(path: Path) -> dict[str, dict[str, Tensor]]:
    """Read A and B of every layer in a file."""
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in load_state_dict(path).items():
        layer, _, half = name.partition(".lora_")
        pairs[layer.removesuffix(".linear")][half] = tensor
    return pairs


def split_litgpt_pair(
    mapping: TensorMapping, a: Tensor, b: Tensor, enabled: list[str], config: Config
) -> dict[str, Tensor]:
    """Split the pair of a layer into ours; A and B of the enabled queries, keys and values are stacked in rows."""
    names = [name for name in mapping.names if len(mapping.names) == 1 or name.split(".")[-2] in enabled]
    rows = [b.shape[0]] if len(mapping.names) == 1 else [count_tensor_rows(config, name) for name in names]
    tensors: dict[str, Tensor] = {}
    for name, part_a, part_b in zip(names, a.chunk(len(names)), b.split(rows), strict=True):
        part = LoRAPart(name, first=False, rank=part_a.shape[0])
        tensors[part.a], tensors[part.b] = part_a, part_b
    return tensors
