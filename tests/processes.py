"""Start processes as forks of one server that has imported torch and the commands, which saves seconds for each."""

import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.training_records import TEST_VARIABLE, observe_training

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.fsdp",
        "torch.utils.tensorboard",
        "litdata",
        "jsonargparse",
        "pydantic.type_adapter",
        "litgpt.recipe.build",
        "litgpt.cli",
        "litgpt.commands.finetune",
        "litgpt.commands.generate",
        "litgpt.commands.pretrain",
        "tests.preloaded",
    ]
)
CHILDREN = threading.Lock()
"""Held while exit codes are read: a start reads those of all processes, and each can be read only once."""


def find_free_port() -> int:
    """Return a TCP port that is free, below those that the system gives to connections, which take it before a rank."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment variables that torchrun sets for one rank, and the name of the test."""
    test = {TEST_VARIABLE: os.environ.get(TEST_VARIABLE, "")}
    if ranks == 1:
        return test
    return test | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }


def start_ranks(work: Callable[..., Any], *arguments: Any, folder: Path, ranks: int = 1) -> list[BaseProcess]:
    """Call `work(*arguments)` in `ranks` processes in `folder`, with output to `<folder>/rank-<n>.log`.

    The exit code of a process is the number that `work` returns (0 if it returns anything else), or 1 if it raises.
    """
    port = find_free_port()
    processes = []
    for rank in range(ranks):
        variables = rank_environment(rank, ranks, port)
        process = CONTEXT.Process(target=_run_rank, args=(work, arguments, str(folder), rank, variables))
        with CHILDREN:
            process.start()
        processes.append(process)
    return processes


def join_ranks(processes: list[BaseProcess], timeout: float = 120) -> list[int | None]:
    """Wait for processes and return their exit codes; kill those that have not ended after `timeout` seconds in all."""
    end = time.monotonic() + timeout
    for process in processes:
        wait([process.sentinel], max(0.0, end - time.monotonic()))
    with CHILDREN:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    return [process.exitcode for process in processes]


def run_litgpt(*argv: str) -> int:
    """Run a command line of `litgpt` in this process."""
    from litgpt.cli import main

    return main(argv)


CLIENT = """#!{python} -ES
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    run = int.from_bytes(server.recv(4), "big")
    signal.signal(signal.SIGTERM, lambda number, _frame: os.kill(run, number))
    code = server.recv(1)
sys.exit(code[0] if code else 1)
"""


def serve_program(program: Path) -> BaseProcess:
    """Write `program`, a `litgpt` whose runs are forks of one server process, which this function starts.

    Under the name `python`, the program is Python.
    """
    address = str(program.with_suffix(".socket"))
    program.write_text(CLIENT.format(python=sys.executable, address=address))
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        process = CONTEXT.Process(target=_serve_requests, args=(listener,))
        process.start()
    return process


def _serve_requests(listener: socket.socket) -> None:
    observe_training()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # finished children need no wait()
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            run = os.fork()
            if run == 0:
                _run_request(client)
            client.sendall(run.to_bytes(4, "big"))
            _, status = os.waitpid(run, 0)
            client.sendall(bytes([os.waitstatus_to_exitcode(status) % 256]))
            os._exit(0)
        client.close()


def _run_request(client: socket.socket) -> None:
    """Run the command line that a client sent, and exit."""
    head, streams, _, _ = socket.recv_fds(client, 8, 3)
    argv, folder, variables = json.loads(client.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.stdin = os.fdopen(0)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.argv = argv
    import __main__

    __main__.__spec__ = None  # otherwise Lightning would start further ranks as the test runner was started
    from litgpt.__main__ import main

    code: Any = 1
    try:
        run = _run_python if Path(argv[0]).name == "python" else main
        run()
        code = 0
    except SystemExit as exit_request:
        code = exit_request.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _run_python() -> None:
    """Do what Python does with `sys.argv`."""
    option, *argv = sys.argv[1:]
    if option == "-m":
        sys.argv = argv
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    elif option in ("-", "-c"):
        source, *argv = [sys.stdin.read(), *argv] if option == "-" else argv
        sys.argv = [option, *argv]
        exec(compile(source, option, "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [option, *argv]
        sys.path.insert(0, os.getcwd())
        runpy.run_path(os.path.abspath(option), run_name="__main__")  # other processes that it starts find it there


def _run_rank(
    work: Callable[..., Any], arguments: tuple[Any, ...], folder: str, rank: int, variables: Mapping[str, str]
) -> None:
    os.environ.update(variables)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in a background process of a shell
    log = os.open(f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    observe_training()
    try:
        code = work(*arguments)
        has_failed = isinstance(code, int) and code != 0  # then other ranks may not take part in an exchange again
        if torch.distributed.is_initialized() and not has_failed:
            torch.distributed.destroy_process_group()  # a thread of gloo that still sends crashes in an exit
    except SystemExit as exit_request:
        code = exit_request.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)  # finalizers of gloo's threads abort now and then
