"""What a model is trained on: text, token shards, streams of batches. Imported on first use."""

from importlib import import_module
from typing import Any

_HOMES = {
    "DataModule": "stream.loader",
    "LoaderStream": "stream.loader",
    "Batch": "stream.batch",
    "Tokenizer": "tokenizer",
    "TextFiles": "modules.text",
    "PythonDocs": "modules.text",
    "LitData": "modules.text",
    "TinyStories": "modules.text",
    "TinyLlama": "modules.text",
    "MicroLlama": "modules.text",
    "OpenWebText": "modules.text",
    "Conversations": "modules.conversations",
    "JSON": "modules.instruction_sets",
    "Alpaca": "modules.instruction_sets",
    "Alpaca2k": "modules.instruction_sets",
    "AlpacaGPT4": "modules.instruction_sets",
    "Deita": "modules.instruction_sets",
    "Dolly": "modules.instruction_sets",
    "FLAN": "modules.instruction_sets",
    "LIMA": "modules.instruction_sets",
    "LongForm": "modules.instruction_sets",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'litgpt.data' has no attribute {name!r}")
    return getattr(import_module(f"litgpt.data.{_HOMES[name]}"), name)
