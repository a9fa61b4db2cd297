"""`litgpt recipes`: the recipes that come with the package."""

from litgpt.errors import UserError
from litgpt.recipe.config_hub import list_hub_names, list_hub_recipes
from litgpt.recipe.hub_commands import Recipes


def run(recipe: Recipes) -> None:
    """Print the names of the recipes, and the first comment of each."""
    recipes = list_hub_recipes(recipe.prefix)
    if not recipes:
        groups = dict.fromkeys(name.partition("/")[0] for name in list_hub_names())
        raise UserError(f"prefix: no recipe begins with {recipe.prefix!r}; use {', '.join(groups)}")
    width = max(len(hub_recipe.name) for hub_recipe in recipes)
    print(
        "\n".join(f"{hub_recipe.name:{width}}  {hub_recipe.summary}" for hub_recipe in recipes)
    )  # a line each, for grep
