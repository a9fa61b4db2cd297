"""Train large language models from one YAML file."""

import importlib
from typing import Any

from litgpt.version import __version__

__all__ = [
    "GPT",
    "LLM",
    "CheckpointValidationResult",
    "Config",
    "PromptStyle",
    "Tokenizer",
    "TrainableModel",
    "__version__",
    "estimate_model_memory",
    "validate_checkpoint",
]

MODULES = {
    "LLM": "litgpt.api",
    "TrainableModel": "litgpt.trainable_model",
    "GPT": "litgpt.model.gpt",
    "Config": "litgpt.model.config",
    "PromptStyle": "litgpt.data.render.prompt_styles",
    "Tokenizer": "litgpt.data.tokenizer",
    "CheckpointValidationResult": "litgpt.commands.validate",
    "estimate_model_memory": "litgpt.commands.validate",
    "validate_checkpoint": "litgpt.commands.validate",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import litgpt` does not import torch."""
    if name not in MODULES:
        raise AttributeError(f"module 'litgpt' has no attribute {name!r}")
    return getattr(importlib.import_module(MODULES[name]), name)
