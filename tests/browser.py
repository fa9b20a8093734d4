"""Debian's Chromium without a screen, spoken to through a pipe: what a page shows, and a picture.

TensorBoard draws late, and much of it within shadow trees that a saved page leaves out.  So the
browser stays, and is asked again and again what there is to read.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
WAIT_S = 300.0
"""Longest that a page may take to show what it should."""

# All text of a page, shadow trees and what is only reached by scrolling included.  Without spaces:
# names are put together from parts, with any number of spaces between them.
_READ = """
(() => {
  const found = [];
  const walk = (node) => {
    if (node.nodeType === Node.TEXT_NODE) { found.push(node.data); return; }
    if (["STYLE", "SCRIPT", "NOSCRIPT", "TEMPLATE"].includes(node.nodeName)) return;
    if (node.shadowRoot) walk(node.shadowRoot);
    for (const child of node.childNodes) walk(child);
  };
  walk(document);
  return found.join("").replace(/\\s+/g, "");
})()
"""
# Widths of all pictures that have been loaded.
PICTURES = """
(() => {
  const found = [];
  const walk = (node) => {
    if (node.nodeName === "IMG" && node.complete) found.push(node.naturalWidth);
    if (node.shadowRoot) walk(node.shadowRoot);
    for (const child of node.childNodes) walk(child);
  };
  walk(document);
  return found;
})()
"""


class Browser:
    """One page; use ``opened``."""

    def __init__(self, process: int, reading: int, writing: int) -> None:
        self._process = process
        self._reading = reading
        self._writing = writing
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.errors: list[str] = []
        """Exceptions of the pages' scripts that nobody caught."""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self._ask("Runtime.enable")
        self._ask("Page.enable")

    def go(self, url: str) -> None:
        """Load a page anew, whatever was shown before."""
        self._ask("Page.navigate", url="about:blank")
        self._ask("Page.navigate", url=url)

    def wait_for(self, words: Sequence[str]) -> str:
        """The page's text, once it has all the words; AssertionError if that takes too long.

        Spaces do not count, and are not in the text.
        """
        deadline_s = time.monotonic() + WAIT_S
        while True:
            text: str = self.evaluate(_READ)
            missing = [word for word in words if "".join(word.split()) not in text]
            if not missing:
                return text
            assert time.monotonic() < deadline_s, f"{missing} not on the page: {text[-3000:]}"
            self._pump(0.2)

    def rest(self, seconds: float) -> None:
        """Let the page draw; shorter where it has something to say."""
        self._pump(seconds)

    def wait_until(self, expression: str) -> None:
        """Wait until a script's expression is true; AssertionError if that takes too long."""
        deadline_s = time.monotonic() + WAIT_S
        while not self.evaluate(expression):
            assert time.monotonic() < deadline_s, f"still not: {expression}"
            self._pump(0.2)

    def evaluate(self, expression: str) -> Any:
        """Of a script's expression, its value."""
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write what is seen now as a PNG."""
        # Two frames, so that what was changed last has been painted.
        script = "new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))"
        self._ask("Runtime.evaluate", expression=script, awaitPromise=True)
        answer = self._ask("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            for answer in self._pump(1.0):
                if answer.get("id") == self._number:
                    assert "result" in answer, answer
                    result: dict[str, Any] = answer["result"]
                    return result
        raise AssertionError(f"no answer to {method}")

    def _pump(self, wait_s: float) -> list[dict[str, Any]]:
        """What has come; of nothing, after ``wait_s`` at most."""
        if not select.select([self._reading], [], [], wait_s)[0]:
            return []
        data = os.read(self._reading, 1 << 20)
        assert data, "the browser has ended"
        *messages, self._rest = (self._rest + data).split(b"\0")
        answers = [json.loads(message) for message in messages]
        self.errors += [
            json.dumps(answer["params"]["exceptionDetails"])
            for answer in answers
            if answer.get("method") == "Runtime.exceptionThrown"
        ]
        return answers


@contextlib.contextmanager
def opened(folder: Path, width: int = 1700, height: int = 1000) -> Iterator[Browser]:
    """A browser that keeps its files in ``folder``."""
    assert CHROMIUM is not None
    theirs, writing = os.pipe()
    reading, answers = os.pipe()
    # It reads descriptor 3 and writes 4; here these may be any of the four.
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs, answers)]
    log = os.open(folder / "chromium.log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    process = os.posix_spawn(
        CHROMIUM,
        [
            *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-3d-apis"),
            *("--remote-debugging-pipe", "--no-first-run", "--hide-scrollbars"),
            *(f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"),
            "about:blank",
        ],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, high[0], 3),
            (os.POSIX_SPAWN_DUP2, high[1], 4),
            (os.POSIX_SPAWN_DUP2, log, 1),
            (os.POSIX_SPAWN_DUP2, log, 2),
        ],
        setpgroup=0,
    )
    for end in (theirs, answers, log, *high):
        os.close(end)
    try:
        yield Browser(process, reading, writing)
    finally:
        os.close(writing)
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
