"""The output of `--print_config` and `--data.help`."""

from jsonargparse import ArgumentParser

from litgpt.errors import UserError
from litgpt.recipe.build import RecipeHelpFormatter, Tree, build_recipe
from litgpt.recipe.choices import CLASS_PATHS, import_class, resolve_class_path
from litgpt.recipe.keys import REQUIRED, find_choice_base, list_settings
from litgpt.recipe.to_yaml import drop_defaults, drop_nulls, format_yaml, to_plain


def fill_required(recipe: type, tree: Tree) -> tuple[Tree, list[str]]:
    """Fill the required keys that are missing from a mapping with placeholders, and list these keys."""
    missing = [
        name
        for name, (hint, default) in list_settings(recipe).items()
        if default is REQUIRED and not find_choice_base(hint) and tree.get(name) is None
    ]
    return {**dict.fromkeys(missing, "?"), **tree}, missing


def print_config(recipe: type, tree: Tree, flags: str) -> None:
    """Print the resulting recipe as YAML; `flags` is empty or a comma-separated list of skip_default and skip_null."""
    options = {flag for flag in flags.split(",") if flag}
    if unknown := options - {"skip_default", "skip_null"}:
        raise UserError(f"--print_config: {sorted(unknown)[0]!r} is not valid; use skip_default, skip_null or both")
    filled, missing = fill_required(recipe, tree)
    shown = to_plain(build_recipe(recipe, filled)) | dict.fromkeys(missing)
    if "skip_default" in options:
        required = {name: filled[name] for name, (_, default) in list_settings(recipe).items() if default is REQUIRED}
        default = to_plain(build_recipe(recipe, required))
        shown = drop_defaults(shown, {key: value for key, value in default.items() if key not in required})
    print(format_yaml(drop_nulls(shown) if "skip_null" in options else shown), end="")


def print_choice_help(recipe: type, key: str, name: str) -> None:
    """Print the class names that a key accepts, or the settings of the class `name`."""
    base = find_choice_base(list_settings(recipe).get(key, (None, None))[0])
    if base is None:
        raise UserError(f"--{key}.help: {key} is not a choice of classes; use --help")
    table = {short: path for short, path in CLASS_PATHS[base].items() if "." not in short}
    if not name:
        for short, path in table.items():
            print(f"  {short:<13}  {(import_class(path, key).__doc__ or '').strip().splitlines()[0]}")
        return
    cls = import_class(resolve_class_path(base, name, key, trusted=True), key)
    parser = ArgumentParser(prog=f"litgpt ... --{key} {name}", formatter_class=RecipeHelpFormatter)
    parser.add_class_arguments(cls, key)
    parser.print_help()
