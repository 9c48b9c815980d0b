"""Headless Chromium, driven over its DevTools protocol."""

import base64
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

from tests.processes import Process, wait_until
from tests.servers import unavailable

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--remote-debugging-port=0", "--force-device-scale-factor=1", "--hide-scrollbars"),
)


class Tab:
    """One page of the browser."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        #: What the browser told without being asked: requests, log entries, exceptions.
        self.heard: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._connection.recv(timeout=20))
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.heard.append(message)

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, url: str) -> None:
        self.heard.clear()
        self.call("Page.navigate", url=url)
        wait_until(lambda: self.evaluate("document.readyState") == "complete")

    def text(self, selector: str) -> str:
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))

    def is_visible(self, selector: str) -> bool:
        return bool(self.evaluate(f"document.querySelector({json.dumps(selector)}).checkVisibility()"))

    def color(self, selector: str, name: str = "color") -> tuple[int, ...]:
        value = self.evaluate(f"getComputedStyle(document.querySelector({json.dumps(selector)}))[{json.dumps(name)}]")
        return tuple(int(part) for part in value[value.index("(") + 1 : -1].split(",")[:3])

    def press(self, key: str) -> None:
        codes = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " ")}
        code, text = codes[key]
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=text, windowsVirtualKeyCode=code)

    def prefer(self, scheme: str) -> None:
        """Light or dark."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def requested(self) -> list[str]:
        """The URLs that the page has asked for."""
        self.evaluate("0")
        return [
            message["params"]["request"]["url"]
            for message in self.heard
            if message.get("method") == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[Any]:
        """Exceptions, and what the console shows: violations of the page's policy among it."""
        self.evaluate("0")
        kinds = {
            "Runtime.exceptionThrown",
            "Log.entryAdded",
            "Page.javascriptDialogOpening",
            "Runtime.consoleAPICalled",
        }
        return [message["params"] for message in self.heard if message.get("method") in kinds]


@contextmanager
def chromium() -> Iterator[Tab]:
    """A browser with one page, until the end of the block."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        unavailable("no browser: chromium is not installed")
    assert binary is not None
    with tempfile.TemporaryDirectory(prefix="ae-chromium-", ignore_cleanup_errors=True) as directory:
        profile = Path(directory) / "profile"
        browser = Process(
            [binary, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            log=Path(directory) / "chromium.log",
            env={"HOME": directory},
        )
        try:
            found = browser.wait_for(r"DevTools listening on ws://([\d.]+:\d+)/")
            pages = httpx.get(f"http://{found[1]}/json/list", trust_env=False).json()
            [page] = [page for page in pages if page["type"] == "page"]
            with connect(page["webSocketDebuggerUrl"], max_size=None, proxy=None) as connection:
                yield Tab(connection)
        finally:
            browser.kill()
