"""Import modules of torchao, which is an optional dependency."""

import logging
from functools import cache
from importlib import import_module
from typing import Any

from litgpt.errors import UserError


@cache
def import_torchao(name: str, user: str, cure: str) -> Any:
    """A module of torchao.

    Args:
        name: of the module, without `torchao.`.
        user: who needs it, as the subject of the error.
        cure: what to set without torchao.

    Raises:
        UserError: if torchao is not installed.
    """
    logger = logging.getLogger("torch.utils._pytree")  # warns of classes of torchao
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return import_module(f"torchao.{name}")
    except ImportError as error:
        raise UserError(f"{user} torchao ({error}); run pip install 'litgpt[quantize]', or {cure}") from None
    finally:
        logger.setLevel(level)
