"""Named daemon threads that the event loop awaits.

A blocking call (an engine's ``recv``, a forward pass, an optimiser step) runs on a thread named
for it.  Unlike ``concurrent.futures``, these threads are daemons: a call that never returns
(envpool's ``recv`` has no timeout) cannot keep a dying program alive.
"""

from __future__ import annotations

import asyncio
import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from asyncagent.errors import CallFailed

R = TypeVar("R")


EXIT_S = 1.0
"""Longest the interpreter's exit waits for all threads' calls together."""

_open: weakref.WeakSet[NamedThread] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # An engine's call that outlives the interpreter aborts the process from C++.
    threads = list(_open)
    for thread in threads:
        thread.close()
    deadline_s = time.monotonic() + EXIT_S
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))


class Thread(Protocol):
    """Where calls run: a ``NamedThread``, or what a test puts in its place."""

    def submit(self, call: Callable[[], None]) -> None:
        """Run ``call()`` soon, in the order of submission; RuntimeError once closed."""
        ...


class NamedThread:
    """One daemon thread that runs calls in the order in which they were submitted."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()
        _open.add(self)

    def submit(self, call: Callable[[], None]) -> None:
        """Run ``call()`` on the thread; it must not raise. RuntimeError once closed."""
        if self._closed:
            raise RuntimeError(f"thread {self.name!r} is closed")
        self._calls.put(call)

    def run(self, function: Callable[..., R], *args: Any) -> asyncio.Future[R]:
        """Future of ``function(*args)`` computed on the thread; exceptions come out of the future.

        What a future cannot carry (SystemExit, StopIteration, ...) comes out as CallFailed.

        Cancelling the future does not stop a call that has begun; its result is dropped.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()

        def call() -> None:
            try:
                result = function(*args)
            except BaseException as error:
                failure = deliverable(error, f"a call on thread {self.name!r}")
                wake(loop, _fail, future, failure)
            else:
                wake(loop, _answer, future, result)

        self.submit(call)
        return future

    def close(self) -> None:
        """Let the thread end after the calls already submitted; harmless when repeated."""
        if not self._closed:
            self._closed = True
            self._calls.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end; False if it is still in a call after ``timeout_s``."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # a finished call must not keep its arrays alive until the next one


def wake(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: Any) -> None:
    """Let the loop call ``callback(*args)``; from any thread.

    Nothing happens if the loop has closed: nobody is left to tell.
    """
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise


def deliverable(error: BaseException, whose: str) -> Exception:
    """What a future can carry: StopIteration it refuses, and what is no Exception would end, or
    silently cancel, the waiting task instead of failing it."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    delivered = CallFailed(f"{whose} raised {error!r}")
    delivered.__cause__ = error
    return delivered


def _answer(future: asyncio.Future[R], result: R) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
