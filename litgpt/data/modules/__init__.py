"""The data modules that a recipe names."""
