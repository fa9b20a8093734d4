"""Named threads: order, answers, errors, cancellation, closing."""

from __future__ import annotations

import asyncio
import threading

import pytest

from asyncagent.errors import CallFailed
from asyncagent.threads import NamedThread


def test_calls_run_in_order_on_the_named_thread() -> None:
    """Calls come back with their results, in order, from a daemon thread of that name."""

    async def run() -> None:
        thread = NamedThread("worker-7")
        tape: list[int] = []
        results = await asyncio.gather(
            *(thread.run(lambda i=i: (tape.append(i), i * i)[1]) for i in range(50))  # type: ignore[func-returns-value]
        )
        assert results == [i * i for i in range(50)]
        assert tape == list(range(50))
        assert await thread.run(lambda: threading.current_thread().name) == "worker-7"
        assert await thread.run(lambda: threading.current_thread().daemon)
        thread.close()
        assert thread.join(30)

    asyncio.run(run())


def test_exceptions_come_out_of_the_future() -> None:
    """An exception on the thread is the caller's; the thread goes on."""

    async def run() -> None:
        thread = NamedThread("t")
        with pytest.raises(ZeroDivisionError):
            await thread.run(lambda: 1 / 0)
        assert await thread.run(lambda: 1) == 1
        thread.close()

    asyncio.run(run())


@pytest.mark.parametrize("error", [StopIteration(3), SystemExit(3), asyncio.CancelledError()])
def test_what_a_future_cannot_carry_still_comes_out(error: BaseException) -> None:
    """StopIteration, SystemExit and CancelledError fail the caller instead of losing it."""

    def broken() -> None:
        raise error

    async def run() -> None:
        thread = NamedThread("t")
        async with asyncio.timeout(30):
            with pytest.raises(CallFailed, match=type(error).__name__) as caught:
                await thread.run(broken)
        assert caught.value.__cause__ is error
        thread.close()

    asyncio.run(run())


def test_cancelled_caller_does_not_disturb_the_thread() -> None:
    """A caller that left in mid-call is passed over; the next one is served."""

    async def run() -> None:
        thread = NamedThread("t")
        held = threading.Event()
        future = thread.run(held.wait)
        future.cancel()
        held.set()
        assert await thread.run(lambda: "next") == "next"
        thread.close()

    asyncio.run(run())


def test_closed_thread_refuses_and_ends_after_its_calls() -> None:
    """What was submitted before close still runs; later calls raise; close twice is harmless."""

    async def run() -> None:
        thread = NamedThread("t")
        last = thread.run(lambda: "done")
        thread.close()
        thread.close()
        with pytest.raises(RuntimeError, match="thread 't' is closed"):
            thread.run(lambda: None)
        assert await last == "done"
        assert thread.join(30)

    asyncio.run(run())


def test_loop_that_is_gone_is_not_an_error() -> None:
    """A call that outlives its event loop ends quietly."""
    thread = NamedThread("t")
    held = threading.Event()

    async def run() -> None:
        thread.run(held.wait)

    asyncio.run(run())
    held.set()
    thread.close()
    assert thread.join(30)
