"""The settings of `litgpt chat`."""

from dataclasses import dataclass, field
from pathlib import Path

from litgpt.recipe.generate import GenerationSettings


@dataclass(frozen=True)
class Chat(GenerationSettings):
    """Chat with a model in the terminal."""

    checkpoint_dir: Path
    """Folder of a model, of a run or of one of its steps, an adapter, or org/name on the hub."""
    multiline: bool = False
    """Read messages of several lines, each up to a line with !submit."""
    access_token: str | None = field(default=None, repr=False)
    """Hugging Face access token for gated models; null for HF_TOKEN or the token of `hf auth login`."""
