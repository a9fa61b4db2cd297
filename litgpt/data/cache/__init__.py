"""Tokenized text and samples on disk, mapped into memory."""

from litgpt.data import import_on_use

__getattr__ = import_on_use(__name__)
