"""Train large language models from one YAML file."""

import importlib
from typing import Any

from litgpt.version import __version__

__all__ = [
    "GPT",
    "LLM",
    "CheckpointValidationResult",
    "Config",
    "Tokenizer",
    "__version__",
    "estimate_model_memory",
    "validate_checkpoint",
]

HOMES = {
    "LLM": "litgpt.api",
    "GPT": "litgpt.model.gpt",
    "Config": "litgpt.model.config",
    "Tokenizer": "litgpt.data.tokenizer",
    "CheckpointValidationResult": "litgpt.commands.validate",
    "estimate_model_memory": "litgpt.commands.validate",
    "validate_checkpoint": "litgpt.commands.validate",
}


def __getattr__(name: str) -> Any:
    """Import a public class when it is first asked for, so that `import litgpt` stays cheap."""
    if name not in HOMES:
        raise AttributeError(f"module 'litgpt' has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)
