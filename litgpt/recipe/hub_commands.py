"""The settings of `litgpt recipes` and `litgpt recipes show`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipes:
    """List the recipes that come with the package, with a line each; --config accepts their names."""

    prefix: str = ""
    """How the names begin, such as pretrain or finetune/qwen; empty for all recipes."""


@dataclass(frozen=True)
class RecipesShow:
    """Print a recipe that comes with the package."""

    name: str
    """Its name, or the last parts of it: pretrain/quickstart, or quickstart."""
