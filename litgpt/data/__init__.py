"""Data modules, batches and tokenizers, at the import path of LitGPT. Imported on first use."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

_EXPORTS = {
    "stream.loader": ("DataModule", "LoaderStream"),
    "stream.batch": ("Batch",),
    "stream.sft_dataset": ("SFTDataset", "get_sft_collate_fn"),
    "tokenizer": ("Tokenizer",),
    "modules.text": ("TextFiles", "PythonDocs"),
    "modules.litdata": ("LitData", "TinyLlama", "MicroLlama"),
    "modules.downloaded_text": ("TinyStories", "OpenWebText"),
    "modules.conversations": ("Conversations",),
    "modules.preferences": ("Preferences",),
    "modules.instruction_sets": (
        *("JSON", "Alpaca", "Alpaca2k", "AlpacaGPT4", "Deita", "Dolly", "FLAN", "LIMA", "LongForm"),
    ),
}
_HOMES = {name: module for module, names in _EXPORTS.items() for name in names}

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
