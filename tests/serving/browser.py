"""Chromium, told what to do through its DevTools protocol over two pipes."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Tab:
    """A page of a browser.

    Attributes:
        log: errors and warnings, of its script and its policy.
        asked: addresses that it has asked.
    """

    def __init__(self, send: int, receive: int):
        self._send, self._receive, self._held = send, receive, b""
        self._numbers = itertools.count(1)
        self._session: dict[str, str] = {}
        self.log: list[str] = []
        self.asked: list[str] = []
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        attached = self.do("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")
        self.do("Emulation.setFocusEmulationEnabled", enabled=True)

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's result, once it is there."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params, **self._session}
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == number:
                assert "error" not in told, told
                return told["result"]
            if told.get("method") == "Network.requestWillBeSent":
                self.asked.append(told["params"]["request"]["url"])
            elif told.get("method") == "Runtime.exceptionThrown":
                self.log.append(json.dumps(told["params"]))
            elif told.get("method") == "Log.entryAdded":
                entry = told["params"]["entry"]
                if entry["level"] in ("warning", "error") and entry["source"] != "network":
                    self.log.append(entry["text"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            more = os.read(self._receive, 1 << 16)
            assert more, "the browser has ended"
            self._held += more
        line, _, self._held = self._held.partition(b"\0")
        return json.loads(line)

    def run(self, script: str) -> Any:
        """An expression's value."""
        given = {"expression": script, "returnByValue": True, "awaitPromise": True}
        found = self.do("Runtime.evaluate", **given)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> None:
        """Until an expression is true."""
        until = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            seen = self.run("document.body.innerText")
            assert time.monotonic() < until, f"{script} is never true: {seen}"
            time.sleep(0.02)

    def open(self, url: str, width: int = 1000, height: int = 700) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.do("Emulation.setDeviceMetricsOverride", **size)
        self.do("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def write(self, text: str) -> None:
        """As by a keyboard, where the focus is."""
        self.do("Input.insertText", text=text)

    def enter(self) -> None:
        """Presses the key."""
        given = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        self.do("Input.dispatchKeyEvent", type="keyDown", text="\r", **given)
        self.do("Input.dispatchKeyEvent", type="keyUp", **given)

    def point(self, selector: str, click: bool = False) -> None:
        """Moves the mouse onto the first such element, and clicks."""
        place = self.run(
            f"(r => ({{x: r.x + r.width / 2, y: r.y + r.height / 2}}))"
            f"(document.querySelector({json.dumps(selector)}).getClientRects()[0])"
        )
        self.do("Input.dispatchMouseEvent", type="mouseMoved", **place)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                pressed = {"type": kind, "button": "left", "clickCount": 1, **place}
                self.do("Input.dispatchMouseEvent", **pressed)

    def picture(self, path: Path) -> None:
        """Saves what it shows as PNG."""
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def tab(browser: str, profile: Path) -> Iterator[Tab]:
    """A page of a browser that ends with it."""
    (commands, send), (receive, answers) = os.pipe(), os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    # A browser reads its pipe 3 and writes to its pipe 4.
    piped = f'exec "$@" 3< /dev/fd/{commands} 4> /dev/fd/{answers}'
    running = subprocess.Popen(
        ["sh", "-c", piped, "sh", browser, *options, f"--user-data-dir={profile}"],
        pass_fds=(commands, answers),
        stderr=subprocess.DEVNULL,
    )
    os.close(commands)
    os.close(answers)
    try:
        yield Tab(send, receive)
    finally:
        running.kill()
        running.wait()
        os.close(send)
        os.close(receive)
