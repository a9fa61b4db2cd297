"""Model folders: read those of Hugging Face and LitGPT, write ones that transformers loads as they stand."""

from litgpt.store.reading import load, shape_in, tensors_in, types_in
from litgpt.store.tokenizer_copy import tokenizer_files
from litgpt.store.writing import of_all_stages, save, save_model, write_folder

__all__ = [
    "load",
    "of_all_stages",
    "save",
    "save_model",
    "shape_in",
    "tensors_in",
    "tokenizer_files",
    "types_in",
    "write_folder",
]
