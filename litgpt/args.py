"""The import path that scripts written for LitGPT have for groups of settings."""

from litgpt.recipe.train import EvalArgs, LogArgs, TrainArgs

__all__ = ["EvalArgs", "LogArgs", "TrainArgs"]
