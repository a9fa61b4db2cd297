"""What a run will need: the memory of a training step, counted on fake tensors."""
