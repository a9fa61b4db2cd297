"""An `LLM` that Lightning's Trainer trains: its weights in a Trainer's checkpoint, and LitGPT's preprocessor."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.store.legacy import load_torch_file


@dataclass(frozen=True)
class Preprocessor:
    """Encodes and decodes text, with token ids on a device."""

    tokenizer: Tokenizer
    device: torch.device

    def encode(self, text: str) -> Tensor:
        """The token ids (T,) of a text, with bos if the tokenizer adds it by default."""
        return self.tokenizer.encode(text).to(self.device)

    def decode(self, token_ids: Tensor) -> str:
        """The text of token ids (T,)."""
        return self.tokenizer.decode(token_ids)


def load_trainer_weights(model: GPT, path: Path) -> None:
    """Load the weights of a model from a checkpoint of Lightning's Trainer, whatever the module that contains it.

    Raises:
        UserError: if the file is missing or damaged, or does not have all weights of the model in their shapes.
    """
    content = load_torch_file(path)
    saved = content.get("state_dict") if isinstance(content, Mapping) else None
    weights = model.state_dict()
    first = next(iter(weights))
    prefixes = [name.removesuffix(first) for name in saved or () if name == first or name.endswith(f".{first}")]
    if not saved or not prefixes:
        raise UserError(f"trainer_ckpt: {path} has no {first}; give a checkpoint of a Trainer with this model")
    for name, tensor in weights.items():
        value = saved.get(prefixes[0] + name)
        if value is None or value.shape != tensor.shape:
            shape = "no" if value is None else f"shape {list(value.shape)} of"
            raise UserError(f"trainer_ckpt: {path} has {shape} {name}, which is {list(tensor.shape)} in the model")
    model.load_state_dict({name: saved[prefixes[0] + name] for name in weights})
