"""The import path that scripts written for LitGPT have for the tokenizer."""

from litgpt.data.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
