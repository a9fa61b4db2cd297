"""`litgpt schema`: the JSON Schema of recipes."""

import json

from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.find_command import find_command
from litgpt.recipe.schema import DRAFT, Schema, build_schema


def run(recipe: Schema) -> None:
    """Print the schema of one command's recipe, or of every recipe under `$defs`."""
    if recipe.command:
        name, _ = find_command([word for word in (recipe.command, recipe.subcommand) if word])
        schema = build_schema(COMMANDS[name].import_recipe())
    else:
        schema = {
            "$schema": DRAFT,
            "$defs": {name: build_schema(command.import_recipe()) for name, command in COMMANDS.items()},
        }
    print(json.dumps(schema, indent=1))
