"""Model configurations, at the import path of LitGPT."""

from functools import cache
from typing import Any

from litgpt.model.config import Config
from litgpt.model.registry import list_model_names

__all__ = ["Config", "configs", "find_multiple", "name_to_config"]  # noqa: F822, built on first use


def find_multiple(n: int, k: int) -> int:
    """Return the smallest multiple of k that is at least n, such as a padded vocabulary size."""
    return -(-n // k) * k


@cache
def build_config_table() -> dict[str, dict[str, Any]]:
    """Return the configuration fields of every known model by its name."""
    return {name: Config.from_name(name).to_dict() for name in list_model_names()}


def __getattr__(name: str) -> Any:
    """Build the tables on first use."""
    if name == "name_to_config":
        return build_config_table()
    if name == "configs":
        return list(build_config_table().values())
    raise AttributeError(f"module 'litgpt.config' has no attribute {name!r}")
