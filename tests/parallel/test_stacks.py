"""Reports of hangs: a step that takes too long leaves the stacks of its threads, a quick one nothing."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from litgpt.parallel import stacks
from litgpt.parallel.stacks import StackReport


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def wait_in_a_function_of_this_name(event: threading.Event) -> None:
    event.wait(20)


def test_a_slow_step_is_reported_once_and_the_next_one_too(tmp_path: Path) -> None:
    lines: list[str] = []
    folder = tmp_path / "stacks"
    never = threading.Event()
    threading.Thread(target=wait_in_a_function_of_this_name, args=(never,), daemon=True).start()
    with StackReport(folder, 3, minutes=0.05 / 60, notify=lines.append) as report:
        for number in (7, 8):
            with report.limit_time(f"step {number}"):
                wait_until(lambda: bool(report.poll()))
                assert report.poll() == lines[-1]
            assert report.poll() == ""
    never.set()
    cause = "has taken longer than parallel.timeout_minutes: 0.000833333"
    where = f"the Python stacks of all ranks are in {folder}"
    assert lines == [f"step {number} {cause}; {where}" for number in (7, 8)]
    text = (folder / "rank-00003.txt").read_text()
    assert text.count("wait_in_a_function_of_this_name") == 2
    assert text.count("test_a_slow_step_is_reported_once_and_the_next_one_too") == 2


def test_quick_steps_leave_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "stacks"
    with StackReport(folder, 0, minutes=1, notify=lambda _line: None) as report:
        assert stacks.active == [report]
        for number in range(3):
            with report.limit_time(f"step {number}"):
                assert (folder / "rank-00000.txt").is_file()
    assert not folder.exists() and not stacks.active


def test_what_another_rank_tells_is_written_once_and_not_told_again(tmp_path: Path) -> None:
    lines: list[str] = []
    with StackReport(tmp_path, 1, minutes=1, notify=lines.append) as report:
        for _ in range(2):
            report.write("step 5 hangs on rank 0")
            assert report.poll() == "", "it is not this rank that has found it"
        with report.limit_time("step 6"):
            pass
        assert report.message == ""
    assert lines == ["step 5 hangs on rank 0"]
    text = (tmp_path / "rank-00001.txt").read_text()
    assert text.count("test_what_another_rank_tells_is_written_once_and_not_told_again") == 1
