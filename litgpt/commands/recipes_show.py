"""`litgpt recipes show`: the text of a recipe that comes with the package."""

from litgpt.recipe.config_hub import find_hub_recipe
from litgpt.recipe.hub_commands import RecipesShow


def run(recipe: RecipesShow) -> None:
    """Print the file of the recipe as it is."""
    print(find_hub_recipe(recipe.name).read_text(encoding="utf-8"), end="")
