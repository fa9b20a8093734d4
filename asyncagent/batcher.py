"""Dynamic batching: many coroutines ask for a few rows each, one call computes them together.

``DynamicBatcher(fn)`` is called with nests of arrays or tensors of n rows and returns a future of
the n rows that belong to them.  ``fn`` runs on a thread of its own with the requests of many
callers concatenated; while it computes, the next batch gathers.  ``batch_fn`` makes a batcher of
a function.  Usable alone: nothing here knows what is computed.

Threads.  Requests, futures, counters and every decision live on the event loop's thread.  The
batcher's thread sees only a ``Batch`` that the loop has let go of, and hands its outcome back in
one ``call_soon_threadsafe``.  A batch that ``close`` (or a new event loop) has taken in the
meantime is recognised by ``batch is not self._in_flight``, so answering has no race to lose.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from asyncagent.batch import Batch, FlushRule, Form, Future, Nest, Request, Statistics, Tally
from asyncagent.errors import BadBatch, BatcherClosed
from asyncagent.threads import NamedThread, Thread, deliverable, wake
from asyncagent.tracks import WAITS, Track

__all__ = [
    "Batch",
    "Caller",
    "DynamicBatcher",
    "FlushRule",
    "Nest",
    "Statistics",
    "Thread",
    "batch_fn",
    "batch_fn_with_options",
]


class DynamicBatcher:
    """Computes the requests of many coroutines together.

    ``await batcher(*nests)`` gives the caller's own rows of ``fn(*batched_nests)``.  A batch is
    taken when none is computing and (a) ``minimum_batch_size`` rows wait, (b) the oldest request
    has waited ``timeout_ms``, or (c) every registered caller waits (see ``register``).  This is
    looked at once per turn of the event loop, so that callers woken together share a batch, and
    whenever a batch ends.  Requests are taken whole, first come first served.

    Everything except ``close`` belongs to the event loop of the first request; once that loop is
    closed the next one may use the batcher, and requests left behind are dropped.  A cancelled
    request is not computed unless its batch has been taken; what it holds is let go of when the
    next batch is taken or ``statistics`` is read.
    """

    def __init__(
        self,
        fn: Callable[..., Nest],
        minimum_batch_size: int = 1,
        maximum_batch_size: int = 1024,
        timeout_ms: float = 100,
        *,
        name: str = "inference",
        thread: Thread | None = None,
        clock: Callable[[], float] = time.perf_counter,
        track: Track | None = None,
    ) -> None:
        """Nothing is started before the first request.

        Args:
          fn: function of nests with N rows in every leaf, to a nest with N rows in every leaf.
            It must not write to its arguments, which may be a caller's own, nor later to its
            results: callers keep views of them.
          minimum_batch_size: rows that are worth a batch, in [1, maximum_batch_size].
          maximum_batch_size: no batch, hence no request, has more rows.
          timeout_ms: longest time in milliseconds that a request waits for others, >= 0.
          name: of the thread and in messages.
          thread: where ``fn`` runs; None makes a thread, which ``close`` ends.
          clock: seconds, for ``statistics`` only; deadlines go by the event loop's clock.
          track: of three states, told what the thread does.

        Raises:
          ValueError: an option is out of range.
        """
        if not 1 <= minimum_batch_size <= maximum_batch_size:
            raise ValueError(
                f"{minimum_batch_size=} must be in [1, maximum_batch_size={maximum_batch_size}]: "
                "a batch of at least the minimum must be possible"
            )
        if not 0 <= timeout_ms < float("inf"):
            raise ValueError(f"{timeout_ms=} must be >= 0 and finite: else a request may starve")
        self.name = name
        self._fn = fn
        self._track = track or Track(3, clock)
        self._rule = FlushRule(minimum_batch_size, timeout_ms / 1000)
        self._maximum = maximum_batch_size
        self._clock = clock
        self._tally = Tally(maximum_batch_size, clock)
        self._thread = thread
        self._own_thread: NamedThread | None = None
        self._closed = False
        self._callers = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._form: Form | None = None
        self._form_proven = False  # a batch of this form has succeeded
        self._forget()

    def _forget(self) -> None:
        self._pending: list[Request] = []
        self._pending_rows = 0
        self._in_flight: Batch | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._look_scheduled = False

    # Asking.

    def __call__(self, *args: Nest) -> Future:
        """Future of this request's rows of ``fn``; may be cancelled at any time.

        Args:
          args: nests of arrays or tensors, all with the same number of rows; in everything but
            the number of rows they must look like the first request's.  Not to be written to
            before the answer is there.

        Raises:
          BadBatch: the request is malformed; nobody else is concerned.  Comes out of the future
            if ``fn`` did not answer with one row per row.
          BatcherClosed: also out of the future, if the batcher is closed before the answer.
          RuntimeError: no event loop is running, or another than the first request's.
          CallFailed: out of the future, if ``fn`` raised what a future cannot carry
            (SystemExit, StopIteration, ...).  Every other exception of ``fn`` comes out as it is.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._bind(loop)
        form = self._form
        if form is None or (request := form.match(args)) is None:
            request = self._admit(args)
        rows, leaves = request
        if not 1 <= rows <= self._maximum:
            raise BadBatch(
                f"{self.name}: a request of {rows} rows; must be in [1, {self._maximum}]"
            )
        future = loop.create_future()
        self._pending.append(Request(future, rows, loop.time(), leaves))
        self._pending_rows += rows
        if not self._look_scheduled and self._in_flight is None:
            self._look_scheduled = True
            loop.call_soon(self._look, loop)
        return future

    infer = __call__

    def register(self) -> Caller:
        """Announce a caller; closing (or leaving) the handle takes it back.

        A registered caller makes one request at a time.  Once as many requests wait as callers
        are registered, nobody is left to wait for and the batch is taken at once.  Requests
        beyond those of the registered callers make batches leave earlier, never later.
        """
        return Caller(self)

    def statistics(self) -> Statistics:
        """What has been done until now."""
        self._drop_departed()
        return self._tally.statistics(len(self._pending), self._pending_rows)

    @property
    def busy(self) -> bool:
        """Whether requests wait or are being computed."""
        return bool(self._pending) or self._in_flight is not None

    # Closing.

    def close(self) -> None:
        """Fail every waiter, queued or in flight, with BatcherClosed; harmless when repeated.

        From any thread.  Does not wait for a call of ``fn`` that has begun: see ``join``.
        """
        self._close("was closed")

    def _close(self, what_happened: str) -> None:
        if self._closed:
            return
        self._closed = True
        error = BatcherClosed(f"the batcher {self.name!r} {what_happened}")
        if self._own_thread is not None:
            self._own_thread.close()
        loop, self._loop = self._loop, None  # from now on requests end in _bind, which refuses
        if loop is None or loop.is_closed():
            self._forget()
        elif not loop.is_running() or loop is _running_loop():
            self._fail_all(error)
        else:
            loop.call_soon_threadsafe(self._fail_all, error)

    def join(self, timeout_s: float) -> bool:
        """After ``close``: wait for the batcher's own thread; False if ``fn`` still computes."""
        return self._own_thread is None or self._own_thread.join(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def _fail_all(self, error: BatcherClosed) -> None:
        pending, in_flight = self._pending, self._in_flight
        self._stop_timer()
        self._forget()
        if in_flight is not None:
            in_flight.fail(error)
        for request in pending:
            if not request.future.done():
                request.future.set_exception(error)

    # First and odd requests.

    def _bind(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._closed:
            raise BatcherClosed(f"the batcher {self.name!r} is closed")
        old = self._loop
        if old is not None and not old.is_closed():
            self._drop_departed()
            if old.is_running() or self._pending or self._in_flight is not None:
                raise RuntimeError(f"the batcher {self.name!r} is in use by another event loop")
        self._forget()
        self._loop = loop
        if self._thread is None:
            self._own_thread = NamedThread(self.name)
            self._thread = self._own_thread
            weakref.finalize(self, self._own_thread.close)  # dropped without close: no thread stays
        self._tally.open()

    def _admit(self, args: tuple[Nest, ...]) -> tuple[int, Sequence[Any]]:
        """A request that does not match: give its form to the batcher, or raise BadBatch."""
        try:
            form, rows, leaves = Form.of(args)
        except BadBatch as error:
            raise BadBatch(f"{self.name}: {error}") from None
        # What nobody relies on is replaced: a malformed first request spoils nothing.
        self._drop_departed()
        free = not (self._form_proven or self._pending or self._in_flight)
        if self._form is None or free:
            self._form = form
        elif form != self._form:
            raise BadBatch(f"{self.name}: a request of {form}; the others are of {self._form}")
        return rows, leaves

    # Deciding.

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """The turn of the loop after a request."""
        if loop is self._loop:  # else closed meanwhile
            self._look_scheduled = False
            self._flush_if_due(loop, loop.time())

    def _ring(self, loop: asyncio.AbstractEventLoop, deadline_s: float) -> None:
        """The timer. Loops round: it may be up to a millisecond early, and is right then, too."""
        if loop is self._loop:
            self._timer = None
            self._flush_if_due(loop, max(deadline_s, loop.time()))

    def _flush_if_due(self, loop: asyncio.AbstractEventLoop, now_s: float) -> None:
        while self._pending:
            oldest_s = self._pending[0].made_s
            if not self._rule.due(
                rows=self._pending_rows,
                oldest_s=oldest_s,
                now_s=now_s,
                requests=len(self._pending),
                callers=self._callers,
                computing=self._in_flight is not None,
            ):
                if self._timer is None and self._in_flight is None:
                    deadline_s = self._rule.deadline_s(oldest_s)
                    self._timer = loop.call_at(deadline_s, self._ring, loop, deadline_s)
                return
            # Departed requests only make less due, so to count them out here is soon enough.
            if not self._drop_departed():
                self._start(loop)
                return

    def _drop_departed(self) -> bool:
        """Forget the cancelled; whether there were any.

        The timer stays: it rings no later than who stayed needs it, and looks again then.
        """
        stayed = [request for request in self._pending if not request.future.done()]
        if len(stayed) == len(self._pending):
            return False
        self._pending = stayed
        self._pending_rows = sum(request.rows for request in stayed)
        return True

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Computing.

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._form is not None and self._thread is not None
        self._stop_timer()
        batch = Batch(self._take(), self._form)
        self._in_flight = batch
        self._tally.batch_began()
        try:
            self._thread.submit(functools.partial(self._compute, loop, batch))
        except RuntimeError:
            self._close("lost its thread: somebody closed it")

    def _take(self) -> Sequence[Request]:
        """The longest row of whole requests, oldest first, that fits; at least one always does."""
        taken = self._pending
        if self._pending_rows <= self._maximum:
            self._pending, self._pending_rows = [], 0
            return taken
        ends = itertools.accumulate(request.rows for request in taken)
        fitting = list(itertools.takewhile(self._maximum.__ge__, ends))
        self._pending = taken[len(fitting) :]
        self._pending_rows -= fitting[-1]
        return taken[: len(fitting)]

    def _compute(self, loop: asyncio.AbstractEventLoop, batch: Batch) -> None:
        """On the batcher's thread."""
        started_s = self._clock()
        results: Sequence[Nest] = ()
        failure: Exception | None = None
        try:
            results = batch.compute(self._fn, self._track)
        except BaseException as error:
            failure = deliverable(error, "the batched function")
        self._track.enter(WAITS)
        wake(loop, self._finish, loop, batch, results, failure, self._clock() - started_s)

    def _finish(
        self,
        loop: asyncio.AbstractEventLoop,
        batch: Batch,
        results: Sequence[Nest],
        failure: Exception | None,
        seconds: float,
    ) -> None:
        if batch is not self._in_flight:
            return  # closed meanwhile: its waiters have been told
        self._in_flight = None
        self._tally.batch_ended(batch, seconds)
        self._form_proven = self._form_proven or failure is None
        # First the next batch: the thread need not idle while the answers are handed out.
        if loop is self._loop:  # else closed by another thread a moment ago
            self._flush_if_due(loop, loop.time())
        if failure is None:
            batch.answer(results)
        else:
            batch.fail(failure)


class Caller:
    """One registered caller of a batcher: a context manager, or closed by hand."""

    def __init__(self, batcher: DynamicBatcher) -> None:
        self._batcher: DynamicBatcher | None = batcher
        batcher._callers += 1

    def close(self) -> None:
        """The caller asks no more; those who waited for it need not. Harmless when repeated."""
        batcher, self._batcher = self._batcher, None
        if batcher is not None:
            batcher._callers -= 1
            loop = batcher._loop
            if batcher._pending and loop is not None and not loop.is_closed():
                batcher._flush_if_due(loop, loop.time())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()


def batch_fn(fn: Callable[..., Nest]) -> DynamicBatcher:
    """Decorator: ``await fn(*nests)`` is computed together with other callers' requests.

    The function is as ``DynamicBatcher``'s ``fn``, and a function rather than a method.  What
    comes back is a ``DynamicBatcher`` with default options and the function's name and docstring.
    """
    return batch_fn_with_options()(fn)


def batch_fn_with_options(
    minimum_batch_size: int = 1, maximum_batch_size: int = 1024, timeout_ms: float = 100
) -> Callable[[Callable[..., Nest]], DynamicBatcher]:
    """``batch_fn`` with ``DynamicBatcher``'s options; ValueError if one is out of range."""

    def decorate(fn: Callable[..., Nest]) -> DynamicBatcher:
        name = getattr(fn, "__name__", "batch_fn")
        batcher = DynamicBatcher(fn, minimum_batch_size, maximum_batch_size, timeout_ms, name=name)
        functools.update_wrapper(batcher, fn, updated=())
        return batcher

    return decorate


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
