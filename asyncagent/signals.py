"""The first SIGINT or SIGTERM asks a run to end, the second has its ordinary effect."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class AskedToStop:
    """While entered, the first signal calls ``ask()`` on the loop.

    The handlers found at entry are put back at exit.  Off the main thread, where a program that
    embeds us keeps its own handlers, it does nothing.
    """

    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask = ask
        self._before: dict[int, Any] = {}

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
        for number, handler in self._before.items():
            self._loop.remove_signal_handler(number)
            signal.signal(number, handler)

    def _first(self) -> None:
        for number in self._before:
            self._loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        self._ask()
