"""Progress bars on stderr for reading files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

FileWrapper = Callable[[BinaryIO], BinaryIO]
"""Wraps an open file, so that a progress bar follows its reads."""


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[FileWrapper]:
    """Show a progress bar on stderr for the files wrapped by the yielded function."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda file: progress.wrap_file(file, task_id=task)
