"""Model folders: read those of Hugging Face and LitGPT, write ones that transformers loads as they stand."""

from litgpt.store.reading import load, shape_in, tensors_in
from litgpt.store.tokenizer_copy import tokenizer_files
from litgpt.store.writing import save, save_model

__all__ = ["load", "save", "save_model", "shape_in", "tensors_in", "tokenizer_files"]
