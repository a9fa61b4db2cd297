"""Read what `torch.save` wrote with `weights_only`, so that no code in it can run."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.store.state_dict import get_canonical_name


def load_torch_file(path: Path) -> Any:
    """Load a file of `torch.save`, its tensors memory-mapped where the format allows.

    Raises:
        UserError: if the file is missing, damaged, or holds more than numbers, strings, containers and tensors.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # damaged files raise nearly anything
        raise refuse_file(path, error) from None


def load_tensor(data: bytes, source: str) -> Tensor:
    """The tensor that `torch.save` wrote as these bytes.

    Args:
        source: where they are from, for messages.

    Raises:
        UserError: if they are damaged, or hold something else.
    """
    try:
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise nearly anything
        raise refuse_file(source, error) from None
    if not isinstance(tensor, Tensor):
        raise UserError(f"{source}: a {type(tensor).__name__}, not a tensor")
    return tensor


def refuse_file(source: Path | str, error: Exception, content: str = "tensors") -> UserError:
    """The error for a pickle that cannot be loaded, with the first line of the reason.

    Args:
        content: what it should hold.
    """
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(f"{source}: refused, it is damaged or holds more than {content} ({reason[:200]})")


def is_zip(path: Path) -> bool:
    """Whether the file has the layout that `torch.save` has written since torch 1.6, which can be memory-mapped."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Load the weights in a file, plain or under the key `model`, without the prefixes of `torch.compile`.

    Raises:
        UserError: if the file holds no weights, or other objects among them.
    """
    content = load_torch_file(path)
    weights = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(weights, Mapping) or not weights:
        raise UserError(f"{path}: holds no weights; a mapping of names to tensors was expected")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor")
    return {get_canonical_name(name): value for name, value in weights.items()}
