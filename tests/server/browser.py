"""Chromium, driven over its DevTools protocol: no more of it than the page's tests need."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

BINARY = shutil.which("chromium")
SECONDS = 60.0
"""For anything to happen on a machine that is busy."""
_SWITCHES = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
_NOTE_VIOLATIONS = """
window.violations = [];
addEventListener("securitypolicyviolation",
  (event) => violations.push(event.violatedDirective + " " + event.blockedURI));
"""


class Page:
    """One tab."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._asked = 0
        self._session: str | None = None
        self._loaded = 0
        self.complaints: list[str] = []
        """Errors and warnings of the console, exceptions that nobody caught."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        self._call("Page.addScriptToEvaluateOnNewDocument", source=_NOTE_VIOLATIONS)

    def open(self, url: str) -> None:
        """Go there, and wait until it has loaded."""
        before = self._loaded
        self._call("Page.navigate", url=url)
        while self._loaded == before:
            self._note(json.loads(self._connection.recv(timeout=SECONDS)))

    def size(self, width: int, height: int, *, scale: float = 1, phone: bool = False) -> None:
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=phone,
        )

    def prefer(self, **features: str) -> None:
        """Media features, e.g. ``prefers_color_scheme="dark"``."""
        listed = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self._call("Emulation.setEmulatedMedia", features=listed)

    def run(self, script: str) -> Any:
        """The value of an expression; a promise is waited for."""
        answer = self._call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise AssertionError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true."""
        end = time.monotonic() + SECONDS
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise AssertionError(f"never true: {condition}; the page says: {self.text()}")
            time.sleep(0.05)

    def text(self) -> str:
        found: str = self.run("document.body.innerText")
        return found

    def press(self, key: str) -> None:
        code = {"Enter": 13, "Tab": 9}[key]
        facts: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        if key == "Enter":
            facts["text"] = "\r"
        self._call("Input.dispatchKeyEvent", type="keyDown", **facts)
        self._call("Input.dispatchKeyEvent", type="keyUp", **facts)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self._call("Input.insertText", text=text)

    def picture(self, height: int | None = None) -> bytes:
        """PNG of the page from its top: the whole of it, or so many pixels."""
        width, whole = self.run("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height or whole, "scale": 1}
        answer = self._call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    def _call(self, method: str, **parameters: Any) -> Any:
        self._asked += 1
        message: dict[str, Any] = {"id": self._asked, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._connection.send(json.dumps(message))
        while True:
            answer = json.loads(self._connection.recv(timeout=SECONDS))
            if answer.get("id") == self._asked:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _note(self, event: Any) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Page.loadEventFired":
            self._loaded += 1
        elif event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded":
            self.complaints.append(
                f"{parameters['entry']['source']}: {parameters['entry']['text']}"
            )
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.complaints.append(f"console: {parameters['args']}")


@contextmanager
def browsing() -> Iterator[Page]:
    """A fresh profile and one tab."""
    assert BINARY is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        errors = Path(profile) / "stderr"
        with errors.open("wb") as log:
            command = [BINARY, *_SWITCHES, f"--user-data-dir={profile}/profile", "about:blank"]
            process = subprocess.Popen(command, stderr=log, stdout=subprocess.DEVNULL)
        try:
            with connect(_address(errors, process), max_size=None) as connection:
                yield Page(connection)
        finally:
            process.terminate()
            process.wait(30)


def _address(errors: Path, process: subprocess.Popen[bytes]) -> str:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        found = re.search(r"DevTools listening on (ws://\S+)", errors.read_text("utf-8", "replace"))
        if found:
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"Chromium did not start: {errors.read_text('utf-8', 'replace')[-2000:]}")
