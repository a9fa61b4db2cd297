"""The page of the board in a browser: a run from the form to its comparison, and many long runs."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.board.board_server import KEY, run_board, write_metrics, write_run
from tests.infer.server.chromium import PROGRAM, Chromium, start_chromium
from tests.processes import serve_program
from tests.runs import SHAPE, write_text

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason="needs Chromium")]
STEPS = "Number(document.querySelector('.tiles dd')?.textContent.replaceAll(',', ''))"
SECTIONS = "[...document.querySelectorAll('.place > section')]"
LINE_TOPS = "[...document.querySelectorAll('[data-chart=\"0\"] path')].map((path) => path.getAttribute('d').length)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with start_chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


def open_board(browser: Chromium, board: httpx.Client) -> None:
    """Open the board with its key in the address, which the page removes."""
    browser.set_size(1200, 900)
    browser.open("about:blank")
    browser.events.clear()
    browser.open(f"{board.base_url}#key={KEY}")
    browser.wait("location.hash === '#/'")


def check_page(browser: Chromium, board: httpx.Client) -> None:
    """Check that the page has requested nothing but the board, and has thrown no error."""
    assert {r["url"] for r in browser.list_requests() if not r["url"].startswith(str(board.base_url))} == set()
    assert [event["params"] for event in browser.events if event["method"] == "Runtime.exceptionThrown"] == []


def set_field(browser: Chromium, key: str, value: str) -> None:
    """Type a value into a field of the form, or choose it."""
    selector = f"[name={json.dumps(key)}]"
    is_select = browser.wait(f"document.querySelector('{selector}')?.localName") == "select"
    if is_select:
        change = "dispatchEvent(new Event('input', {bubbles: true}))"
        browser.evaluate(
            f"(() => {{ const e = document.querySelector('{selector}'); e.value = '{value}'; e.{change}; }})()"
        )
    else:
        opened = "for (let e = this; e; e = e.parentElement?.closest('details')) e.open = true"
        browser.evaluate(f"(function () {{ {opened}; this.select(); }}).call(document.querySelector('{selector}'))")
        browser.type(value)


def find_error(key: str) -> str:
    """An expression for the error that is shown at a field."""
    return f"document.getElementById('field-{key}-error')?.textContent"


@pytest.mark.timeout(180)
def test_a_run_is_started_stopped_resumed_and_compared(
    browser: Chromium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "out"
    write_run(out / "other", steps=60)
    text = write_text(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    request.addfinalizer(serve_program(tmp_path / "litgpt").kill)
    with run_board(out, [str(tmp_path / "litgpt")]) as board:
        open_board(browser, board)
        browser.wait("document.querySelector('.runs a')?.textContent === 'other'")
        browser.click("[href='#/new']")
        fields = {
            "model_name": "toy", "model_config": json.dumps(SHAPE), "data": "TextFiles",
            "data.train_data_path": str(text), "tokenizer.kind": "bytes", "train.max_steps": "x20",
            "train.global_batch_size": "8", "devices": "1",
            "train.micro_batch_size": "4", "train.lr_warmup_steps": "2", "precision": "32-true",
            "train.log_interval": "1", "optimizer.lr": "0.01", "eval.max_iters": "1", "train.max_tokens": "",
        }  # fmt: skip
        for key, value in fields.items():
            set_field(browser, key, value)
        message = "train.max_steps: 'x20' is not valid; use an integer from 1 to 1000000000 or null"
        assert browser.wait(find_error("train.max_steps")) == message
        browser.click("#start")
        browser.wait("document.activeElement.name === 'train.max_steps'")
        assert not (out / "run-1").exists()
        set_field(browser, "train.max_steps", "100000")
        browser.wait("document.getElementById('recipe').textContent.includes('max_steps: \\'100000\\'')")
        assert browser.evaluate("document.querySelectorAll('[aria-invalid]').length") == 0
        browser.click("#plan")
        browser.wait("document.getElementById('planned').textContent.includes('Total')", 40)
        browser.click("#start")
        browser.wait("location.hash === '#/run/run-1'")

        first = browser.wait(f"{STEPS} > 2 && {STEPS}", 60)
        browser.wait(f"{STEPS} > {first}")  # the curve grows
        assert browser.evaluate(f"{LINE_TOPS}[0]") > 40
        browser.click(".stop")
        browser.wait("!!document.querySelector('.resume')", 60)
        reason = json.loads((out / "run-1" / "run.json").read_text())["starts"][0]["end"]
        assert reason["reason"].startswith("SIGTERM received")
        browser.click(".resume")
        browser.wait(f"!!document.querySelector('.stop') && {STEPS} > {reason['step']}", 60)
        browser.click(".stop")
        browser.wait("!!document.querySelector('.resume')", 60)
        starts = json.loads((out / "run-1" / "run.json").read_text())["starts"]
        assert [start["step"] for start in starts] == [0, reason["step"]]

        browser.press("Escape")
        for name in ("run-1", "other"):
            browser.click(f"[aria-label='Compare {name}']")
        browser.evaluate("document.activeElement.blur()")
        browser.press("c")
        assert len(browser.wait(f"{LINE_TOPS}.length === 2 && {LINE_TOPS}")) == 2
        assert re.search(r"Steps\t\d+\t60", browser.evaluate("document.querySelector('.place-figures').innerText"))
        check_page(browser, board)


def test_fifty_runs_of_100_000_steps_open_within_two_seconds(browser: Chromium, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = write_metrics(out / "run-0", 100_000)
    for number in range(1, 50):
        folder = out / f"run-{number}" / "logs" / "csv" / "version_0"
        folder.mkdir(parents=True)
        shutil.copyfile(whole, folder / "metrics.csv")
    with run_board(out) as board:
        open_board(browser, board)
        browser.open("about:blank")
        for path in out.rglob("metrics.csv"):
            path.touch()  # so that the figures are read again
        start = time.monotonic()
        browser.open(str(board.base_url))
        browser.wait("document.querySelectorAll('.runs .curve path').length === 50")
        assert time.monotonic() - start < 2
        check_page(browser, board)


@pytest.mark.parametrize("width", [1200, 390])
def test_no_view_is_wider_than_the_window(browser: Chromium, tmp_path: Path, width: int) -> None:
    names = ["a-run-with-a-long-name-" + "x" * 60, "b"]
    for name, steps in zip(names, (30, 2), strict=True):
        write_run(tmp_path / name, steps)
    with run_board(tmp_path) as board:
        open_board(browser, board)
        browser.set_size(width, 800)
        views = {
            "#/": "document.querySelector('.runs svg')",
            f"#/run/{names[0]}": "document.querySelectorAll('.charts path').length",
            f"#/compare/{names[0]}/{names[1]}": "document.querySelectorAll('.charts path').length > 3",
            "#/new": "document.getElementById('start')",
        }
        for view, ready in views.items():
            browser.evaluate(f"location.hash = '{view}'")
            browser.wait(f"!!({ready})")
            assert browser.evaluate("document.documentElement.scrollWidth") <= width, view
            parts = browser.evaluate(
                "[...document.querySelectorAll('.place > section')].map((part) => part.offsetWidth)"
            )
            assert all(part > 0.9 * width for part in parts) and len(set(parts)) <= 1, view
        browser.evaluate("location.hash = '#/run/b'")
        ticks = "[...document.querySelectorAll('[data-chart=\"0\"] text[text-anchor=middle]')]"
        assert browser.wait(f"{ticks}.map((tick) => tick.textContent)") == ["1", "2"]
        check_page(browser, board)
