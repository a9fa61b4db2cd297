"""Tiny models with a tokenizer, whose weights are random."""

from pathlib import Path

import torch

from litgpt.data.tokenizer import train_tokenizer
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.store.save_model import save_model_folder
from tests import runs


def write_tiny_models(root: Path, *names: str) -> None:
    """Write models of one shape and different weights, and their tokenizer in `root/tokenizer`."""
    train_tokenizer(["the fox and the dog jump over a lazy cat " * 30], "bpe", 300, root / "tokenizer")
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        model = GPT(Config(**{**runs.SHAPE, "block_size": 256, "name": name}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        tensors = model.named_parameters()
        save_model_folder(root / name, config=model.config, tensors=tensors, tokenizer_dir=root / "tokenizer")
