"""litgpt convert_pretrained_checkpoint: a training checkpoint in, a clean model folder out."""

from litgpt.files import check_unused
from litgpt.recipe.store_commands import ConvertPretrainedCheckpoint


def run(recipe: ConvertPretrainedCheckpoint) -> None:
    """Write the weights of a training checkpoint as a model folder; print where it lies."""
    from litgpt.store.checkpoint import step_folder
    from litgpt.store.convert import export
    from litgpt.store.published import shape_in

    check_unused(recipe.output_dir)
    folder = recipe.checkpoint_dir.parent if recipe.checkpoint_dir.is_file() else recipe.checkpoint_dir
    source = step_folder(folder) or folder
    export(recipe.output_dir, source, shape_in(source))
    print(f"{recipe.output_dir}: a model folder made of {source}")
