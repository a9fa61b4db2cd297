"""Train large language models from one YAML file."""

from litgpt.version import __version__

__all__ = ["__version__"]
