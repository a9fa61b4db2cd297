"""The groups of settings, at the import path of LitGPT."""

from litgpt.recipe.train import EvalArgs, LogArgs, TrainArgs

__all__ = ["EvalArgs", "LogArgs", "TrainArgs"]
