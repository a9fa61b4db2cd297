"""Write text with a model: load it, remember keys and values, choose tokens, stop."""
