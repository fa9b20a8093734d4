"""Named daemon threads that the event loop awaits.

A blocking call (an engine's ``recv``, a forward pass, an optimiser step) runs on a thread named
for it.  Unlike ``concurrent.futures``, these threads are daemons: a call that never returns
(envpool's ``recv`` has no timeout) cannot keep a dying program alive.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias, TypeVar

from asyncagent.errors import CallFailed

R = TypeVar("R")


EXIT_S = 1.0
"""Longest the interpreter's exit waits for all threads' calls together."""

Death: TypeAlias = Callable[[str, BaseException], None]
"""(name of the thread, what killed it); called on the dying thread."""

_open: weakref.WeakSet[NamedThread] = weakref.WeakSet()
_told_of_deaths: list[Death] = []


@atexit.register
def _close_all() -> None:
    # An engine's call that outlives the interpreter aborts the process from C++.
    threads = list(_open)
    for thread in threads:
        thread.close()
    deadline_s = time.monotonic() + EXIT_S
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))


@contextlib.contextmanager
def told_of_deaths(tell: Death) -> Iterator[None]:
    """Within it, ``tell`` is called when a call ends a thread by an exception, in any run."""
    _told_of_deaths.append(tell)
    try:
        yield
    finally:
        _told_of_deaths.remove(tell)


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
        self._num_submitted = 0
        self.num_done = 0
        """Calls that have ended."""
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()
        _open.add(self)

    def submit(self, call: Callable[[], None]) -> None:
        """Run ``call()`` on the thread; RuntimeError once closed.

        It must not raise: that ends the thread, of which ``told_of_deaths`` tells.
        """
        if self._closed:
            raise RuntimeError(f"thread {self.name!r} is closed")
        self._num_submitted += 1
        self._calls.put(call)

    @property
    def num_pending(self) -> int:
        """Calls submitted that have not ended; those on other threads may miss the newest."""
        return self._num_submitted - self.num_done

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
        try:
            while (call := self._calls.get()) is not None:
                call()
                del call  # a finished call must not keep its arrays alive until the next one
                self.num_done += 1
        except BaseException as error:
            self._closed = True  # what comes now would wait for ever
            for tell in [*_told_of_deaths]:
                tell(self.name, error)
            raise  # to threading.excepthook, which shows it


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
