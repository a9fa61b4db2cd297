"""Errors of the user are reported in one line, by whichever ranks find them, and all ranks of the run stop."""

import os
import subprocess
from pathlib import Path

import pytest

from litgpt import cli
from tests.faults.test_killed_training import prepare
from tests.processes import join_ranks, run_litgpt, serve_program, start_ranks

ONE = {"data__init_args__val_data_path": "damaged"}  # the first rank prepares the data, the other waits for it
ALL = {"train__max_tokens": 3}  # found by every rank


def prepare_wrong(folder: Path, **changes: object) -> Path:
    """A run of two ranks with a file of text that is damaged."""
    (folder / "damaged").mkdir()
    (folder / "damaged" / "text.txt.gz").write_bytes(b"no gzip")
    return prepare(folder, 2, **changes)


def run_without_wait(*argv: str) -> int:
    """Run a command line of which later ranks do not wait for the first to print its error."""
    cli.OTHERS_WAIT = 0
    return run_litgpt(*argv)


@pytest.mark.parametrize(
    ("changes", "words"), [(ONE, "text.txt.gz:1: "), (ALL, "train.max_tokens: 3 ")], ids=["one", "all"]
)
def test_what_one_rank_finds_ends_all(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    folder = prepare_wrong(tmp_path, **changes)
    assert join_ranks(
        start_ranks(run_without_wait, "pretrain", "--config", "recipe.yaml", folder=folder, ranks=2), timeout=30
    ) == [1, 1]
    for rank in range(2):  # which write into files of their own
        text = (folder / f"rank-{rank}.log").read_text()
        messages = [line for line in text.splitlines() if line.startswith("litgpt: error: ")]
        assert len(messages) == 1 and words in messages[0] and "Traceback" not in text, text


def test_ranks_that_share_a_terminal_say_it_once(tmp_path: Path) -> None:
    folder = prepare_wrong(tmp_path, **ONE)
    program = tmp_path / "litgpt"
    server = serve_program(program)
    command = [program, "pretrain", "--config", "recipe.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    server.kill()
    messages = [line for line in ended.stderr.splitlines() if "litgpt: error: " in line]
    assert ended.returncode == 1 and len(messages) == 1 and "text.txt.gz:1: " in messages[0], ended.stderr
    assert "Traceback" not in ended.stderr and "recvValue" not in ended.stderr
