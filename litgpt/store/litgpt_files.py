"""Write a model in the format of LitGPT 0.5: lit_model.pth and its model_config.yaml; or as one model.pth."""

from dataclasses import fields
from pathlib import Path

import torch
import yaml
from torch import Tensor

from litgpt.errors import UserError
from litgpt.files import staged_folder
from litgpt.model.config import Config
from litgpt.model.names import to_hf_names
from litgpt.model.registry import find_family, load_litgpt_table, normalize_config, read_model_config
from litgpt.store.load_model import iter_tensors
from litgpt.store.published_tensor import list_parameters
from litgpt.store.save_model import cast_tensors
from litgpt.store.tokenizer_files import copy_tokenizer
from litgpt.store.weight_files import LIT_MODEL

# LitGPT's names of norms; which of two norms a name means depends on the model's name.
LITGPT_NORMS = {"OffsetRMSNorm": "RMSNorm", "BareLayerNorm": "LayerNorm"}
FIRST_OWN_FIELD = "tie_embeddings"  # the fields of a config before it are LitGPT's


def write_litgpt_config(path: Path, config: Config) -> None:
    """Write the config as LitGPT's model_config.yaml, if LitGPT can express all of it.

    Raises:
        UserError: naming the field that LitGPT cannot express.
    """
    names, values = [field.name for field in fields(Config)], config.to_dict()
    values = {name: values[name] for name in names[: names.index(FIRST_OWN_FIELD)]}
    values["norm_class_name"] = LITGPT_NORMS.get(config.norm_class_name, config.norm_class_name)
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    written, expected = normalize_config(read_model_config(path), []), normalize_config(config, [])
    written["tie_embeddings"] = expected["tie_embeddings"]  # LitGPT keeps the two matrices apart, with equal results
    wrong = [key for key in expected if written[key] != expected[key]]
    choices = {"norm_qk_type": ("default", "olmo2"), "norm_class_name": ("LayerNorm", "RMSNorm", *LITGPT_NORMS)}
    wrong += [key for key, supported in choices.items() if getattr(config, key) not in supported]
    wrong += ["rope_adjustments"] if config.rope_kind in ("dynamic", "longrope") else []
    if wrong:
        raise UserError(
            f"format: LitGPT cannot express {wrong[0]}: {getattr(config, wrong[0], None)!r}; use format: huggingface"
        )


def read_tensors(source: Path, config: Config, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Read all weights under our names, cast to `dtype`; None keeps the type of each."""
    return dict(cast_tensors(iter_tensors(source, config), dtype, list_parameters(config)))


def write_litgpt_folder(folder: Path, source: Path, config: Config, *, dtype: torch.dtype | None = None) -> None:
    """Make a new folder that LitGPT loads; a tied head has two names in the file for one set of bytes.

    Raises:
        UserError: if LitGPT cannot express this shape, or `folder` exists and is not empty.
    """
    with staged_folder(folder) as staged:
        write_litgpt_config(staged / "model_config.yaml", config)
        tensors = to_hf_names(load_litgpt_table(), read_tensors(source, config, dtype), config)
        tensors.setdefault("lm_head.weight", tensors["transformer.wte.weight"])
        torch.save(tensors, staged / LIT_MODEL)
        copy_tokenizer(source, staged)


def write_model_pth(folder: Path, source: Path, config: Config, *, dtype: torch.dtype | None = None) -> None:
    """Make a new folder with model.pth, torch's file of the weights under their published names.

    Raises:
        UserError: if no published architecture has this shape, or `folder` exists and is not empty.
    """
    family = find_family(config)
    if family is None:
        raise UserError("format: model.pth has published names, and no published architecture has this shape")
    with staged_folder(folder) as staged:
        torch.save(to_hf_names(family.tensors, read_tensors(source, config, dtype), config), staged / "model.pth")
