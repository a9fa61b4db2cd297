"""Worker processes that prefetch a run's batches and end with the run."""

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


class WorkerStream:
    """Base of streams that may read in worker processes: starts and stops them.

    Attributes:
        prefetched: iterates over what the workers read; None once closed.
    """

    def __init__(self) -> None:
        self.prefetched: Iterator[Any] | None = None
        self._processes: list[Any] = []

    def start(self, dataset: Dataset[Any], workers: int, order: Iterable[int] | None = None) -> None:
        """Start to read the items of a dataset.

        Args:
            workers: number of processes that prefetch; 0 reads in this process.
            order: indices of the items; None for an iterable dataset.
        """
        if not workers:
            self.prefetched = iter(dataset) if order is None else map(dataset.__getitem__, order)
            return
        # at exit, multiprocessing would send SIGTERM, which workers block, so they must be stopped before
        atexit.register(self.close)
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=order,
            num_workers=workers,
            collate_fn=_identity,
            # forked, so that the run is a worker's parent: workers exit if their parent is killed
            multiprocessing_context="fork" if sys.platform == "linux" else None,
            # without its own generator the loader would draw from the run's, and dropout would depend on it
            generator=torch.Generator(),
        )
        others = multiprocessing.active_children()
        with _block_signals():
            self.prefetched = iter(loader)
        self._processes = [process for process in multiprocessing.active_children() if process not in others]

    def close(self) -> None:
        """Stop the workers, if any; the next iteration starts them again at the current position."""
        if self.prefetched is not None and self._processes:
            # not by dropping it: a traceback may refer to it, and it would later report the workers killed below
            self.prefetched._shutdown_workers()  # type: ignore[attr-defined]  # waits a few seconds
        self.prefetched = None
        for process in self._processes:
            if process.is_alive():
                process.kill()
        self._processes = []
        atexit.unregister(self.close)


def count_cpus() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _identity(batch: Any) -> Any:
    return batch


@contextmanager
def _block_signals() -> Iterator[None]:
    """Block SIGINT, SIGTERM, SIGUSR1 and SIGHUP in the processes started here.

    Ctrl-C, a scheduler's SIGTERM and a closed terminal reach the whole process group; the parent decides, and needs its
    workers until then. A worker notices when its parent is gone. The mask is inherited: no worker runs without it.
    """
    blocked = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
