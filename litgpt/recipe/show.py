"""What `--print_config` and `--data.help` print."""

from jsonargparse import ArgumentParser

from litgpt.errors import UserError
from litgpt.recipe.build import RecipeHelpFormatter, Tree, build_recipe
from litgpt.recipe.choices import CLASS_PATHS, import_class, resolve_class_path
from litgpt.recipe.keys import REQUIRED, find_choice_base, list_settings
from litgpt.recipe.to_yaml import drop_defaults, drop_nulls, format_yaml, to_plain


def fill_required(recipe: type, tree: Tree) -> tuple[Tree, list[str]]:
    """A mapping with something under every key that must be given, and the keys that were not."""
    needed = [
        name
        for name, (hint, default) in list_settings(recipe).items()
        if default is REQUIRED and not find_choice_base(hint)
    ]
    open_keys = [name for name in needed if tree.get(name) is None]
    return {**dict.fromkeys(open_keys, "?"), **tree}, open_keys


def print_config(recipe: type, tree: Tree, flags: str) -> None:
    """Print the recipe that a line asks for as YAML; `flags` is any of skip_default and skip_null, with commas."""
    wanted = {flag for flag in flags.split(",") if flag}
    if strange := wanted - {"skip_default", "skip_null"}:
        raise UserError(f"--print_config: {sorted(strange)[0]!r} will not do; give skip_default, skip_null or both")
    filled, open_keys = fill_required(recipe, tree)
    shown = to_plain(build_recipe(recipe, filled)) | dict.fromkeys(open_keys)
    if "skip_default" in wanted:
        required = {name: filled[name] for name, (_, default) in list_settings(recipe).items() if default is REQUIRED}
        default = to_plain(build_recipe(recipe, required))
        shown = drop_defaults(shown, {key: value for key, value in default.items() if key not in required})
    print(format_yaml(drop_nulls(shown) if "skip_null" in wanted else shown), end="")


def print_choice_help(recipe: type, key: str, name: str) -> None:
    """Print the names that a key can choose from, or the settings of one of them."""
    base = find_choice_base(list_settings(recipe).get(key, (None, None))[0])
    if base is None:
        raise UserError(f"--{key}.help: {key} has no classes to choose from")
    table = {short: path for short, path in CLASS_PATHS[base].items() if "." not in short}
    if not name:
        for short, path in table.items():
            print(f"  {short:<12}  {(import_class(path, key).__doc__ or '').strip().splitlines()[0]}")
        return
    cls = import_class(resolve_class_path(base, name, key, trusted=True), key)
    parser = ArgumentParser(prog=f"litgpt ... --{key} {name}", formatter_class=RecipeHelpFormatter)
    parser.add_class_arguments(cls, key)
    parser.print_help()
