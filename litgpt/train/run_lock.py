"""The lock of the folder of a run, whose checkpoints and logs a second process would mix with its own."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from litgpt.errors import UserError
from litgpt.parallel.strategy import is_rank_zero
from litgpt.store.collectives_io import raise_on_all_ranks

LOCK_FILE = ".lock"


@contextmanager
def lock_run(out_dir: Path, notify: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a run's folder, on its first rank; the system releases it however the process ends.

    Some network file systems have no locks; there one line says so, and nothing is locked.

    Args:
        notify: prints a line.

    Raises:
        UserError: on all ranks, if another process has it.
    """
    descriptor = None
    with raise_on_all_ranks():
        if is_rank_zero():
            out_dir.mkdir(parents=True, exist_ok=True)
            descriptor = open_lock(out_dir / LOCK_FILE, notify)
    try:
        yield
    finally:
        if descriptor is not None:
            if out_dir.is_dir() and [path.name for path in out_dir.iterdir()] == [
                LOCK_FILE
            ]:  # of a run that failed before its first step
                (out_dir / LOCK_FILE).unlink()
                out_dir.rmdir()
            os.close(descriptor)


def open_lock(path: Path, notify: Callable[[str], None]) -> int:
    """Open a lock file and lock it; returns the descriptor.

    Raises:
        UserError: if another process has locked it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, whose lock processes that it forks keep
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        message = f"out_dir: {path.parent} is in use by a run; wait for its end, or set another out_dir"
        raise UserError(message) from None
    except OSError as error:
        notify(f"{path.parent} cannot be locked ({error.strerror}); start no second run in it")
    return descriptor
