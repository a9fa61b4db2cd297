"""Processes that live for the whole test session and form a process group of any size for each function."""

import atexit
import contextlib
import functools
import gc
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.processes import CONTEXT, find_free_port, rank_environment
from tests.training_records import observe_training

SIZE = 8
MAX_RUNS = 8
"""Functions that a process runs before it is replaced: gloo leaves threads behind that use the processor."""


class Pool:
    """Up to `SIZE` processes, started when first needed; all are restarted after `MAX_RUNS` functions or a failure."""

    def __init__(self) -> None:
        self.members: list[tuple[Any, Connection]] = []
        self.runs = 0
        atexit.register(self.close)

    def run(self, work: Callable[..., Any], *arguments: Any, ranks: int, timeout: float = 120) -> list[Any]:
        """What `work(*arguments)` returns on each of `ranks` ranks of a gloo process group.

        Raises:
            AssertionError: with the traceback of the first rank that raised.
        """
        if self.runs == MAX_RUNS:
            self.close()
        self.runs += 1
        while len(self.members) < ranks:
            parent_pipe, child_pipe = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(child_pipe,), daemon=True)
            process.start()
            child_pipe.close()
            self.members.append((process, parent_pipe))
        port = find_free_port()
        pipes = [pipe for _, pipe in self.members[:ranks]]
        for rank, pipe in enumerate(pipes):
            pipe.send((work, arguments, rank_environment(rank, max(ranks, 2), port) | {"WORLD_SIZE": str(ranks)}))
        results: dict[Connection, Any] = {}
        while len(results) < ranks:
            ready = wait([pipe for pipe in pipes if pipe not in results], timeout)
            for pipe in ready:
                with contextlib.suppress(EOFError):
                    results[pipe] = pipe.recv()  # type: ignore[union-attr, index]
                failed = results.get(pipe, (False, "the process died"))  # type: ignore[call-overload]
                if not failed[0]:
                    self.close()
                    raise AssertionError(failed[1])
            if not ready:
                self.close()
                raise AssertionError(f"{ranks - len(results)} of {ranks} ranks did not return within {timeout:g} s")
        return [results[pipe][1] for pipe in pipes]

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self.members:
            process.kill()
            process.join()
            pipe.close()
        self.members, self.runs = [], 0


def _serve(pipe: Connection) -> None:
    """Run each function that is received, in a new process group."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    observe_training()
    while True:
        try:
            work, arguments, names = pipe.recv()
        except EOFError:
            os._exit(0)
        os.environ.update(names)
        try:
            dist.init_process_group("gloo", timeout=timedelta(seconds=60))
            result = (True, work(*arguments))
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            result = (False, traceback.format_exc())
        forget_meshes()
        pipe.send(result)


def forget_meshes() -> None:
    """Clear torch's caches by mesh: a mesh of the next process group can equal one of the last."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()
    caches = [item for item in gc.get_objects() if type(item) is functools._lru_cache_wrapper]
    for cache in caches:
        if (cache.__module__ or "").startswith("torch.distributed"):
            cache.cache_clear()


POOL = Pool()
