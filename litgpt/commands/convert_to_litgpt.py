"""`litgpt convert_to_litgpt`: convert model files of any supported format to a model folder."""

from litgpt.recipe.store_commands import ConvertToLitgpt
from litgpt.store.adapters.folder import check_whole_model
from litgpt.store.checkpoint_load import resolve_checkpoint
from litgpt.store.convert import convert_folder


def run(recipe: ConvertToLitgpt) -> None:
    """Convert the model and print the folder's path."""
    source = recipe.checkpoint_dir
    check_whole_model(source if source.is_file() else resolve_checkpoint(source) or source)
    folder = convert_folder(recipe.checkpoint_dir, recipe.model_name, recipe.dtype, per_tensor=bool(recipe.debug_mode))
    print(f"{folder}: ready")
