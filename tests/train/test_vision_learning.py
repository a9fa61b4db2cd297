"""A small model that sees, from random weights, learns to name drawn shapes that it was not trained on."""
