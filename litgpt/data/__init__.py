"""What a model is trained on: text, token shards, streams of batches. Imported on first use."""

from importlib import import_module
from typing import Any

_HOMES = {
    "DataModule": "loader",
    "LoaderStream": "loader",
    "Batch": "batch",
    "Tokenizer": "tokenizer",
    "TextFiles": "modules",
    "PythonDocs": "modules",
    "LitData": "modules",
    "TinyStories": "modules",
    "TinyLlama": "modules",
    "MicroLlama": "modules",
    "OpenWebText": "modules",
    "Conversations": "conversation_sets",
    "JSON": "instruction_sets",
    "Alpaca": "instruction_sets",
    "Alpaca2k": "instruction_sets",
    "AlpacaGPT4": "instruction_sets",
    "Deita": "instruction_sets",
    "Dolly": "instruction_sets",
    "FLAN": "instruction_sets",
    "LIMA": "instruction_sets",
    "LongForm": "instruction_sets",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'litgpt.data' has no attribute {name!r}")
    return getattr(import_module(f"litgpt.data.{_HOMES[name]}"), name)
