"""A headless Chromium, spoken to over a pipe: no port, no driver, no further package.

The DevTools protocol with ``--remote-debugging-pipe``: JSON messages, each ended by a zero byte;
the browser reads its file descriptor 3 and writes its 4.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def find_browser() -> str | None:
    """The program, from the environment variable CHROME or the path."""
    named = os.environ.get("CHROME")
    return named or next((path for name in _NAMES if (path := shutil.which(name))), None)


@dataclass
class Page:
    """A loaded page.

    Attributes:
        complaints: Console messages, exceptions, and log entries (such as blocked requests).
        requests: Addresses that the page asked for.
    """

    browser: Browser
    session: str
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol on this page."""
        return self.browser.call(method, self.session, **params)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(found["data"])

    def pdf(self) -> bytes:
        """The page as it prints, on A4."""
        size = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": True}
        found = self.call("Page.printToPDF", printBackground=True, **size)
        return base64.b64decode(found["data"])

    def hear(self, event: dict[str, Any]) -> None:
        """Note what an event says of the page."""
        what = event["params"]
        if event["method"] == "Runtime.consoleAPICalled":
            self.complaints.append(f"console: {what['args']}")
        elif event["method"] == "Runtime.exceptionThrown":
            self.complaints.append(f"exception: {what['exceptionDetails']['text']}")
        elif event["method"] == "Log.entryAdded":
            self.complaints.append(f"{what['entry']['level']}: {what['entry']['text']}")
        elif event["method"] == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])


class Browser:
    """The running program; a context manager.

    Args:
        program: Of `find_browser`.
        profile: An empty folder for its data.
        timeout_s: For each answer; only a browser that hangs reaches it.
    """

    def __init__(self, program: str, profile: Path, timeout_s: float = 120) -> None:
        self._timeout_s = timeout_s
        self._number, self._buffer, self._pages = 0, b"", dict[str, Page]()
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        shell = 'exec "$0" "$@" 3<&"$IN" 4>&"$OUT"'  # whatever their numbers are here
        self._process = subprocess.Popen(
            ["bash", "-c", shell, program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_read, to_write),
            env={**os.environ, "IN": str(to_read), "OUT": str(to_write)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._write)  # it ends with its pipe
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)

    def open(self, address: str, width: int, height: int = 800) -> Page:
        """Load an address in a window of that size."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        page = Page(self, attached["sessionId"])
        self._pages[page.session] = page
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        page.call("Page.navigate", url=address)
        while page.evaluate("location.href + ' ' + document.readyState") != f"{address} complete":
            time.sleep(0.02)
        return page

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a message and wait for its answer; events in between are heard."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]  # type: ignore[no-any-return]
            if (page := self._pages.get(answer.get("sessionId", ""))) and "method" in answer:
                page.hear(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], self._timeout_s)
            assert ready, f"the browser has said nothing for {self._timeout_s:g} s"
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)  # type: ignore[no-any-return]
