"""Render conversations as token ids and labels: chat templates, prompt styles, tools, loss weights."""

from litgpt.data import import_on_use

__getattr__ = import_on_use(__name__)
