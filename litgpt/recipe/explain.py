"""The settings of `litgpt explain`."""

from dataclasses import dataclass
from pathlib import Path

from litgpt.errors import UserError


@dataclass(frozen=True)
class Explain:
    """Translate a launch script of Megatron-SWIFT or ms-swift to a recipe, and say what is left over."""

    file: Path | None = None
    """Shell script that starts `megatron` or `swift`."""
    megatron: str | None = None
    """Arguments of Megatron-SWIFT, such as `--tensor_model_parallel_size 2`; with another command first, as in `pt`."""
    swift: str | None = None
    """Arguments of ms-swift."""
    list: bool = False
    """Print the table of options, one line an option: name, state (same, other, translated, refused), key or reason."""

    def __post_init__(self) -> None:
        given = [name for name in ("file", "megatron", "swift", "list") if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise UserError(
                f"{', '.join(given) or 'nothing'} is given; give one of a file, --megatron, --swift and --list"
            )
