"""The watchdog: what stops moving, or dies, ends the program instead of stalling it in silence.

A task looks once a second whether every component has moved.  A thread looks whether the event
loop still turns, and ends the program where it does not: nothing else could.  Both count their own
ticks, not the clock's seconds, so a program that was suspended has not stalled.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from asyncagent.diagnosis import describe_tasks, describe_threads
from asyncagent.errors import CallFailed, Stalled
from asyncagent.tasks import cancel
from asyncagent.threads import NamedThread, told_of_deaths, wake

R = TypeVar("R")

FAILED = 1
"""Exit status of a program that could not end in good order."""
STALLED = 3
"""Exit status of a program that has stalled."""
LEAVE_S = 10.0
"""Longest that a program that has stalled or lost a task may take to end by itself."""
HELD_UP_S = 30.0
"""The loop may be held up for so long, whatever the timeout: it loads modules, makes networks."""
REPORT_S = 5.0
"""Longest that the report of a stall may take: where it is written may hang, too."""

_log = logging.getLogger(__name__)


class Component(NamedTuple):
    """What can be seen of a part of the program."""

    last: str
    """What it did last, in words."""
    moves: object
    """Another whenever it has moved."""
    idle: bool = False
    """It has nothing to do just now."""
    vital: bool = True
    """The program ends if it stands still; else there is a warning."""


Survey = Callable[[], dict[str, Component]]


def of_thread(thread: NamedThread) -> Component:
    """A thread, which moves from call to call."""
    return Component(f"call {thread.num_done:,}", thread.num_done, thread.num_pending == 0)


class Watchdog:
    """Entered on a running event loop, it watches over the loop until it is left.

    Callbacks of the loop that raise, and named threads that do, end what is being watched.
    """

    def __init__(
        self, stall_timeout_s: float, path: Path | None = None,
        leave: Callable[[int], object] = os._exit,
    ) -> None:  # fmt: skip
        """
        Args:
          path: file for the report of a stall, which also goes to stderr.
          leave: called, on a thread, with the exit status where the loop cannot end the program.
        """
        self.stall_timeout_s = stall_timeout_s
        """May be changed."""
        self._path = path
        self._leave = leave
        self._tick_s = min(1.0, stall_timeout_s / 4)
        self._situation: Callable[[], str] = str
        self._seen: dict[str, Component] = {}
        self._since_s: dict[str, float] = {}
        """Since it moved."""
        self._still_s: dict[str, float] = {}
        """Since it moved, or had nothing to do."""
        self._turns = 0
        self._left_s: tuple[float, int, str] | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._died: asyncio.Future[BaseException] = self._loop.create_future()
        self._handler_before = self._loop.get_exception_handler()
        self._loop.set_exception_handler(self._on_callback)
        self._mourning = told_of_deaths(self._on_thread)
        self._mourning.__enter__()
        self._turn()
        threading.Thread(target=self._guard, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self._ended.set()
        self._turning.cancel()
        self._mourning.__exit__(None, None, None)
        self._loop.set_exception_handler(self._handler_before)

    async def watch(self, survey: Survey, situation: Callable[[], str] = str) -> None:
        """Look, for ever, at what ``survey`` shows.

        One dead component starves the others: the one that stopped first is to blame.

        Args:
          situation: what else helps to find the cause, in one line.

        Raises:
          Stalled: one has stood still too long.  The report has been written.
          BaseException: what killed a callback of the loop, or a thread.
        """
        self._situation = situation
        self._seen = survey()
        self._since_s = dict.fromkeys(self._seen, 0.0)
        self._still_s = dict.fromkeys(self._seen, 0.0)
        while True:
            await asyncio.wait({self._died}, timeout=self._tick_s)
            if self._died.done():
                self.leave_within(LEAVE_S, FAILED, "what was left did not end")
                raise self._died.result()
            self._count(survey())
            late = [name for name, s in self._still_s.items() if s > self.stall_timeout_s]
            vital = [name for name in late if self._seen[name].vital]
            for name in {*late} - {*vital}:
                _log.warning("%s: %s was the last of it", self._stood(name), self._seen[name].last)
                self._still_s[name] = 0.0  # and again, after as long a time
            if vital:
                why = f"{self._stood(vital[0])} (see --stall_timeout_s); {self._now()}"
                self.leave_within(LEAVE_S, STALLED, "what was left did not end")
                self._report(why)
                raise Stalled(why if self._path is None else f"{why}; stacks are in {self._path}")

    async def during(self, work: Coroutine[Any, Any, R], survey: Survey) -> R:
        """The result of ``work``; raises what it does, or ``watch``, whatever comes first."""
        working, watching = asyncio.create_task(work), asyncio.create_task(self.watch(survey))
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                watching.result()
            return await working
        finally:
            await cancel(working, watching)

    def leave_within(self, seconds: float, status: int, why: str) -> None:
        """Unless the watchdog is left by then, end the program; from any thread.

        Of several calls the earliest end counts.
        """
        if self._left_s is None or seconds < self._left_s[0]:
            self._left_s = (seconds, status, why)

    def _count(self, now: dict[str, Component]) -> None:
        for name, component in now.items():
            moved = name not in self._seen or component.moves != self._seen[name].moves
            since_s, still_s = self._since_s.get(name, 0.0), self._still_s.get(name, 0.0)
            self._since_s[name] = 0.0 if moved else since_s + self._tick_s
            self._still_s[name] = 0.0 if moved or component.idle else still_s + self._tick_s
        self._seen = now

    def _stood(self, name: str) -> str:
        return f"{name} has not moved for {self._since_s[name]:.0f} s"

    # What dies.

    def _on_thread(self, name: str, error: BaseException) -> None:
        failure = CallFailed(f"thread {name!r} died of {error!r}")
        failure.__cause__ = error
        wake(self._loop, self._die, failure)

    def _on_callback(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        error = context.get("exception")
        if error is not None and "handle" in context:
            self._die(error)

    def _die(self, error: BaseException) -> None:
        if not self._died.done():
            self._died.set_result(error)

    # The thread.

    def _turn(self) -> None:
        self._turns += 1
        self._turning = self._loop.call_later(self._tick_s, self._turn)

    def _guard(self) -> None:
        turns, blocked_s = 0, 0.0
        while not self._ended.wait(self._tick_s):
            blocked_s = blocked_s + self._tick_s if self._turns == turns else 0.0
            turns = self._turns
            if blocked_s > max(self.stall_timeout_s, HELD_UP_S):
                why = f"the event loop has been held up for {blocked_s:.0f} s (--stall_timeout_s)"
                self._report(why, blocked_s)
                self._leave(STALLED)
                return
            if self._left_s is not None:
                left_s, status, why = self._left_s
                self._left_s = (left_s - self._tick_s, status, why)
                if left_s < 0:
                    self._report(why, blocked_s)
                    self._leave(status)
                    return

    def _report(self, why: str, blocked_s: float = 0.0) -> None:
        """Say it on stderr and in the file; not longer than REPORT_S."""

        def write() -> None:
            text = self._text(why, blocked_s)
            writers = [threading.Thread(target=self._to_file, args=(text,), daemon=True)]
            writers += [threading.Thread(target=_to_stderr, args=(text,), daemon=True)]
            for writer in writers:
                writer.start()
            for writer in writers:
                writer.join()

        # Sources of the stacks are read from files: even that may hang.
        writing = threading.Thread(target=write, name="stall report", daemon=True)
        writing.start()
        writing.join(REPORT_S)

    def _text(self, why: str, blocked_s: float) -> str:
        lasts = [
            f"  {name}: {component.last}, {self._since_s[name] + blocked_s:.0f} s ago"
            f"{', has nothing to do' if component.idle else ''}"
            for name, component in self._seen.items()
        ]
        return "\n".join(
            [
                f"{why}\nprocess {os.getpid()}, {time.strftime('%F %T %z')}; {self._now()}",
                "What each did last:",
                *lasts,
                describe_tasks(self._loop),
                describe_threads(),
                "",
            ]
        )

    def _now(self) -> str:
        try:
            return self._situation()
        except Exception as error:  # the loop's data, read while the loop is who knows where
            return repr(error)

    def _to_file(self, text: str) -> None:
        if self._path is not None:
            try:
                self._path.write_text(text)
            except OSError as error:
                _to_stderr(f"{self._path}: {error.strerror}\n")


def _to_stderr(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(text)
        sys.stderr.flush()
