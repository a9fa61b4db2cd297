"""`litgpt explain`: launch scripts of Megatron-SWIFT and ms-swift as recipes."""

from litgpt.errors import UserError
from litgpt.files import read_utf8
from litgpt.model.registry import list_model_names, lookup_config
from litgpt.recipe.explain import Explain
from litgpt.recipe.launch_script import Launch, parse_launch, read_script
from litgpt.recipe.option_transforms import MCORE_SUFFIX
from litgpt.recipe.translation import translate_script
from litgpt.recipe.translation_yaml import format_translation, list_option_lines


def count_model_layers(name: str) -> int | None:
    """The number of layers of a model by its name, which may be that of a folder; None if it is not known."""
    known = name.rpartition("/")[2].removesuffix(MCORE_SUFFIX)
    return lookup_config(known).n_layer if known in list_model_names() else None


def read_launches(recipe: Explain) -> list[Launch]:
    """Read the launches that the recipe gives."""
    for program in ("megatron", "swift"):
        if (text := getattr(recipe, program)) is not None:
            return [parse_launch(text, program, f"--{program}")]
    if recipe.file is None or not recipe.file.is_file():
        raise UserError(
            f"file: {recipe.file} is not a file; give a launch script, or the line itself after --megatron or --swift"
        )
    return read_script(read_utf8(recipe.file), str(recipe.file))


def run(recipe: Explain) -> None:
    """Print the recipes of the launches, or the table of options."""
    if recipe.list:
        print("\n".join(list_option_lines()))
        return
    translations = translate_script(read_launches(recipe), count_model_layers)
    print("---\n".join(map(format_translation, translations)), end="")
