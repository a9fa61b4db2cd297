"""Prompt styles, at the import path of LitGPT."""

from typing import Any

from litgpt.data.render.prompt_styles import (
    ChatML,
    PromptStyle,
    classes,
    has_prompt_style,
    load_prompt_style,
    rows,
    save_prompt_style,
    style_class,
)

__all__ = ["ChatML", "PromptStyle", "has_prompt_style", "load_prompt_style", "prompt_styles", "save_prompt_style"]  # noqa: F822


def __getattr__(name: str) -> Any:
    """Return the class of a style, such as `Alpaca`; `prompt_styles` is a dictionary of all styles by name."""
    if name == "prompt_styles":
        return {style: style_class(style) for style in rows()}
    if name in classes():
        return classes()[name]
    raise AttributeError(f"module 'litgpt.prompts' has no attribute {name!r}")
