"""The process of a run: how its record names it, whether it still exists, and a signal to it and to no other one.

Linux gives the number of a process that has ended to a later one, so that a number alone names no process.
"""

import hashlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROCESSES = Path("/proc")
START_FIELD = 21  # of the fields of `stat` from 0: clock ticks from the start of the machine to that of the process
NAME_FIELDS = 2  # the first fields of `stat`, of which the second, a name in parentheses, may contain spaces


def describe_own_process() -> dict[str, Any]:
    """Describe this process, as JSON values.

    Its command line is only a part of the hash `identity`, as it may have a key or a token.
    """
    return {"machine": find_machine(), "pid": os.getpid(), "identity": identify_process(os.getpid())}


def find_machine() -> str:
    """Where numbers of processes mean the same: this start of the machine, and this container's numbers.

    Empty on a system that does not say it, on which no process is known.
    """
    try:
        boot = (PROCESSES / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {(PROCESSES / 'self/ns/pid').readlink()}"
    except OSError:
        return ""


def identify_process(pid: int) -> str:
    """A hash of the start and of the command line of a process; empty if there is none, or it has ended."""
    try:
        status = (PROCESSES / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        command = (PROCESSES / str(pid) / "cmdline").read_bytes()
    except OSError:
        return ""
    start = status.rpartition(")")[2].split()[START_FIELD - NAME_FIELDS]
    return hashlib.sha256(start.encode() + b"\0" + command).hexdigest() if command else ""  # empty after its end


def is_on_this_machine(process: Mapping[str, Any]) -> bool:
    """Whether a process, as a record describes it, is or was one of this machine."""
    return bool(process.get("machine")) and process["machine"] == find_machine()


def is_alive(process: Mapping[str, Any]) -> bool:
    """Whether a process, as a record describes it, exists on this machine."""
    pid, identity = process.get("pid"), process.get("identity")
    return is_on_this_machine(process) and isinstance(pid, int) and pid > 0 and identity == identify_process(pid) != ""


def send_signal(process: Mapping[str, Any], number: int) -> bool:
    """Send a signal to a process, as a record describes it; False, and to no process, if it has ended.

    Raises:
        PermissionError: if it is that of another user.
    """
    if not is_alive(process):
        return False
    try:
        descriptor = os.pidfd_open(process["pid"])
    except ProcessLookupError:
        return False
    try:  # the descriptor is that of one process, also after its end
        if not is_alive(process):
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True
