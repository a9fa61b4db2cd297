"""`litgpt generate`: print generated text to stdout and timings to stderr."""

from functools import partial

from litgpt.generation import load_llm, write_texts
from litgpt.recipe.generate import Generate


def run(recipe: Generate) -> None:
    """Load the model and generate the samples."""
    write_texts(recipe, partial(load_llm, recipe.checkpoint_dir, recipe))
