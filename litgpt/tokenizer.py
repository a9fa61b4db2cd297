"""The tokenizer, at the import path of LitGPT."""

from litgpt.data.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
