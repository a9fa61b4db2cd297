"""Data modules, batches and tokenizers, at the import path of LitGPT. Imported on first use."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

_HOMES = {
    "DataModule": "stream.loader",
    "LoaderStream": "stream.loader",
    "Batch": "stream.batch",
    "Tokenizer": "tokenizer",
    "TextFiles": "modules.text",
    "PythonDocs": "modules.text",
    "LitData": "modules.litdata",
    "TinyStories": "modules.downloaded_text",
    "TinyLlama": "modules.litdata",
    "MicroLlama": "modules.litdata",
    "OpenWebText": "modules.downloaded_text",
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


def import_on_use(package: str) -> Callable[[str], ModuleType]:
    """Build a `__getattr__` that imports the modules of a package on first use, so that recipes need no torch."""

    def get_module(name: str) -> ModuleType:
        try:
            return import_module(f"{package}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{package}.{name}":
                raise
            raise AttributeError(f"module {package!r} has no attribute {name!r}") from None

    return get_module
