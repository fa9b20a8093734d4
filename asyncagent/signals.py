"""The first SIGINT or SIGTERM asks a run to end, the second ends it at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from asyncagent.threads import wake

SAME_S = 1.0
"""Signals that follow the first so soon are the same request: timeout(1) sends each twice."""

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class AskedToStop:
    """While entered, the first signal calls ``ask()`` on the loop; the second ends the process.

    A thread hears of them, so that the second is obeyed also where the loop is held up.  The
    handlers found at entry are put back at exit.  Off the main thread, where a program that embeds
    us keeps its own handlers, it does nothing.
    """

    def __init__(
        self, ask: Callable[[], None], at_once: Callable[[], None] = lambda: None,
        leave: Callable[[int], object] = os._exit,
    ) -> None:  # fmt: skip
        """
        Args:
          at_once: called with the first signal, too, but on a thread, whatever the loop is at.
          leave: called, on a thread, with the exit status that shells show for the second signal.
        """
        self._ask = ask
        self._at_once = at_once
        self._leave = leave
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._loop = asyncio.get_running_loop()
        self._heard, self._told = os.pipe()
        os.set_blocking(self._told, False)
        self._told_before = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        for number in _NUMBERS:
            self._before[number] = signal.signal(number, _nothing)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._told_before)
        os.close(self._told)
        self._thread.join()
        os.close(self._heard)

    def _listen(self) -> None:
        asked_s: float | None = None
        while numbers := os.read(self._heard, 64):
            for number in numbers:
                if number not in _NUMBERS:
                    with contextlib.suppress(OSError):  # another's, if there is another
                        os.write(self._told_before, bytes((number,)))
                elif asked_s is None:
                    asked_s = time.monotonic()
                    self._at_once()
                    wake(self._loop, self._ask)
                elif time.monotonic() - asked_s > SAME_S:
                    self._leave(128 + number)


@contextlib.contextmanager
def tidy_end() -> Iterator[None]:
    """Within it SIGTERM unwinds the main thread as Ctrl-C does, so that nothing stays behind."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _nothing(number: int, frame: FrameType | None) -> None:
    """Signals with a handler of Python's are written to the pipe."""
