"""Prompt styles, at the import path of LitGPT."""

from typing import Any

from litgpt.data.render.prompt_styles import (
    ChatML,
    PromptStyle,
    build_style_class,
    build_style_classes,
    has_prompt_style,
    load_prompt_style,
    load_styles,
    model_name_to_prompt_style,
    save_prompt_style,
)

__all__ = [  # noqa: F822, prompt_styles is built on first use
    "ChatML",
    "PromptStyle",
    "has_prompt_style",
    "load_prompt_style",
    "model_name_to_prompt_style",
    "prompt_styles",
    "save_prompt_style",
]


def __getattr__(name: str) -> Any:
    """Return the class of a style, such as `Alpaca`; `prompt_styles` is a dictionary of all styles by name."""
    if name == "prompt_styles":
        return {style: build_style_class(style) for style in load_styles()}
    if name in build_style_classes():
        return build_style_classes()[name]
    raise AttributeError(f"module 'litgpt.prompts' has no attribute {name!r}")
