"""Processes of runs are known by their start and their command line, not only by their number."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from litgpt.train import run_process
from litgpt.train.run_process import describe_own_process, identify_process, is_alive, send_signal


def test_a_system_that_does_not_name_its_processes_knows_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_process, "PROCESSES", tmp_path)
    own = describe_own_process()
    assert own == {"machine": "", "pid": os.getpid(), "identity": ""} and not is_alive(own)


def start_echo(*command: str) -> subprocess.Popen[bytes]:
    """Start a command that repeats its input, and wait for its first line: before, Linux may not know its arguments."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"started\n")
    assert process.stdout.readline() == b"started\n"
    return process


def test_a_process_is_alive_until_its_end() -> None:
    own = describe_own_process()
    assert is_alive(own) and own["pid"] == os.getpid()
    assert not is_alive({}) and not is_alive(own | {"machine": "another"}) and not is_alive({"machine": own["machine"]})
    first, second = start_echo("cat"), start_echo("cat", "-")
    described = own | {"pid": first.pid, "identity": identify_process(first.pid)}
    assert is_alive(described)
    assert not is_alive(described | {"pid": second.pid}), "another process has the number"
    assert send_signal(described, signal.SIGTERM)
    assert os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT) is not None
    assert not is_alive(described) and identify_process(first.pid) == "", "it has ended, and nobody has waited for it"
    assert first.wait() == -signal.SIGTERM
    assert not send_signal(described, signal.SIGTERM)
    second.kill()
    second.wait()
