"""`litgpt convert_pretrained_checkpoint`: convert a training checkpoint to a clean model folder."""

from litgpt.files import check_unused
from litgpt.recipe.store_commands import ConvertPretrainedCheckpoint
from litgpt.store.adapters.folder import check_whole_model
from litgpt.store.checkpoint_load import resolve_checkpoint
from litgpt.store.convert import export_folder, find_config


def run(recipe: ConvertPretrainedCheckpoint) -> None:
    """Write the weights of a training checkpoint as a model folder and print its path."""
    check_unused(recipe.output_dir)
    folder = recipe.checkpoint_dir.parent if recipe.checkpoint_dir.is_file() else recipe.checkpoint_dir
    source = resolve_checkpoint(folder) or folder
    check_whole_model(source)
    export_folder(recipe.output_dir, source, find_config(source, recipe.model_name))
    print(f"{recipe.output_dir}: a model folder made of {source}")
