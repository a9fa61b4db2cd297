"""Find and copy the tokenizer files of a model folder, and read the ids of special tokens."""

import shutil
from pathlib import Path
from typing import Any

from litgpt.files import read_json_object

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
    """Find the tokenizer files in a folder, by name."""
    return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}


def copy_tokenizer(source: Path, target: Path) -> dict[str, Any]:
    """Copy tokenizer files that the target does not have; returns the ids of special tokens for config.json."""
    for name, path in find_tokenizer_files(source).items():
        if not (target / name).exists():
            shutil.copyfile(path, target / name)
    special: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        values = read_json_object(source / name)
        keys = (f"{token}_id" for token in SPECIAL_TOKENS)
        special |= {key: values[key] for key in keys if values.get(key) is not None}
    return special or read_special_tokens(source)


def read_special_tokens(source: Path) -> dict[str, int]:
    """The ids of the special tokens that tokenizer_config.json names."""
    if not ((source / "tokenizer_config.json").is_file() and (source / "tokenizer.json").is_file()):
        return {}
    from tokenizers import Tokenizer

    values = read_json_object(source / "tokenizer_config.json")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    token_ids = {}
    for token in SPECIAL_TOKENS:
        text = values.get(token)
        text = text.get("content") if isinstance(text, dict) else text
        token_id = tokenizer.token_to_id(text) if isinstance(text, str) else None
        if token_id is not None:
            token_ids[f"{token}_id"] = token_id
    return token_ids
