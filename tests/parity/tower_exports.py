"""The folder of a model with a tower that is written: as it was read, and as transformers loads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.store.save_model import save_model_folder


def check_export(
    model: GPT, hf_model: Any, source: Path, auto: Any, compute: Callable[[Any], Tensor], expected: Tensor
) -> None:
    """Write a model, and compare it with the folder that it was read from.

    Args:
        hf_model: the model of transformers that wrote the folder `source`; the new one is beside it.
        auto: the class of transformers that loads the new one, as the class of `hf_model`.
        compute: the logits of a model of transformers.
        expected: those of `hf_model`, which must be the same to the bit.
    """
    config, export = Config.from_checkpoint(source), source.with_name("export")
    save_model_folder(export, config=config, tensors=((key, value.detach()) for key, value in model.named_parameters()))
    exported, original = load_file(export / "model.safetensors"), load_file(source / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[key], original[key]) for key in original)
    loaded, report = auto.from_pretrained(
        export, output_loading_info=True, dtype="float32", attn_implementation="eager"
    )
    assert type(loaded) is type(hf_model) and not any(report.values()), report
    with torch.no_grad():
        assert torch.equal(compute(loaded.eval()), expected)
    assert Config.from_checkpoint(export) == config
    (export / "model_config.yaml").unlink()
    assert Config.from_checkpoint(export) == Config(**{**config.to_dict(), "name": "export"})
