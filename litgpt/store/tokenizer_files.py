"""Find and copy the tokenizer files of a model folder, and read the ids of special tokens."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litgpt.files import read_json_object, write_text

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
MEDIA_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""How the images and videos of a model are prepared, which goes with its tokenizer."""
CODEC_FILES = ("image_codes/config.json", "image_codes/model.safetensors")
"""The codec of a model that writes images, which goes with its tokenizer too."""
FORMAT_FILES = (
    "chat_template.jinja",
    "chat_template.json",
    "prompt_style.yaml",
    "additional_chat_templates/*.jinja",
)
"""Patterns of the files that hold nothing but the format of prompts."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")


def find_tokenizer_files(folder: Path, *, with_format: bool = True) -> dict[str, Path]:
    """Find the files of tokenizer and images in a folder, by name; optionally without those of the prompt format."""
    patterns = TOKENIZER_FILES + MEDIA_FILES + CODEC_FILES + (FORMAT_FILES if with_format else ())
    return {str(path.relative_to(folder)): path for pattern in patterns for path in sorted(folder.glob(pattern))}


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer, and not only files that belong to one."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES[:2])


def has_prompt_format(folder: Path) -> bool:
    """Whether a folder holds files of a prompt format."""
    return any(path for pattern in FORMAT_FILES for path in folder.glob(pattern))


def copy_tokenizer(source: Path, target: Path, prompt_files: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Copy tokenizer files that the target does not have; returns the ids of special tokens for config.json.

    Args:
        prompt_files: written instead of the source's files of the prompt format, text by name. If None, these are
            copied, unless the target has a tokenizer, which comes with its own format, or files of another format.
    """
    has_format = has_tokenizer(target) or has_prompt_format(target)
    for name, text in (prompt_files or {}).items():
        write_text(target / name, text)
    for name, path in find_tokenizer_files(source, with_format=prompt_files is None and not has_format).items():
        if not (target / name).exists():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / name)
    special: dict[str, Any] = {}
    for path in (source / "config.json", target / "generation_config.json"):
        values = read_json_object(path)
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
