"""A headless Chromium that tests drive over a pipe, in the words of the Chrome DevTools Protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page of a browser; a context manager. It reads commands from descriptor 3 and answers on 4."""

    def __init__(self) -> None:
        assert CHROMIUM is not None
        self._profile = tempfile.mkdtemp(prefix="streamnorm-chromium-")
        there, self._write = os.pipe()
        self._read, back = os.pipe()

        def give_pipes() -> None:
            os.dup2(there, 13)  # out of the way of 3 and 4, wherever the pipes came to lie
            os.dup2(back, 14)
            os.dup2(13, 3)
            os.dup2(14, 4)

        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        options += ["--disable-dev-shm-usage", f"--user-data-dir={self._profile}", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            [CHROMIUM, *options, "about:blank"],
            preexec_fn=give_pipes,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there)
        os.close(back)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.errors: list[str] = []
        """What scripts of the page raised or complained about."""
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")
        self.requests: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._buffer += part
        text, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        details = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            thrown = details["exceptionDetails"]
            self.errors.append(thrown.get("exception", {}).get("description", thrown["text"]))
        elif message.get("method") == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning"):
            self.errors.append(str(details["args"]))
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])
        return message

    def look(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Set the size of the window, and whether the reader prefers dark pages."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def open(self, path: Path, hash: str = "") -> None:
        """Open a file, and wait until it is drawn."""
        self.call("Page.navigate", url="about:blank")
        self.wait("location.protocol === 'about:'")  # a busy browser may show the page before for a while
        self.call("Page.navigate", url=path.resolve().as_uri() + hash)
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def wait(self, expression: str, seconds: float = 20.0) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                if self.value(expression):
                    return
            except RuntimeError:  # between two documents there is none to ask
                pass
            time.sleep(0.05)
        raise AssertionError(f"still not true after {seconds} s: {expression}")

    def value(self, expression: str) -> Any:
        """What an expression is in the page, as JSON."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def click(self, selector: str) -> None:
        """Click in the middle of an element."""
        self._point(selector, "mousePressed", button="left", clickCount=1)
        self._point(selector, "mouseReleased", button="left", clickCount=1)

    def hover(self, selector: str) -> None:
        """Move the mouse to the middle of an element; a page that has just moved misses the first time."""
        over = f"document.querySelector({json.dumps(selector)}).matches(':hover')"
        for _ in range(50):
            self._point(selector, "mouseMoved")
            if self.value(over):
                break
            time.sleep(0.05)
        self._point(selector, "mouseMoved")

    def _point(self, selector: str, kind: str, **more: Any) -> None:
        middle = "(e => { e.scrollIntoView({block: 'nearest'}); const b = e.getBoundingClientRect(); "
        middle += "return [b.x + b.width / 2, b.y + b.height / 2]; })"
        x, y = self.value(f"{middle}(document.querySelector({json.dumps(selector)}))")
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def screenshot(self, path: Path) -> None:
        """A picture of the whole page."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._write)
        os.close(self._read)
        self._process.terminate()
        self._process.wait(10)
        shutil.rmtree(self._profile, ignore_errors=True)
