"""The batcher under any program of requests, cancellations, failures, callers and closes.

An oracle keeps its own list of who waits.  Whenever the batcher takes a batch, the oracle says
which requests it must be made of and whether it was due; whenever everything rests, which futures
must have ended, and how.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncagent.batcher import Caller, DynamicBatcher
from asyncagent.errors import BadBatch, BatcherClosed, CallFailed
from tests.programs import Program, programs, statements_of
from tests.virtual_clock import run_virtual, turns

MAXIMUM = 8
TIMEOUT_S = 0.05
SOON_S = 1e-9


class Options(NamedTuple):
    """Of the batcher."""

    minimum: int
    callers: int
    """Registered at first."""


class Request:
    """What the oracle knows of one request."""

    def __init__(self, rows: list[int], future: asyncio.Future[Any], made_s: float) -> None:
        self.rows = rows
        self.future = future
        self.made_s = made_s
        self.batch: Taken | None = None


class Taken:
    """A batch that the batcher has handed to its thread."""

    def __init__(self, requests: list[Request], call: Callable[[], None]) -> None:
        self.requests = requests
        self.call = call
        self.rows = [row for request in requests for row in request.rows]
        self.outcome = ""
        """How the function ended; empty until it has."""


ANSWERS: dict[str, Callable[[np.ndarray], Any]] = {
    "good": lambda x: -x,
    "short": lambda x: -x[:-1],
    "long": lambda x: np.concatenate([-x, -x[:1]]),
    "ragged": lambda x: (-x, -x[1:]),
    "scalar": lambda x: np.float64(1),
    "nothing": lambda x: None,
}
ERRORS: dict[str, BaseException] = {
    "raise": ZeroDivisionError(),
    "exit": SystemExit(3),
    "stop": StopIteration(),
    "cancel": asyncio.CancelledError(),
}
OUTCOMES = [*ANSWERS, *ERRORS, "close", "good", "good"]


class Play:
    """Plays a program on a batcher, and is the oracle."""

    def __init__(self, options: Options) -> None:
        self.minimum = options.minimum
        self.loop = asyncio.get_running_loop()
        self.requests: list[Request] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.batches: list[Taken] = []
        self.computing: Taken | None = None
        self.num_rows = 0
        self.closed = False
        self.done_before: set[asyncio.Future[Any]] = set()
        """The closing."""
        self.thread_lost = False
        self.proven = False
        self.ended_s = self.loop.time()
        """When the last batch ended."""
        self.batcher = DynamicBatcher(
            self.fn, options.minimum, MAXIMUM, 1000 * TIMEOUT_S, thread=self
        )
        self.callers: list[Caller] = [self.batcher.register() for _ in range(options.callers)]

    # What the batcher sees.

    def submit(self, call: Callable[[], None]) -> None:
        """In place of a ``NamedThread``: look at what was taken, and when; compute on demand."""
        if self.thread_lost:
            self.closing()
            raise RuntimeError("the thread is closed")
        assert not self.closed, "nothing is taken after the end"
        assert all(batch.outcome for batch in self.batches), "one batch at a time"
        waiting, now_s = self.waiting(), self.loop.time()
        assert self.is_due(waiting, now_s), "a batch is taken for a reason"
        latest_s = max(waiting[0].made_s + TIMEOUT_S, self.ended_s)
        assert now_s <= latest_s + SOON_S, "nobody waits longer than the timeout"
        taken: list[Request] = []
        for request in waiting:
            if sum(len(one.rows) for one in [*taken, request]) > MAXIMUM:
                break
            taken.append(request)
        batch = Taken(taken, call)
        for request in taken:
            request.batch = batch
        self.batches.append(batch)

    def fn(self, x: np.ndarray) -> Any:
        """The batched function."""
        batch, self.computing = self.computing, None
        assert batch is not None and x[:, 0].tolist() == batch.rows, (
            "these requests, each once, oldest first"
        )
        if batch.outcome == "close":
            self.closing()
            self.batcher.close()
            return -x
        if batch.outcome in ERRORS:
            raise ERRORS[batch.outcome]
        return ANSWERS[batch.outcome](x)

    # What the oracle says.

    def waiting(self) -> list[Request]:
        """Requests that are still wanted and not taken, oldest first."""
        return [one for one in self.requests if one.batch is None and not one.future.done()]

    def held(self) -> list[Taken]:
        """The batch that is to be computed."""
        return [batch for batch in self.batches if not batch.outcome]

    def closing(self) -> None:
        """The batcher is about to be closed, perhaps once more."""
        if not self.closed:
            self.closed = True
            self.done_before = {one.future for one in self.requests if one.future.done()}

    def is_due(self, waiting: list[Request], now_s: float) -> bool:
        """Whether a batch should be taken, if none is computed."""
        if not waiting:
            return False
        return (
            sum(len(request.rows) for request in waiting) >= self.minimum
            or 0 < len(self.callers) <= len(waiting)
            or now_s >= waiting[0].made_s + TIMEOUT_S - SOON_S
        )

    async def rest(self) -> None:
        """Let all that can happen happen, and see that it did."""
        await turns(6)
        if not self.closed:
            late = not self.held() and self.is_due(self.waiting(), self.loop.time())
            assert not late, "what is due is taken"
            counted = self.batcher.statistics()
            done = [batch for batch in self.batches if batch.outcome]
            assert counted.batches == len(done)
            assert counted.rows == sum(len(batch.rows) for batch in done)
            self.check_pending()
        for request in self.requests:
            self.check_future(request)

    def check_pending(self) -> None:
        """What the batcher says of its queue, at any time."""
        told, waiting = self.batcher.statistics(), self.waiting()
        assert told.pending_requests == len(waiting)
        assert told.pending_rows == sum(len(request.rows) for request in waiting)

    def check_future(self, request: Request) -> None:
        future, outcome = request.future, request.batch.outcome if request.batch else ""
        if not future.done():
            assert not self.closed and not outcome, "every future ends"
            return
        if future.cancelled():
            return
        error = future.exception()
        if self.closed and isinstance(error, BatcherClosed):
            assert future not in self.done_before, "nobody is told two things"
        elif outcome == "good":
            assert error is None
            assert future.result()[:, 0].tolist() == [-row for row in request.rows]
        elif outcome in ERRORS:
            expected = ERRORS[outcome]
            assert error is expected or (
                isinstance(error, CallFailed) and error.__cause__ is expected
            )
        else:
            assert outcome in ANSWERS and isinstance(error, BadBatch)

    # The program.

    async def play(self, name: str, number: int) -> None:
        """One statement."""
        await getattr(self, f"do_{name}")(number)

    def ask(self, size: int) -> asyncio.Future[Any]:
        """A request of fresh rows; BatcherClosed once it is closed."""
        rows = list(range(self.num_rows, self.num_rows + size))
        future = self.batcher(np.array(rows, np.int64).reshape(-1, 1))
        assert not self.closed
        self.num_rows += size
        self.requests.append(Request(rows, future, self.loop.time()))
        return future

    async def do_ask(self, number: int) -> None:
        with self.refused_once_closed():
            self.ask(1 + number % 3)

    async def do_converse(self, number: int) -> None:
        """A task asks a few times; what goes wrong does not discourage it."""

        async def converse() -> None:
            for size in range(1, 2 + number % 4):
                with contextlib.suppress(ZeroDivisionError, CallFailed, BadBatch, BatcherClosed):
                    await self.ask(size)

        self.tasks.append(asyncio.create_task(converse()))

    @contextlib.contextmanager
    def refused_once_closed(self) -> Any:
        try:
            yield
        except BatcherClosed:
            assert self.closed

    async def do_ask_wrongly(self, number: int) -> None:
        """A request that cannot be is refused at once, and nothing else changes."""
        sizes = [0, MAXIMUM + 1]
        x: Any = np.zeros((sizes[number % 2], 1), np.int64)
        if number % 3 == 0 and (self.proven or self.waiting()):
            x = np.zeros((2, 1), np.float64)
        if number % 5 == 0:
            x = 1.0
        with pytest.raises(BatcherClosed if self.closed else BadBatch):
            self.batcher(x)

    async def do_cancel(self, number: int) -> None:
        """A waiter leaves, whatever moment it is."""
        if self.requests:
            self.requests[-1 - number % len(self.requests)].future.cancel()

    async def do_cancel_task(self, number: int) -> None:
        if self.tasks:
            self.tasks[-1 - number % len(self.tasks)].cancel()

    async def do_compute(self, number: int) -> None:
        """The thread computes a batch; its outcome has yet to reach the loop."""
        for batch in self.held():
            batch.outcome = OUTCOMES[number % len(OUTCOMES)]
            self.ended_s = self.loop.time()
            self.computing = batch
            batch.call()
            self.proven = self.proven or (batch.outcome == "good" and not self.closed)

    async def do_turn(self, number: int) -> None:
        """One turn of the loop: what happens next meets things half done."""
        await asyncio.sleep(0)

    async def do_rest(self, number: int) -> None:
        await self.rest()

    async def do_wait(self, number: int) -> None:
        """Milliseconds go by."""
        await self.do_rest(0)
        await asyncio.sleep((1 + number % 70) / 1000)
        await self.do_rest(0)

    async def do_look(self, number: int) -> None:
        self.check_pending()

    async def do_register(self, number: int) -> None:
        # The first caller waits for nobody but itself, and has not asked yet.
        if self.callers or not self.waiting():
            self.callers.append(self.batcher.register())

    async def do_leave(self, number: int) -> None:
        """A caller leaves, once or twice."""
        if self.callers:
            caller = self.callers.pop()  # first: the batcher looks again at once
            caller.close()
            if number % 2:
                caller.close()

    async def do_close(self, number: int) -> None:
        """By the loop's thread, or by another."""
        first = not self.closed
        self.closing()
        if number % 2:
            closer = threading.Thread(target=self.batcher.close)
            closer.start()
            closer.join()
            return
        self.batcher.close()
        if first:
            assert all(request.future.done() for request in self.requests), "at once"

    async def do_lose_thread(self, number: int) -> None:
        """Somebody closes the thread under the batcher."""
        self.thread_lost = True

    async def finish(self) -> None:
        """Compute all that is asked, and see that nothing is left."""
        while self.callers:
            await self.do_leave(1)
        await self.do_wait(69)
        while self.held() or any(not task.done() for task in self.tasks):
            await self.do_compute(0)
            await self.do_wait(69)
        for request in self.requests:
            assert request.future.done()
            left = request.batch is None
            assert not left or self.closed or request.future.cancelled(), "no row is lost"
        await self.do_close(0)
        await self.do_rest(0)


ENDS = ("close", "lose_thread")
OFTEN = ("ask", "ask", "ask", "converse", "turn", "turn", "cancel", "compute", "wait", "wait")
OPTIONS = st.builds(Options, st.integers(1, MAXIMUM) | st.just(MAXIMUM), st.integers(0, 3))
BEFORE = programs([*OFTEN, *OFTEN, *(name for name in statements_of(Play) if name not in ENDS)])
AFTER = st.lists(st.tuples(st.sampled_from(statements_of(Play)), st.integers(0, 60)), max_size=8)
END = st.lists(st.tuples(st.sampled_from(ENDS), st.integers(0, 1)), max_size=1)
PROGRAMS = st.tuples(BEFORE, END, AFTER).map(lambda parts: [*parts[0], *parts[1], *parts[2]])


def play(program: Program, options: Options) -> None:
    """See the module."""

    async def main() -> None:
        play = Play(options)
        for name, number in program:
            await play.play(name, number)
        await play.finish()

    run_virtual(main())


def any_program(examples: int) -> None:
    """So many of them."""

    @settings(max_examples=examples, deadline=None)
    @given(PROGRAMS, OPTIONS)
    def check(program: Program, options: Options) -> None:
        play(program, options)

    check()


def test_any_program() -> None:
    """Every future ends, rightly and in time; no row is lost, computed twice or overtaken."""
    any_program(400)


@pytest.mark.slow
def test_many_programs() -> None:
    """The same for thousands."""
    any_program(3_000)
