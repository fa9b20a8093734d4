"""An event loop whose time is virtual, and threads that compute when a test says so."""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple

R = TypeVar("R")
Args = TypeVarTuple("Args")


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """Time stands still while anything can run, then jumps to the next timer.

    Where all tasks wait and no timer is set, it raises instead of waiting for ever: nothing from
    outside (a thread, a socket) is expected to wake it.
    """

    def __init__(self) -> None:
        self._now_s = 1000.0
        self.early_s = 0.0
        """Timers ring this much too early, as those of a loop with a coarse clock do."""
        self.timers = 0
        """Timers set until now."""
        super().__init__(_JumpingSelector(self._jump))

    def time(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def call_at(
        self,
        when: float,
        callback: Callable[[*Args], object],
        *args: *Args,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Count the timer."""
        self.timers += 1
        return super().call_at(when - self.early_s, callback, *args, context=context)

    def _jump(self, seconds: float | None) -> None:
        if seconds is None:
            raise RuntimeError("every task waits and no timer is set: this would hang")
        self._now_s += seconds


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, jump: Callable[[float | None], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if not events and timeout != 0:
            self._jump(timeout)
        return events


def run_virtual(main: Coroutine[Any, Any, R]) -> R:
    """``asyncio.run`` on a virtual clock, with asyncio's debug checks.

    An exception that would only be logged (in a callback, or in a future nobody awaited) is an
    AssertionError here.
    """
    problems: list[dict[str, Any]] = []
    with asyncio.Runner(debug=True, loop_factory=VirtualClockLoop) as runner:
        runner.get_loop().set_exception_handler(lambda _, problem: problems.append(problem))
        result = runner.run(main)
    assert not problems, problems
    return result


async def turns(count: int = 5) -> None:
    """Let everything that is ready run, ``count`` times; no time passes."""
    for _ in range(count):
        await asyncio.sleep(0)


class InlineThread:
    """In place of a ``NamedThread``: computes at once, on the event loop."""

    def submit(self, call: Callable[[], None]) -> None:
        """Run ``call()`` now."""
        call()


class HeldThread:
    """In place of a ``NamedThread``: computes when ``release`` is called."""

    def __init__(self) -> None:
        self.held: deque[Callable[[], None]] = deque()

    def submit(self, call: Callable[[], None]) -> None:
        """Keep ``call`` until ``release``."""
        self.held.append(call)

    def release(self) -> None:
        """Run the oldest call that is held; IndexError if none is."""
        self.held.popleft()()
