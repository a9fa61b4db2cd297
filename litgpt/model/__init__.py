"""The model: plain PyTorch, no distributed, no lightning."""
