"""The first SIGINT or SIGTERM asks a run to end, the second has its ordinary effect."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

SAME_S = 1.0
"""Signals that follow the first so soon are the same request: timeout(1) sends each twice."""

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class AskedToStop:
    """While entered, the first signal calls ``ask()`` on the loop.

    The handlers found at entry are put back at exit.  Off the main thread, where a program that
    embeds us keeps its own handlers, it does nothing.
    """

    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask = ask
        self._before: dict[int, Any] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._loop = asyncio.get_running_loop()
        for number in _NUMBERS:
            self._before[number] = signal.getsignal(number)
            self._loop.add_signal_handler(number, self._first)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._before.items():
            self._loop.remove_signal_handler(number)
            signal.signal(number, handler)

    def _first(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(SAME_S, self._step_aside)
            self._ask()

    def _step_aside(self) -> None:
        for number in self._before:
            self._loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
