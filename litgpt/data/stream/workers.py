"""Processes that read a run's batches ahead of it, and end with it."""

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


class PrefetchingStream:
    """What streams share that may read in processes of their own: starting them, and their end.

    Attributes:
        running: what is being read; None once closed.
    """

    def __init__(self) -> None:
        self.running: Iterator[Any] | None = None
        self._processes: list[Any] = []

    def start(self, dataset: Dataset[Any], workers: int, order: Iterable[int] | None = None) -> None:
        """Read a dataset ahead, item by item in some order, or as it comes.

        Args:
            workers: processes, from 1.
        """
        # multiprocessing would end them at exit by SIGTERM, which does not reach them, so they must be gone before
        atexit.register(self.close)
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=order,
            num_workers=workers,
            collate_fn=_identity,
            # forked, so that the run is a worker's parent: one that loses its parent to SIGKILL ends by itself
            multiprocessing_context="fork" if sys.platform == "linux" else None,
            # without a generator of its own the loader would draw from the run's, and dropout would depend on it
            generator=torch.Generator(),
        )
        others = multiprocessing.active_children()
        with _block_signals():
            self.running = iter(loader)
        self._processes = [process for process in multiprocessing.active_children() if process not in others]

    def close(self) -> None:
        """Stop the workers, if any; iterating again starts them where reading stands."""
        self.running = None  # tells them to end, and waits a few seconds
        for process in self._processes:
            if process.is_alive():
                process.kill()
        self._processes = []
        atexit.unregister(self.close)


def count_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _identity(batch: Any) -> Any:
    return batch


@contextmanager
def _block_signals() -> Iterator[None]:
    """Processes started here never get SIGINT, SIGTERM or SIGUSR1.

    Ctrl-C and a scheduler's SIGTERM reach the whole process group; the parent decides, and needs its workers until
    then. A worker whose parent is gone notices that by itself. The mask is inherited, so there is no moment without it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
