"""Batches in a reproducible order: sampling, packing, collating, worker processes."""
