"""`litgpt generate_full`, `generate_adapter` and `generate_adapter_v2`: the texts of a finetuned model."""

from functools import partial

from litgpt.api import LLM
from litgpt.data.render.prompt_styles import Messages, PromptStyle
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.generation import load_llm, write_texts
from litgpt.infer.load import find_folder, resolve_model_folder
from litgpt.recipe.generate import GenerateFinetuned
from litgpt.store.adapters.folder import ADAPTER_CONFIG, is_adapter


class InputStyle(PromptStyle):
    """A prompt style with the same input for all prompts."""

    def __init__(self, style: PromptStyle, text: str) -> None:
        self.style, self.text = style, text

    def apply(self, prompt: str | Messages, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        """Format a prompt with the input."""
        return self.style.apply(prompt, sys_prompt=sys_prompt, **{**kwargs, "input": self.text})

    def stop_tokens(self, tokenizer: Tokenizer) -> tuple[list[int], ...]:
        """The sequences of tokens that end a reply."""
        return self.style.stop_tokens(tokenizer)


def run(recipe: GenerateFinetuned) -> None:
    """Load the finetuned model and generate the samples."""
    write_texts(recipe, partial(load_finetuned, recipe))


def load_finetuned(recipe: GenerateFinetuned) -> LLM:
    """The finetuned model.

    Raises:
        UserError: if an adapter is not one, or there is an input, and no prompt style that writes it.
    """
    folder = resolve_model_folder(find_folder(recipe.weights_folder))
    if recipe.needs_adapter and not is_adapter(folder):
        raise UserError(
            f"{recipe.weights_key}: {folder} holds no adapter alone; give the folder with its {ADAPTER_CONFIG}, or use "
            "litgpt generate for a whole model"
        )
    llm = load_llm(folder, recipe, base=recipe.checkpoint_dir)
    if recipe.input:
        style = llm.prompt_style
        if style is None or style.apply("x", input=recipe.input) == style.apply("x"):
            reason = "has no prompt style" if style is None else f"has the prompt style {type(style).__name__}"
            raise UserError(f"input: {recipe.weights_folder} {reason}, which writes no input; add it to the prompt")
        llm.prompt_style = InputStyle(style, recipe.input)
    return llm
