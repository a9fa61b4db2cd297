"""A tiny chat model with random weights."""

from pathlib import Path
from typing import Any

import torch

from litgpt.data.tokenizer import train_tokenizer
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.store.save_model import save_model_folder
from tests.data.render.test_chat_template import CHATML
from tests.runs import SHAPE

WORDS = "the fox and the dog jump over a lazy cat while it rains on the green hill " * 30


def write_chat_model(folder: Path, **changes: Any) -> Path:
    """Write a model with the chat template ChatML and a context of 512 tokens into a new folder, which it returns."""
    train_tokenizer([WORDS], "bpe", 300, folder.parent / "tokenizer")
    config = Config(**{**SHAPE, "block_size": 512, "name": "tiny", **changes})
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    save_model_folder(
        folder, config=config, tensors=model.named_parameters(), tokenizer_dir=folder.parent / "tokenizer"
    )
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder
