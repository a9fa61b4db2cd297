"""A headless Chromium, driven with the DevTools protocol over its pipe: JSON messages that end with a zero byte."""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), "/": (191, "/"), "k": (75, ""), "c": (67, "c")}
CONTROL, SHIFT = 2, 8


class Chromium:
    """One page of a browser.

    Attributes:
        events: those that the page has sent, oldest first.
    """

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer, self._rest = reader, writer, b""
        self._ids, self._session = itertools.count(1), ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command."""
        message = {"id": next(self._ids), "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        for answer in self._read(30):
            if answer.get("id") == message["id"]:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.events.append(answer)
        raise AssertionError(f"no answer to {method}")

    def _read(self, seconds: float) -> Iterator[dict[str, Any]]:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if b"\0" not in self._rest:
                if select.select([self._reader], [], [], left)[0]:
                    self._rest += os.read(self._reader, 1 << 20)
                continue
            message, _, self._rest = self._rest.partition(b"\0")
            yield json.loads(message)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript, awaited if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> Any:
        """The value of an expression, as soon as it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(AssertionError):  # while a page is loaded
                if value := self.evaluate(expression):
                    return value
            time.sleep(0.03)
        raise AssertionError(f"{expression} is not true; the page shows {self.evaluate('document.body.innerText')!r}")

    def open(self, url: str) -> None:
        """Load a page, or the same one again."""
        self.evaluate("window.isOld = true")
        self.call("Page.navigate", url=url)
        self.wait("!window.isOld && document.readyState === 'complete'")

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key and release it."""
        code, text = KEYS[key]
        pressed = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        if text and not modifiers & CONTROL:
            pressed["text"] = text
        self.call("Input.dispatchKeyEvent", type="keyDown" if "text" in pressed else "rawKeyDown", **pressed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **{**pressed, "text": ""})

    def type(self, text: str) -> None:
        """Insert a text where the focus is."""
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Click the middle of an element, which must be visible and not covered."""
        place = self.wait(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element?.scrollIntoView({{block: "nearest"}});
            const box = element?.getBoundingClientRect();
            const x = box?.x + box?.width / 2, y = box?.y + box?.height / 2;
            return box?.width && element.contains(document.elementFromPoint(x, y)) && [x, y];
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def set_size(self, width: int, height: int, *, is_dark: bool = False) -> None:
        """Set the size of the window in CSS pixels, and the color scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def save_screenshot(self, path: Path) -> None:
        """Write what is visible as a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def list_requests(self) -> list[dict[str, Any]]:
        """The requests that the page has made so far."""
        self.evaluate("1")
        sent = (event for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"] for event in sent]


@contextlib.contextmanager
def start_chromium(profile: Path) -> Iterator[Chromium]:
    """A browser with a profile of its own, which is closed at the end."""
    assert PROGRAM is not None
    ends = [*os.pipe(), *os.pipe()]
    high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in ends]  # 3 and 4 are those that Chromium reads and writes
    for end in ends:
        os.close(end)
    command = f'exec "$@" 3<&{high[0]} 4>&{high[3]}'
    process = subprocess.Popen(
        ["bash", "-c", command, "bash", PROGRAM, *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=[high[0], high[3]],
        stderr=subprocess.DEVNULL,
    )
    os.close(high[0])
    os.close(high[3])
    try:
        yield Chromium(high[2], high[1])
    finally:
        process.kill()
        process.wait()
        os.close(high[1])
        os.close(high[2])
