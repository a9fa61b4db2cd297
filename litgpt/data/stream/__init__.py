"""Batches in a reproducible order: sampling, packing, collating, worker processes."""

from litgpt.data import import_on_use

__getattr__ = import_on_use(__name__)
