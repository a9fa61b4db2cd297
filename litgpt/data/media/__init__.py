"""Media of samples: images as packed patches, and the positions of their tokens."""
