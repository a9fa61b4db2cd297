"""The version of litgpt."""

__version__ = "0.1.0"
