"""Text generation: loading models, prompts, sampling and the key-value cache."""
