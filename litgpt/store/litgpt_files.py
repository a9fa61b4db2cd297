"""Write a model as LitGPT 0.5 keeps it: lit_model.pth and its form of model_config.yaml; or as one model.pth."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from litgpt.errors import UserError
from litgpt.files import staged_folder
from litgpt.model.config import Config
from litgpt.model.names import to_hf_names
from litgpt.model.registry import find_family, load_litgpt_table, normalize_config, read_model_config
from litgpt.store.load_model import iter_tensors
from litgpt.store.save_model import choose_dtype, list_float32_parameters
from litgpt.store.tokenizer_files import copy_tokenizer
from litgpt.store.weight_files import LIT_MODEL

# LitGPT's word for a norm; which of the two it means it reads off the model's name.
NORMS = {"OffsetRMSNorm": "RMSNorm", "BareLayerNorm": "LayerNorm"}
FIRST_OF_OURS = "tie_embeddings"  # the fields of a shape before it are LitGPT's
UNTOLD = ("tie_embeddings", "norm_class_name")


def list_litgpt_fields() -> list[str]:
    """The fields of a shape that LitGPT has too."""
    names = [field.name for field in fields(Config)]
    return names[: names.index(FIRST_OF_OURS)]


def to_litgpt_config(config: Config) -> dict[str, Any]:
    """The mapping of LitGPT's model_config.yaml."""
    values = config.to_dict()
    form = {name: values[name] for name in list_litgpt_fields()}
    return {**form, "norm_class_name": NORMS.get(config.norm_class_name, config.norm_class_name)}


def write_litgpt_config(path: Path, config: Config) -> None:
    """Write LitGPT's form of a shape, if it says all of it.

    Raises:
        UserError: naming the field that LitGPT cannot say.
    """
    path.write_text(yaml.safe_dump(to_litgpt_config(config)), encoding="utf-8")
    told, meant = normalize_config(read_model_config(path), []), normalize_config(config, [])
    told["tie_embeddings"] = meant["tie_embeddings"]  # LitGPT keeps the two matrices apart, which computes the same
    wrong = [key for key in meant if told[key] != meant[key]]
    kinds = {"norm_qk_type": ("default", "olmo2"), "norm_class_name": ("LayerNorm", "RMSNorm", *NORMS)}
    wrong += [key for key, known in kinds.items() if getattr(config, key) not in known]
    wrong += ["rope_adjustments"] if config.rope_kind in ("dynamic", "longrope") else []
    if wrong:
        raise UserError(
            f"format: LitGPT has no way to say {wrong[0]}: {getattr(config, wrong[0], None)!r}; use format: huggingface"
        )


def all_tensors(source: Path, config: Config, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Every weight under our names, cast."""
    pinned = list_float32_parameters(config)
    return {name: one.to(choose_dtype(name, one, dtype, pinned)) for name, one in iter_tensors(source, config)}


def write_litgpt_folder(folder: Path, source: Path, config: Config, *, dtype: torch.dtype | None = None) -> None:
    """Make a new folder that LitGPT loads; a tied head is in the file twice by name and once by bytes.

    Raises:
        UserError: if LitGPT cannot say this shape, or `folder` holds something already.
    """
    with staged_folder(folder) as staged:
        write_litgpt_config(staged / "model_config.yaml", config)
        tensors = to_hf_names(load_litgpt_table(), all_tensors(source, config, dtype), config)
        tensors.setdefault("lm_head.weight", tensors["transformer.wte.weight"])
        torch.save(tensors, staged / LIT_MODEL)
        copy_tokenizer(source, staged)


def write_model_pth(folder: Path, source: Path, config: Config, *, dtype: torch.dtype | None = None) -> None:
    """Make a new folder with model.pth, torch's file of the weights under their published names.

    Raises:
        UserError: if no published architecture has this shape, or `folder` holds something already.
    """
    family = find_family(config)
    if family is None:
        raise UserError("format: model.pth has published names, and no published architecture has this shape")
    with staged_folder(folder) as staged:
        torch.save(to_hf_names(family.tensors, all_tensors(source, config, dtype), config), staged / "model.pth")
