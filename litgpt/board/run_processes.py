"""Processes of runs on this machine: they are started, found, and asked to stop.

A run that a board has started holds the lock of `.board/lock` in its folder, which the system releases when its process
ends, however it ends. Any other one is found by the process in its record.
"""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from litgpt.errors import UserError
from litgpt.files import read_json_object, write_json, write_text
from litgpt.train.run_process import find_machine, is_alive, send_signal
from litgpt.train.run_record import RECORD_FILE, read_last_start

PROCESS_FOLDER = ".board"  # in that of a run
PROCESS_FILE = "process.json"
OUTPUT = "output.log"
OUTPUT_BYTES = 8192
PROGRAM = (sys.executable, "-P", "-m", "litgpt")


class RunProcesses:
    """The processes of runs.

    Args:
        program: the words of a command line that start litgpt.
    """

    def __init__(self, program: Sequence[str] = PROGRAM) -> None:
        self.program = program

    def start(self, command: str, out_dir: Path, arguments: Sequence[str], recipe: str | None = None) -> None:
        """Start a run in a session of its own, so that it outlives the board; its output is in `.board/output.log`.

        Args:
            arguments: of the command, besides `--config` for the recipe.
            recipe: in YAML, which is written first; None for the one in out_dir.

        Raises:
            UserError: if a run has this folder.
        """
        folder = out_dir / PROCESS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        config = out_dir / "recipe.yaml" if recipe is None else folder / "recipe.yaml"
        with (folder / "lock").open("ab") as lock:
            if not try_lock(lock, fcntl.LOCK_EX) or is_alive(find_recorded_process(out_dir)):
                raise UserError(f"out_dir: {out_dir} is that of a run in progress; stop it first, or set another one")
            if recipe is not None:
                write_text(config, recipe)
            with (folder / OUTPUT).open("ab") as output:
                process = subprocess.Popen(
                    [*self.program, command, "--config", str(config), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[lock.fileno()],
                )
            write_json(folder / PROCESS_FILE, {"command": command, "machine": find_machine(), "pid": process.pid})
        threading.Thread(target=process.wait, name=f"wait for {process.pid}", daemon=True).start()

    def is_running(self, out_dir: Path) -> bool:
        """Whether the process of a run on this machine has not ended."""
        return is_locked(out_dir) or is_alive(find_recorded_process(out_dir))

    def stop(self, out_dir: Path) -> None:
        """Ask a run to stop, with SIGTERM: it finishes its step, saves a checkpoint and ends.

        Raises:
            UserError: if no process of this machine is known to be that of this run, or it is that of another user.
        """
        pid = read_json_object(out_dir / PROCESS_FOLDER / PROCESS_FILE).get("pid")
        try:
            if is_locked(out_dir) and isinstance(pid, int) and leads_session(pid):
                os.kill(pid, signal.SIGTERM)
                return
            if send_signal(find_recorded_process(out_dir), signal.SIGTERM):
                return
        except PermissionError:
            raise UserError(f"run: the process of {out_dir} is that of another user, who can stop it") from None
        raise UserError(f"run: {out_dir} has ended, or runs on another machine; stop it where it was started")

    def read_output(self, out_dir: Path) -> str:
        """The last lines that the processes of a run have printed; empty if no board has started it."""
        try:
            with (out_dir / PROCESS_FOLDER / OUTPUT).open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - OUTPUT_BYTES))
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""


def is_locked(out_dir: Path) -> bool:
    """Whether the process of a run that a board has started has not ended."""
    try:
        with (out_dir / PROCESS_FOLDER / "lock").open("rb") as lock:
            return not try_lock(lock, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def find_recorded_process(out_dir: Path) -> dict[str, Any]:
    """The process in the record of a run; empty if its record has an end, or no process, or cannot be read."""
    try:
        start = read_last_start(out_dir / RECORD_FILE)
    except (UserError, OSError):  # which the page of the run names
        return {}
    process = start.get("process")
    return process if isinstance(process, dict) and not start.get("end") else {}


def try_lock(file: IO[bytes], kind: int) -> bool:
    """Take a lock of an open file; False if another process has one that excludes it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def leads_session(pid: int) -> bool:
    """Whether a process exists that leads a session, as those do that a board starts."""
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False
