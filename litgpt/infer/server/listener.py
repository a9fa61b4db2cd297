"""The socket of a server, and how its application runs until a signal."""

import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from litgpt.errors import UserError
from litgpt.interrupts import suspend_exit_on_interrupt


def run_app(app: FastAPI, listener: socket.socket, *, grace_seconds: int) -> None:
    """Answer requests until SIGTERM or Ctrl-C, and then those that run already.

    Args:
        grace_seconds: seconds that these have.
    """
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=grace_seconds, timeout_keep_alive=30)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when all requests are finished
        signal.signal(number, ignore_signal)
    with suspend_exit_on_interrupt():  # uvicorn waits for running requests
        uvicorn.Server(config).run(sockets=[listener])


def ignore_signal(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the server has stopped already."""


def open_socket(host: str, port: int) -> socket.socket:
    """A socket for an address, which does not listen yet.

    Raises:
        UserError: if the address is in use, or not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(f"port: cannot listen on {host}:{port} ({error.strerror}); set another one") from None
    return listener
