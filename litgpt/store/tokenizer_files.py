"""The tokenizer's files in a model folder: which they are, copied, and the numbers of their special tokens."""

import shutil
from pathlib import Path
from typing import Any

from litgpt.files import read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")


def find_tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of the tokenizer in a folder, by name."""
    return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}


def copy_tokenizer(source: Path, target: Path) -> dict[str, Any]:
    """Copy what is not there yet of a tokenizer's files; returns its special tokens' numbers, as config.json has."""
    for name, path in find_tokenizer_files(source).items():
        if not (target / name).exists():
            shutil.copyfile(path, target / name)
    special: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (source / name).is_file():
            values = read_json(source / name)
            known = {f"{token}_id": values.get(f"{token}_id") for token in SPECIAL_TOKENS}
            special |= {key: value for key, value in known.items() if value is not None}
    return special or read_special_tokens(source)


def read_special_tokens(source: Path) -> dict[str, int]:
    """The numbers of the special tokens that tokenizer_config.json names."""
    if not ((source / "tokenizer_config.json").is_file() and (source / "tokenizer.json").is_file()):
        return {}
    from tokenizers import Tokenizer

    values = read_json(source / "tokenizer_config.json")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    found = {}
    for token in SPECIAL_TOKENS:
        text = values.get(token)
        text = text.get("content") if isinstance(text, dict) else text
        number = tokenizer.token_to_id(text) if isinstance(text, str) else None
        if number is not None:
            found[f"{token}_id"] = number
    return found
