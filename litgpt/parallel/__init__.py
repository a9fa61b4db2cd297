"""Parallelism: data, tensor, context, pipeline and expert parallelism of a model over many processes."""
