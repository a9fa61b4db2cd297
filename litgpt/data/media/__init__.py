"""Media of samples: images as packed patches, and the positions of their tokens."""

from litgpt.data import import_on_use

__getattr__ = import_on_use(__name__)
