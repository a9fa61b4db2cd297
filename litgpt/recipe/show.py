"""The output of `--print_config`."""

from litgpt.errors import UserError
from litgpt.mappings import drop_nulls
from litgpt.recipe.build import REPLACED_DEFAULTS, Tree, build_recipe
from litgpt.recipe.keys import REQUIRED, find_choice_base, find_group, list_settings
from litgpt.recipe.to_yaml import drop_defaults, format_yaml, to_plain


def fill_required(recipe: type, tree: Tree) -> tuple[Tree, list[str]]:
    """Fill the required keys that are missing from a mapping with placeholders, and list these keys."""
    missing = [
        name
        for name, (hint, default) in list_settings(recipe).items()
        if default is REQUIRED and not find_choice_base(hint) and tree.get(name) is None
    ]
    return {**dict.fromkeys(missing, "?"), **tree}, missing


def to_plain_given(recipe: type, tree: Tree) -> Tree:
    """Build a recipe, and return its settings without those that follow from others, such as a null train.min_lr.

    A printed value of one would no longer follow a change of the other.
    """
    plain = to_plain(build_recipe(recipe, tree))
    for name, (hint, default) in list_settings(recipe).items():
        group, given = find_group(hint), tree.get(name) or {}
        if group is None or plain[name] is None:
            continue
        for key, (_, own_default) in list_settings(group).items():
            if key not in given and getattr(default, key, own_default) is None:
                plain[name][key] = None
        for key, replaced in REPLACED_DEFAULTS.items() if name == "train" else ():
            if given.get(key) is not None and replaced not in given:
                plain[name].pop(replaced)
    return plain


def print_config(recipe: type, tree: Tree, flags: str) -> None:
    """Print the resulting recipe as YAML; `flags` is empty or a comma-separated list of skip_default and skip_null."""
    options = {flag for flag in flags.split(",") if flag}
    if unknown := options - {"skip_default", "skip_null"}:
        raise UserError(f"--print_config: {sorted(unknown)[0]!r} is not valid; use skip_default, skip_null or both")
    filled, missing = fill_required(recipe, tree)
    shown = to_plain_given(recipe, filled) | dict.fromkeys(missing)
    if "skip_default" in options:
        required = {name: filled[name] for name, (_, default) in list_settings(recipe).items() if default is REQUIRED}
        default = to_plain_given(recipe, required)
        shown = drop_defaults(shown, {key: value for key, value in default.items() if key not in required})
    print(format_yaml(drop_nulls(shown) if "skip_null" in options else shown), end="")
