"""The settings of `litgpt board`."""

from dataclasses import dataclass, field
from pathlib import Path

from litgpt.recipe.bounds import check_numbers
from litgpt.recipe.serve import Port, check_api_key


@dataclass(frozen=True)
class Board:
    """Show the runs below a folder in the browser, with live curves, and start, stop and resume runs."""

    folder: Path = Path("out")
    """Folder with the output folders of runs, at any depth."""
    host: str = "127.0.0.1"
    """Address to listen on: this machine only; 0.0.0.0 for every network, where anyone with the key can start runs."""
    port: Port = 8001
    """Port to listen on; 0 for a free one."""
    api_key: str | None = field(default=None, repr=False)
    """The key that the page asks for; null for a new one at every start, which is in the printed address."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_api_key(self.api_key)
