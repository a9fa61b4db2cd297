"""Start processes that need not import torch and lightning: one server has done so, and each is a fork of it."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "lightning", "litgpt.commands.pretrain"])


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells the process of one rank."""
    if ranks == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }


def start(work: Callable[..., Any], *arguments: Any, folder: Path, ranks: int = 1) -> list[BaseProcess]:
    """Call `work(*arguments)` in `ranks` processes in `folder`; what they print goes to `<folder>/rank-<n>.log`.

    A process exits with what `work` returns if that is a number, with 1 if it raises.
    """
    port = free_port()
    started = []
    for rank in range(ranks):
        target = (work, arguments, str(folder), rank, environment(rank, ranks, port))
        process = CONTEXT.Process(target=_child, args=target)
        process.start()
        started.append(process)
    return started


def finish(processes: list[BaseProcess], timeout: float = 120) -> list[int | None]:
    """Wait for processes and give their exit codes; a process that does not end in time is killed."""
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def litgpt(*argv: str) -> int:
    """Run a command line, in one of these processes."""
    from litgpt.cli import main

    return main(argv)


def _child(
    work: Callable[..., Any], arguments: tuple[Any, ...], folder: str, rank: int, names: Mapping[str, str]
) -> None:
    os.environ.update(names)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(folder)
    log = os.open(f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    import torch

    torch.set_num_threads(1)
    try:
        code = work(*arguments)
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)  # finalisers of gloo's threads abort now and then
