"""Training: the loop, the step, objectives, optimizers, metrics and the report."""
