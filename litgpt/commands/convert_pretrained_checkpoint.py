"""litgpt convert_pretrained_checkpoint: a training checkpoint in, a clean model folder out."""

from litgpt.files import refuse_used
from litgpt.recipe.store_commands import ConvertPretrainedCheckpoint


def run(recipe: ConvertPretrainedCheckpoint) -> None:
    """Write the weights of a training checkpoint as a model folder; print where it lies."""
    from litgpt.model.registry import read_shape
    from litgpt.store import published
    from litgpt.store.checkpoint import model_tensors_of, step_folder

    refuse_used(recipe.output_dir)
    folder = recipe.checkpoint_dir.parent if recipe.checkpoint_dir.is_file() else recipe.checkpoint_dir
    step = step_folder(folder)
    source = step or folder
    config = read_shape(source)
    tensors = model_tensors_of(step) if step else published.tensors_in(source, config)
    published.save(recipe.output_dir, config=config, tensors=tensors, tokenizer_dir=source)
    print(f"{recipe.output_dir}: a model folder made of {source}")
