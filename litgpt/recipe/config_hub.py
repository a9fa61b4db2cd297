"""The recipes that come with the package, which are found by their names: the folder config_hub."""

import difflib
from functools import cache
from pathlib import Path
from typing import NamedTuple

from litgpt.errors import UserError
from litgpt.recipe.from_yaml import is_url

SUFFIX = ".yaml"
HUB_FOLDER = "config_hub"
NEAR_NAMES = 3  # names in an error


class HubRecipe(NamedTuple):
    """A recipe of the package.

    Attributes:
        name: its path in config_hub without the suffix, such as pretrain/quickstart.
        path: its file.
        summary: its first comment, one line.
    """

    name: str
    path: Path
    summary: str


@cache
def find_hub_folder() -> Path:
    """Find the folder with the recipes: inside of the installed package, or beside it in a clone."""
    package = Path(__file__).parents[1]
    return next(parent / HUB_FOLDER for parent in (package, package.parent) if (parent / HUB_FOLDER).is_dir())


def list_hub_names() -> dict[str, Path]:
    """List the files of all recipes by name, in order."""
    folder = find_hub_folder()
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob(f"*{SUFFIX}"))}


def list_hub_recipes(prefix: str = "") -> list[HubRecipe]:
    """List the recipes whose names begin with `prefix`, in order."""
    names = {name: path for name, path in list_hub_names().items() if name.startswith(prefix)}
    return [HubRecipe(name, path, read_summary(path)) for name, path in names.items()]


def read_summary(path: Path) -> str:
    """Read the comment in the first line of a recipe."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("#").strip()


def find_hub_recipe(name: str) -> Path:
    """Find the file of a recipe by its name, or by the last parts of it; the suffix and config_hub/ are optional.

    Raises:
        UserError: with the names that are probably meant, if there is no such recipe, or there are several.
    """
    names, wanted = list_hub_names(), name.removesuffix(SUFFIX).removeprefix(f"{HUB_FOLDER}/")
    if wanted in names:
        return names[wanted]
    ends = [other for other in names if other.endswith(f"/{wanted}")]
    if len(ends) == 1:
        return names[ends[0]]
    if ends:
        raise UserError(f"{name}: the name of {len(ends)} recipes; use one such as {', '.join(ends[:NEAR_NAMES])}")
    last_parts = {other.rpartition("/")[2]: other for other in names}
    near = difflib.get_close_matches(wanted, names, n=NEAR_NAMES)
    near += [
        last_parts[part] for part in difflib.get_close_matches(wanted.rpartition("/")[2], last_parts, n=NEAR_NAMES)
    ]
    hint = f"did you mean {', '.join(dict.fromkeys(near))}?" if near else "`litgpt recipes` lists the recipes"
    raise UserError(f"{name}: no such file, and no recipe has that name; {hint}")


def find_hub_file(path: str) -> str:
    """Return the path of a file that a recipe names below config_hub/, which need not be in the working folder."""
    parts = Path(path).parts
    file = find_hub_folder().joinpath(*parts[1:])
    is_hub_file = parts[:1] == (HUB_FOLDER,) and ".." not in parts and not Path(path).exists() and file.exists()
    return str(file) if is_hub_file else path


def find_config_file(source: str) -> str:
    """Return the file or URL of a `--config`: a file, whose suffix is optional, or else the recipe of that name.

    Raises:
        UserError: if a relative path is neither.
    """
    if is_url(source) or Path(source).is_absolute():
        return source
    files = (path for path in (source, source + SUFFIX) if Path(path).exists() and not Path(path).is_dir())
    return next(files, None) or str(find_hub_recipe(source))
