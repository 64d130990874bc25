"""Pages in Chromium, through its debugging protocol: their size, colours, controls and downloads."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run --hide-scrollbars"
    " --disable-background-networking --disable-component-update --disable-sync --remote-debugging-pipe"
)
# The browser reads commands from file descriptor 3 and writes answers to 4.
LAUNCHER = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
TIME_LIMIT = 600  # seconds for one answer: against a browser that hangs, not for a slow machine
MESSAGES = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")


class Browser:
    """A headless Chromium that shows pages from files; see the Chrome DevTools Protocol for its methods."""

    def __init__(self, folder: Path):
        self.folder, self.downloads = folder, folder / "downloads"
        self.events: list[dict[str, Any]] = []
        self._buffer, self._last_id = b"", 0
        to_browser, from_browser = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in (to_browser[0], from_browser[1])]
        self._write, self._read = to_browser[1], from_browser[0]
        command = [sys.executable, "-c", LAUNCHER, *map(str, ends), CHROMIUM, *FLAGS.split()]
        with open(folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                [*command, f"--user-data-dir={folder / 'profile'}"], pass_fds=ends, stdout=log, stderr=log
            )
        for fd in (*ends, to_browser[0], from_browser[1]):
            os.close(fd)
        behaviour = {"behavior": "allow", "downloadPath": str(self.downloads), "eventsEnabled": True}
        self.call("Browser.setDownloadBehavior", **behaviour)

    def close(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            self.call("Browser.close")
        os.close(self._write)
        os.close(self._read)
        self._process.wait()

    def _next(self) -> dict[str, Any]:
        """The next message of the browser."""
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], TIME_LIMIT)[0]:
                raise TimeoutError((self.folder / "log").read_text(errors="replace"))
            part = os.read(self._read, 1 << 20)
            if not part:
                raise EOFError((self.folder / "log").read_text(errors="replace"))
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of a method; events that come before it are kept."""
        self._last_id += 1
        command = {"id": self._last_id, "method": method, "params": parameters}
        os.write(self._write, json.dumps(command | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self._last_id:
                assert "error" not in message, message["error"]
                return message["result"]
            self.events.append(message)

    def wait(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The parameters of the next event with some of these parameters, which is removed."""
        position = 0
        while True:
            if position == len(self.events):
                self.events.append(self._next())
            event = self.events[position]
            if event.get("method") == method and parameters.items() <= event["params"].items():
                return self.events.pop(position)["params"]
            position += 1

    def open(self, text: str, *, width: int = 1280, dark: bool = False, media: str = "screen") -> Page:
        """Shows a page from a file. Raises AssertionError if it logs a message while it loads."""
        path = self.folder / "page.html"
        path.write_text(text, encoding="utf-8")
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.call("Page.navigate", url=path.as_uri())
        self.wait("Page.loadEventFired")
        page.assert_silent()
        return page


class Page:
    """A page that a browser shows."""

    def __init__(self, browser: Browser, session: str):
        self.browser, self.session = browser, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def evaluate(self, script: str) -> Any:
        """The value that the body of an asynchronous JavaScript function returns."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        result = self.call("Runtime.evaluate", expression=f"(async () => {{{script}}})()", **options)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        self.assert_silent()
        return result["result"].get("value")

    def assert_silent(self) -> None:
        """No script failed, nothing was logged, and the policy of the page blocked nothing."""
        messages = [event for event in self.browser.events if event.get("method") in MESSAGES]
        assert not messages, messages

    def download(self, button: str) -> Path:
        """The file that the browser saves when the mouse clicks a button, which a JavaScript expression gives."""
        position = self.evaluate(f"""
        const button = {button};
        for (let part = button.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
        button.scrollIntoView({{block: "center"}});
        const {{x, y, width, height}} = button.getBoundingClientRect();
        return {{x: x + width / 2, y: y + height / 2}};
        """)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **position)
        name = self.browser.wait("Browser.downloadWillBegin")["suggestedFilename"]
        self.browser.wait("Browser.downloadProgress", state="completed")
        return self.browser.downloads / name


PROBE = """
const found = {folded: document.documentElement.scrollHeight};
for (const part of document.querySelectorAll("details")) part.open = true;
Object.assign(found, {width: innerWidth, scroll: document.documentElement.scrollWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color});
const table = document.getElementById("tensors"), heads = table ? [...table.querySelectorAll("th[aria-sort]")] : [];
if (table) {
const index = heads.findIndex((h) => h.textContent === "parameters");
const column = () => [...table.tBodies[0].rows].map((r) => Number(r.cells[index].dataset.v));
heads[index].querySelector("button").click(); found.down = column();
found.sort = heads[index].getAttribute("aria-sort");
heads[index].querySelector("button").click(); found.up = column();
heads[0].querySelector("button").click(); found.names = [...table.tBodies[0].rows].map((r) => r.cells[0].textContent);
const search = document.querySelector(".filter input");
if (search) { search.value = "layers.1. up"; search.dispatchEvent(new Event("input")); }
found.kept = [...table.tBodies[0].rows].filter((r) => !r.hidden).map((r) => r.cells[0].textContent);
}
const visible = (selector) => [...document.querySelectorAll(selector)].filter((v) => v.getClientRects().length);
const shown = () => visible("#where .view").map((v) => v.className);
found.before = shown(); const stored = document.querySelector('.switch button[value="stored"]');
if (stored) stored.click(); found.after = shown();
const cell = document.querySelector("#where g title");
if (cell) {
cell.parentNode.querySelector("rect").dispatchEvent(new Event("click", {bubbles: true}));
found.tooltip = document.querySelector("#where .tooltip").textContent; found.title = cell.textContent;
}
found.panels = visible(".panel").length;
return found;
"""


def probe(browser: Browser, text: str, width: int, dark: bool = False) -> dict[str, Any]:
    """Size, colours and controls of a page; the size and controls with all parts open."""
    return browser.open(text, width=width, dark=dark).evaluate(PROBE)


def brightness(colour: str) -> float:
    return float(np.mean([int(n) for n in re.findall(r"\d+", colour)[:3]]))
