"""The batcher's contract, one test per clause; time is virtual where no real thread is needed."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optree
import pytest
import torch
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncagent.batch import Form, Request
from asyncagent.batcher import (
    Batch,
    DynamicBatcher,
    FlushRule,
    Nest,
    batch_fn,
    batch_fn_with_options,
)
from asyncagent.errors import AlreadyAnswered, BadBatch, BatcherClosed, CallFailed
from asyncagent.threads import NamedThread
from tests.virtual_clock import HeldThread, InlineThread, VirtualClockLoop, run_virtual, turns

WATCHDOG_S = 60


def rows(*values: int) -> np.ndarray:
    """int64 [n, 1]."""
    return np.array(values, np.int64).reshape(-1, 1)


class Tape:
    """A batched function that negates, and remembers the batches it was given."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.batches.append(x[:, 0].tolist())
        return -x


# When a batch is taken.


def test_flush_rule() -> None:
    """A batch is due at the minimum, at the oldest's timeout, or when every caller waits."""
    rule = FlushRule(minimum_batch_size=4, timeout_s=0.5)
    assert rule.deadline_s(1.0) == 1.5
    assert rule.due(rows=4, oldest_s=1.0, now_s=1.0)
    assert not rule.due(rows=3, oldest_s=1.0, now_s=1.49)
    assert rule.due(rows=3, oldest_s=1.0, now_s=1.5)
    assert rule.due(rows=2, oldest_s=1.0, now_s=1.0, requests=2, callers=2)
    assert not rule.due(rows=2, oldest_s=1.0, now_s=1.0, requests=2, callers=3)
    assert not rule.due(rows=2, oldest_s=1.0, now_s=1.0, requests=2, callers=0)
    assert not rule.due(rows=9, oldest_s=1.0, now_s=9.0, requests=2, callers=2, computing=True)
    assert not rule.due(rows=0, oldest_s=1.0, now_s=9.0)


def test_minimum() -> None:
    """Requests wait until the minimum of rows is there, and then go together."""

    async def main() -> None:
        tape = Tape()
        batcher = DynamicBatcher(tape, minimum_batch_size=4, thread=InlineThread())
        first, second = batcher(rows(1)), batcher(rows(2, 3))
        await turns()
        assert tape.batches == []
        third = batcher(rows(4))
        answers = await asyncio.gather(first, second, third)
        assert tape.batches == [[1, 2, 3, 4]]
        assert [answer[:, 0].tolist() for answer in answers] == [[-1], [-2, -3], [-4]]
        assert asyncio.get_running_loop().time() == 1000.0

    run_virtual(main())


def test_callers_woken_together_share_a_batch() -> None:
    """Requests of one turn of the event loop travel together even if one would be enough."""

    async def main() -> None:
        tape = Tape()
        batcher = DynamicBatcher(tape, thread=InlineThread())

        async def caller(k: int) -> None:
            for step in range(3):
                await batcher(rows(10 * step + k))

        await asyncio.gather(*map(caller, range(3)))
        assert tape.batches == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]

    run_virtual(main())


def test_timeout_counts_from_the_oldest_request() -> None:
    """A later request does not prolong the oldest one's wait, and one timer serves them all."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualClockLoop)
        tape = Tape()
        batcher = DynamicBatcher(tape, 10, timeout_ms=100, thread=InlineThread())
        start_s, timers = loop.time(), loop.timers
        oldest = batcher(rows(1))
        await asyncio.sleep(0.06)
        younger = batcher(rows(2))
        await asyncio.gather(oldest, younger)
        assert loop.time() - start_s == pytest.approx(0.1, abs=1e-6)
        assert tape.batches == [[1, 2]]
        assert loop.timers - timers == 2, "the batcher's one and this test's sleep"

    run_virtual(main())


def test_timeout_passes_while_another_batch_computes() -> None:
    """A request that grew old during a batch is taken when that batch ends, not a timeout later."""

    async def main() -> None:
        tape, thread = Tape(), HeldThread()
        batcher = DynamicBatcher(tape, 2, timeout_ms=100, thread=thread)
        first = batcher(rows(1, 2))
        await turns()
        second = batcher(rows(3))
        await asyncio.sleep(0.25)
        assert tape.batches == [] and len(thread.held) == 1
        thread.release()
        await turns()
        assert first.done() and len(thread.held) == 1
        thread.release()
        assert (await second).item() == -3

    run_virtual(main())


def test_the_rest_of_a_full_batch_keeps_its_deadline() -> None:
    """What did not fit is timed from its own request, not from the batch that went before."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        tape, thread = Tape(), HeldThread()
        batcher = DynamicBatcher(tape, 2, 2, timeout_ms=100, thread=thread)
        batcher(rows(1, 2))
        rest, start_s = batcher(rows(3)), loop.time()
        await asyncio.sleep(0.04)
        thread.release()
        while not thread.held:
            await asyncio.sleep(0.001)
        assert loop.time() - start_s == pytest.approx(0.1, abs=0.002)
        thread.release()
        await rest

    run_virtual(main())


def test_a_timer_that_rings_early_is_right() -> None:
    """uvloop counts in milliseconds: a timeout of a fraction of one is not waited for twice."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualClockLoop)
        batcher = DynamicBatcher(Tape(), 10, timeout_ms=0.4, thread=InlineThread())
        loop.early_s = 0.0005
        answer = batcher(rows(1))
        timers = loop.timers
        await turns()
        assert answer.done() and loop.timers - timers == 1

    run_virtual(main())


def test_every_registered_caller_waits() -> None:
    """With every registered caller waiting a batch goes at once; a caller that leaves counts."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        tape, start_s = Tape(), loop.time()
        batcher = DynamicBatcher(tape, 100, thread=InlineThread())
        with batcher.register(), batcher.register():
            third = batcher.register()
            first, second = batcher(rows(1)), batcher(rows(2))
            await turns()
            assert tape.batches == []
            third.close()
            third.close()
            await asyncio.gather(first, second)
            await asyncio.gather(batcher(rows(3)), batcher(rows(4)))
        assert tape.batches == [[1, 2], [3, 4]]
        assert loop.time() == start_s
        await batcher(rows(5))
        assert loop.time() > start_s, "nobody is registered: only the timeout is left"

    run_virtual(main())


def test_the_next_batch_gathers_while_one_computes() -> None:
    """Requests made during a batch go together, at once when it ends."""

    async def main() -> None:
        tape, thread = Tape(), HeldThread()
        batcher = DynamicBatcher(tape, thread=thread)
        futures = [batcher(rows(1))]
        await turns()
        for k in (2, 3, 4):
            futures.append(batcher(rows(k)))
            await turns()
        assert len(thread.held) == 1, "one batch at a time"
        thread.release()
        await turns(1)
        assert len(thread.held) == 1, "the next one has started"
        thread.release()
        await asyncio.gather(*futures)
        assert tape.batches == [[1], [2, 3, 4]]

    run_virtual(main())


def test_maximum_and_order() -> None:
    """Batches take whole requests, oldest first, up to the maximum; none overtakes."""

    async def main() -> None:
        tape = Tape()
        batcher = DynamicBatcher(tape, maximum_batch_size=4, thread=InlineThread())
        requests = [rows(1, 2, 3), rows(4, 5), rows(6), rows(7), rows(8), rows(9, 10, 11, 12)]
        answers = await asyncio.gather(*map(batcher, requests))
        assert tape.batches == [[1, 2, 3], [4, 5, 6, 7], [8], [9, 10, 11, 12]]
        for request, answer in zip(requests, answers, strict=True):
            np.testing.assert_array_equal(answer, -request)

    run_virtual(main())


@pytest.mark.parametrize(
    "options",
    [
        {"minimum_batch_size": 0},
        {"minimum_batch_size": 9, "maximum_batch_size": 8},
        {"timeout_ms": -1},
        {"timeout_ms": float("inf")},
        {"timeout_ms": float("nan")},
    ],
)
def test_impossible_options(options: dict[str, Any]) -> None:
    """Options that could never work are refused when the batcher is made."""
    with pytest.raises(ValueError, match="must be"):
        DynamicBatcher(Tape(), **options)


# What can go wrong.


def test_an_exception_reaches_every_waiter() -> None:
    """The function's exception comes out of every request of its batch, and of no other."""

    async def main() -> None:
        def fn(x: np.ndarray) -> np.ndarray:
            if (x < 0).any():
                raise ZeroDivisionError("negative")
            return x

        batcher = DynamicBatcher(fn, maximum_batch_size=3, thread=InlineThread())
        futures = [batcher(rows(k)) for k in (1, -2, 3, 4)]
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert [type(result) for result in results] == [ZeroDivisionError] * 3 + [np.ndarray]
        assert (await batcher(rows(5))).item() == 5, "the batcher lives on"

    run_virtual(main())


@pytest.mark.parametrize("error", [SystemExit(3), StopIteration(), asyncio.CancelledError()])
def test_an_exception_that_no_future_can_carry(error: BaseException) -> None:
    """What would end the loop or look like a cancellation fails every waiter as CallFailed."""

    async def main() -> None:
        def fn(x: np.ndarray) -> np.ndarray:
            raise error

        batcher = DynamicBatcher(fn, thread=InlineThread())
        futures = [batcher(rows(k)) for k in range(2)]
        for result in await asyncio.gather(*futures, return_exceptions=True):
            assert type(result) is CallFailed
            assert result.__cause__ is error

    run_virtual(main())


def test_close_fails_queued_and_in_flight() -> None:
    """close raises BatcherClosed in every waiter, and in whoever asks later, again and again."""

    async def main() -> None:
        thread = HeldThread()
        batcher = DynamicBatcher(Tape(), thread=thread)
        in_flight = batcher(rows(1))
        await turns()
        queued = batcher(rows(2))
        batcher.close()
        for future in (in_flight, queued):
            with pytest.raises(BatcherClosed):
                await future
        batcher.close()
        for _ in range(2):
            with pytest.raises(BatcherClosed):
                batcher(rows(3))
        thread.release()  # the late answer finds nobody, and disturbs nobody
        await turns()

    run_virtual(main())


def test_close_before_the_first_request() -> None:
    """A batcher closed before use refuses requests, and has started nothing."""

    async def main() -> None:
        with DynamicBatcher(Tape()) as batcher:
            pass
        assert batcher.join(0)
        with pytest.raises(BatcherClosed):
            batcher(rows(1))

    run_virtual(main())


def test_close_between_request_and_flush() -> None:
    """A request that waits for its timeout is failed by close, and its timer does nothing."""

    async def main() -> None:
        tape = Tape()
        batcher = DynamicBatcher(tape, 10, thread=InlineThread())
        waiting = batcher(rows(1))
        await turns()
        fresh = batcher(rows(2))  # its turn of the loop is still to come
        batcher.close()
        results = await asyncio.gather(waiting, fresh, return_exceptions=True)
        assert [type(result) for result in results] == [BatcherClosed] * 2
        await asyncio.sleep(1)
        assert tape.batches == []

    run_virtual(main())


def test_cancel_before_flush() -> None:
    """A request cancelled before its batch is taken is not computed and counts for nothing."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        tape, start_s = Tape(), loop.time()
        batcher = DynamicBatcher(tape, 3, timeout_ms=100, thread=InlineThread())
        gone = batcher(rows(1, 2))
        await asyncio.sleep(0.05)
        gone.cancel()
        stays = batcher(rows(3))
        await turns()
        assert tape.batches == [], "two rows left: the minimum is not there"
        assert (await stays).item() == -3
        assert tape.batches == [[3]]
        assert loop.time() - start_s == pytest.approx(0.15, abs=1e-6), "3's own timeout"

    run_virtual(main())


@pytest.mark.parametrize("what", ["statistics", "malformed"])
def test_the_departed_leave_the_others_their_timeout(what: str) -> None:
    """Whatever forgets a cancelled request, those that wait beside it are taken in time."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        tape, start_s = Tape(), loop.time()
        batcher = DynamicBatcher(tape, 3, timeout_ms=100, thread=InlineThread())
        gone, stays = batcher(rows(1)), batcher(rows(2))
        await turns()
        gone.cancel()
        if what == "statistics":
            assert batcher.statistics().pending_rows == 1
        else:
            with pytest.raises(BadBatch):
                batcher(np.zeros((1, 1), np.float32))
        await stays
        assert tape.batches == [[2]]
        assert loop.time() - start_s == pytest.approx(0.1, abs=1e-6)

    run_virtual(main())


def test_cancelled_callers_do_not_count_as_waiting() -> None:
    """A registered caller whose request was cancelled is not waiting."""

    async def main() -> None:
        tape = Tape()
        batcher = DynamicBatcher(tape, 100, thread=InlineThread())
        with batcher.register(), batcher.register():
            batcher(rows(1)).cancel()
            second = batcher(rows(2))
            await turns()
            assert tape.batches == []
            await asyncio.gather(second, batcher(rows(3)))
        assert tape.batches == [[2, 3]]

    run_virtual(main())


@pytest.mark.parametrize("end", ["answer", "exception", "close"])
def test_cancel_in_mid_batch(end: str) -> None:
    """A waiter that leaves while its batch computes costs the others nothing, however it ends."""

    async def main() -> None:
        def fn(x: np.ndarray) -> np.ndarray:
            if end == "exception":
                raise ZeroDivisionError
            return -x

        thread = HeldThread()
        batcher = DynamicBatcher(fn, thread=thread)
        futures = [batcher(rows(k, 10 * k)) for k in (1, 2, 3)]
        await turns()
        futures[1].cancel()
        if end == "close":
            batcher.close()
        thread.release()
        first, left, last = await asyncio.gather(*futures, return_exceptions=True)
        assert isinstance(left, asyncio.CancelledError)
        if end == "answer":
            np.testing.assert_array_equal(first, rows(-1, -10))
            np.testing.assert_array_equal(last, rows(-3, -30))
        else:
            expected = {"exception": ZeroDivisionError, "close": BatcherClosed}[end]
            assert type(first) is type(last) is expected

    run_virtual(main())


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x[:-1],
        lambda x: np.concatenate([x, x]),
        lambda x: (x, x[:1]),
        lambda x: {"value": x, "mean": np.float64(x.mean())},
        lambda x: np.array(1.0),
        lambda x: None,
        lambda x: torch.zeros(len(x) + 1),
    ],
)
def test_the_answers_rows_are_counted(fn: Callable[[np.ndarray], Nest]) -> None:
    """An answer that has not one row per row is BadBatch for every waiter of the batch."""

    async def main() -> None:
        batcher = DynamicBatcher(fn, thread=InlineThread())
        futures = [batcher(rows(k)) for k in range(3)]
        for result in await asyncio.gather(*futures, return_exceptions=True):
            assert type(result) is BadBatch
        with pytest.raises(BadBatch):
            await batcher(rows(1, 2))

    run_virtual(main())


GOOD = (np.zeros((2, 3), np.float32), {"a": torch.zeros(2, 4)})


@pytest.mark.parametrize(
    "bad",
    [
        (np.zeros((0, 3), np.float32), {"a": torch.zeros(0, 4)}),
        (np.zeros((9, 3), np.float32), {"a": torch.zeros(9, 4)}),
        (np.zeros((2, 3), np.float32), {"a": torch.zeros(1, 4)}),
        (np.zeros((2, 3), np.float64), {"a": torch.zeros(2, 4)}),
        (np.zeros((2, 4), np.float32), {"a": torch.zeros(2, 4)}),
        (np.zeros((2, 3), np.float32), {"a": torch.zeros(2, 4, 1)}),
        (np.zeros((2, 3), np.float32), {"a": torch.zeros(2, 4, dtype=torch.int64)}),
        (np.zeros((2, 3), np.float32), {"a": torch.zeros(2, 4, device="meta")}),
        (np.zeros((2, 3), np.float32), {"a": np.zeros((2, 4), np.float32)}),
        (np.zeros((2, 3), np.float32), {"b": torch.zeros(2, 4)}),
        (np.zeros((2, 3), np.float32), torch.zeros(2, 4)),
        (np.zeros((2, 3), np.float32),),
        (np.float32(1), {"a": torch.zeros(2, 4)}),
        (np.zeros((), np.float32), {"a": torch.tensor(1.0)}),
        ([[1.0, 2.0, 3.0]] * 2, {"a": torch.zeros(2, 4)}),
        (),
        ((), None),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_malformed_request_concerns_its_caller_only(bad: tuple[Nest, ...], first: bool) -> None:
    """A request unlike the others raises BadBatch at once, and the others get their rows."""

    async def main() -> None:
        def fn(x: np.ndarray, y: dict[str, torch.Tensor]) -> np.ndarray:
            assert y["a"].shape == (len(x), 4)
            return x + 1

        batcher = DynamicBatcher(fn, maximum_batch_size=8, thread=InlineThread())
        if first:
            await batcher(*GOOD)
        good = [batcher(*GOOD)]
        with pytest.raises(BadBatch, match="inference"):
            batcher(*bad)
        good.append(batcher(*GOOD))
        for answer in await asyncio.gather(*good):
            np.testing.assert_array_equal(answer, GOOD[0] + 1)

    run_virtual(main())


def test_a_malformed_first_request_spoils_nothing() -> None:
    """Until an answer has shown what requests look like, a failed one does not say so."""

    async def main() -> None:
        def fn(x: np.ndarray) -> np.ndarray:
            return x.reshape(-1, 1)

        batcher = DynamicBatcher(fn, thread=InlineThread())
        batcher(rows(1).astype(np.float32)).cancel()
        with pytest.raises(BadBatch):
            await batcher(np.zeros((1, 2)))
        assert (await batcher(rows(7))).item() == 7
        with pytest.raises(BadBatch):
            batcher(np.zeros((1, 2)))

    run_virtual(main())


def test_a_batch_refuses_to_be_answered_twice() -> None:
    """The second answer or failure raises AlreadyAnswered and changes nothing."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for first_fails in (False, True):
            form, n, leaves = Form.of((rows(1),))
            request = Request(loop.create_future(), n, 0.0, leaves)
            batch = Batch([request], form)
            if first_fails:
                batch.fail(ZeroDivisionError())
            else:
                batch.answer(batch.compute(Tape()))
            with pytest.raises(AlreadyAnswered):
                batch.answer([rows(9)])
            with pytest.raises(AlreadyAnswered):
                batch.fail(ValueError())
            if first_fails:
                with pytest.raises(ZeroDivisionError):
                    await request.future
            else:
                assert (await request.future).item() == -1

    run_virtual(main())


def test_a_lost_thread_closes_the_batcher() -> None:
    """If somebody closes the thread under the batcher, its waiters learn and later callers too."""

    async def main() -> None:
        thread = NamedThread("shared")
        batcher = DynamicBatcher(Tape(), thread=thread)
        thread.close()
        futures = [batcher(rows(1)), batcher(rows(2))]
        for result in await asyncio.gather(*futures, return_exceptions=True):
            assert isinstance(result, BatcherClosed)
            assert "thread" in str(result)
        with pytest.raises(BatcherClosed):
            batcher(rows(3))

    run_virtual(main())


# Nests.


class Step(NamedTuple):
    observation: Any
    reward: Any


def _numbers(seed: int, n: int) -> Step:
    generator = np.random.default_rng(seed)
    pair = (
        generator.integers(0, 255, (n, 4, 5), np.uint8),
        torch.from_numpy(generator.random((n, 3), np.float32)),
    )
    return Step({"frame": pair[0], "core": (pair[1], ())}, generator.random(n, np.float32))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 5, 1, 3), (4,)])
def test_nests_of_arrays_and_tensors(sizes: tuple[int, ...]) -> None:
    """Every caller gets its own rows of every leaf, in the answer's own structure."""

    async def main() -> None:
        def fn(step: Step, scale: np.ndarray) -> dict[str, Any]:
            frame, (core, _) = step.observation["frame"], step.observation["core"]
            assert isinstance(frame, np.ndarray) and isinstance(core, torch.Tensor)
            return {"next": Step(core * 2, (step.reward * scale, ())), "frame": 255 - frame}

        batcher = DynamicBatcher(fn, minimum_batch_size=sum(sizes), thread=InlineThread())
        requests = [(_numbers(k, n), np.full(n, k, np.float32)) for k, n in enumerate(sizes)]
        answers = await asyncio.gather(*(batcher(*request) for request in requests))
        assert batcher.statistics().batches == 1
        for request, answer in zip(requests, answers, strict=True):
            expected: Nest = fn(*request)
            assert optree.tree_structure(answer) == optree.tree_structure(expected)
            for got, want in zip(*map(optree.tree_leaves, (answer, expected)), strict=True):
                assert type(got) is type(want) and got.dtype == want.dtype
                np.testing.assert_array_equal(got, want)

    run_virtual(main())


def test_tensors_alone() -> None:
    """A plain tensor goes in and out as an array does, and its class may be a subclass."""

    async def main() -> None:
        batcher = DynamicBatcher(
            lambda x, y: (x + y, x), minimum_batch_size=3, thread=InlineThread()
        )
        x, y = torch.rand(3, 2), torch.rand(3, 2)
        futures = [batcher(x[:1], y[:1]), batcher(torch.nn.Parameter(x[1:]), y[1:])]
        (a, _), (b, c) = await asyncio.gather(*futures)
        assert torch.equal(torch.cat([a, b]), x + y) and torch.equal(c, x[1:])

    run_virtual(main())


def test_torch_is_not_imported() -> None:
    """The batcher serves arrays in a process that has no torch."""
    code = "import sys, asyncagent.batcher; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=WATCHDOG_S).returncode == 0


# Event loops, threads and the decorators.


def test_a_function_that_holds_its_thread() -> None:
    """While fn computes on the named thread the loop is free, and the next batch gathers."""
    names: list[str] = []
    entered, release = threading.Event(), threading.Event()

    def fn(x: np.ndarray) -> np.ndarray:
        names.append(threading.current_thread().name)
        entered.set()
        assert release.wait(WATCHDOG_S)
        return -x

    async def main() -> None:
        with DynamicBatcher(fn, name="slow") as batcher:
            futures = [batcher(rows(1))]
            await asyncio.get_running_loop().run_in_executor(None, entered.wait, WATCHDOG_S)
            futures += [batcher(rows(k)) for k in (2, 3)]
            await turns()
            assert batcher.statistics().pending_rows == 2
            assert not any(future.done() for future in futures)
            release.set()
            async with asyncio.timeout(WATCHDOG_S):
                answers = await asyncio.gather(*futures)
            assert [answer.item() for answer in answers] == [-1, -2, -3]
            assert batcher.statistics().batches == 2
        assert batcher.join(WATCHDOG_S)
        assert names == ["slow"] * 2

    uvloop.run(main())


def test_close_from_another_thread() -> None:
    """close wakes the waiters of a loop that runs on another thread, while fn still computes."""
    entered, release = threading.Event(), threading.Event()

    def fn(x: np.ndarray) -> np.ndarray:
        entered.set()
        assert release.wait(WATCHDOG_S)
        return x

    async def main() -> None:
        batcher = DynamicBatcher(fn)

        def close_when_computing() -> None:
            assert entered.wait(WATCHDOG_S)
            batcher.close()

        closer = threading.Thread(target=close_when_computing)
        closer.start()
        with pytest.raises(BatcherClosed):
            async with asyncio.timeout(WATCHDOG_S):
                await batcher(rows(1))
        closer.join()
        assert not batcher.join(0), "the call of fn goes on"
        release.set()
        assert batcher.join(WATCHDOG_S)

    asyncio.run(main(), debug=True)


def test_close_from_another_thread_as_a_batch_ends() -> None:
    """A batch that had its answers gives them; none is begun for those who wait for the next."""

    async def main() -> None:
        thread = HeldThread()
        batcher = DynamicBatcher(Tape(), thread=thread)
        answered = batcher(rows(1))
        await turns()
        queued = batcher(rows(2))
        thread.release()
        closer = threading.Thread(target=batcher.close)
        closer.start()
        closer.join()
        assert (await answered).item() == -1
        with pytest.raises(BatcherClosed):
            await queued
        assert not thread.held

    run_virtual(main())


def test_a_loop_that_closes_in_mid_batch() -> None:
    """A batch left behind by its loop is dropped in silence, and the next loop is served."""
    entered, release = threading.Event(), threading.Event()

    def fn(x: np.ndarray) -> np.ndarray:
        entered.set()
        assert release.wait(WATCHDOG_S)
        return -x

    batcher = DynamicBatcher(fn)

    async def leave() -> None:
        abandoned = batcher(rows(1))
        await asyncio.get_running_loop().run_in_executor(None, entered.wait, WATCHDOG_S)
        batcher(rows(2))
        assert not abandoned.done()

    async def ask() -> int:
        async with asyncio.timeout(WATCHDOG_S):
            return int((await batcher(rows(3))).item())

    asyncio.run(leave())
    release.set()
    assert asyncio.run(ask()) == -3
    assert batcher.statistics().pending_rows == 0
    batcher.close()
    assert batcher.join(WATCHDOG_S), "the thread outlived the answer that nobody awaited"


def test_another_loop_is_refused_while_the_first_runs() -> None:
    """Two running event loops cannot share a batcher: the second is told so."""

    async def ask(batcher: DynamicBatcher) -> None:
        await batcher(rows(1))

    async def main() -> None:
        with DynamicBatcher(Tape()) as batcher:
            await ask(batcher)
            with pytest.raises(RuntimeError, match="another event loop"):
                await asyncio.to_thread(asyncio.run, ask(batcher))
            await ask(batcher)

    asyncio.run(main())


def test_a_loop_that_rests() -> None:
    """A loop that neither runs nor waits for an answer lets the next one in; else it does not."""
    batcher = DynamicBatcher(Tape(), 2)

    async def ask(*requests: np.ndarray) -> None:
        async with asyncio.timeout(WATCHDOG_S):
            await asyncio.gather(*map(batcher, requests))

    async def leave() -> asyncio.Future[Any]:
        return batcher(rows(1))

    with asyncio.Runner() as first, asyncio.Runner() as second, batcher:
        first.run(ask(rows(1), rows(2)))
        second.run(ask(rows(3), rows(4)))
        left_behind = second.run(leave())
        with pytest.raises(RuntimeError, match="another event loop"):
            first.run(ask(rows(5), rows(6)))
        left_behind.cancel()
        first.run(ask(rows(7), rows(8)))
    assert batcher.statistics().rows == 6


def test_a_batcher_forgotten_unclosed_ends_its_thread() -> None:
    """A batcher dropped without close leaves no thread behind."""
    batcher = DynamicBatcher(Tape(), name="forgotten")

    async def ask(batcher: DynamicBatcher) -> None:
        await batcher(rows(1))

    asyncio.run(ask(batcher))
    (thread,) = (t for t in threading.enumerate() if t.name == "forgotten")
    del batcher
    gc.collect()
    thread.join(WATCHDOG_S)
    assert not thread.is_alive()


def test_batch_fn() -> None:
    """The decorated function is awaited from many coroutines, on one event loop after another."""

    @batch_fn
    def double(x: np.ndarray) -> np.ndarray:
        """Twice x."""
        return 2 * x

    async def main(start: int) -> list[int]:
        async with asyncio.timeout(WATCHDOG_S):
            answers = await asyncio.gather(*(double(rows(start + k)) for k in range(5)))
        return [answer.item() for answer in answers]

    assert double.name == "double" and double.__doc__ == "Twice x."
    assert asyncio.run(main(0)) == [0, 2, 4, 6, 8]
    assert uvloop.run(main(5)) == [10, 12, 14, 16, 18]
    assert double.statistics().requests == 10 and double.statistics().batches == 2
    double.close()
    with pytest.raises(BatcherClosed):
        asyncio.run(main(0))
    assert double.join(WATCHDOG_S)


def test_batch_fn_with_options() -> None:
    """The decorator's options are the batcher's."""
    batches: list[int] = []

    @batch_fn_with_options(minimum_batch_size=2, maximum_batch_size=3, timeout_ms=50)
    def count(x: np.ndarray) -> np.ndarray:
        batches.append(len(x))
        return x

    async def main() -> None:
        count._thread = InlineThread()
        start_s = asyncio.get_running_loop().time()
        await asyncio.gather(*(count(rows(k)) for k in range(7)))
        assert batches == [3, 3, 1]
        assert asyncio.get_running_loop().time() - start_s == pytest.approx(0.05, abs=1e-6)
        with pytest.raises(BadBatch):
            count(rows(1, 2, 3, 4))

    run_virtual(main())
    with pytest.raises(ValueError, match="minimum_batch_size"):
        batch_fn_with_options(minimum_batch_size=0)(Tape())


def test_statistics() -> None:
    """The record counts batches, rows, seconds of work and idleness, and what waits."""
    now_s = 0.0

    async def main() -> None:
        nonlocal now_s

        def fn(x: np.ndarray) -> np.ndarray:
            nonlocal now_s
            now_s += 0.25
            if (x < 0).any():
                raise ValueError
            return x

        thread = HeldThread()
        batcher = DynamicBatcher(fn, maximum_batch_size=8, thread=thread, clock=lambda: now_s)
        before = batcher.statistics()
        assert before.batches == before.rows == before.idle_s == before.mean_batch_size == 0
        first = asyncio.gather(batcher(rows(1)), batcher(rows(2, 3)))
        now_s += 1.0
        await turns()
        now_s += 8.0  # the batch is in flight: neither idle nor yet counted
        batcher(rows(9)).cancel()
        second = batcher(rows(-1))
        between = batcher.statistics()
        assert (between.batches, between.idle_s) == (0, 1.0)
        assert (between.pending_requests, between.pending_rows) == (1, 1)
        thread.release()
        await first
        thread.release()
        await asyncio.gather(second, return_exceptions=True)
        now_s += 0.5
        after = batcher.statistics()
        assert (after.batches, after.requests, after.rows) == (2, 3, 4)
        assert after.batch_size_histogram == (1, 1, 0, 0)
        assert after.mean_batch_size == 2.0
        assert (after.computing_s, after.idle_s) == (0.5, 1.5)
        assert after.since(between).idle_s == 0.5 and after.since(after).batches == 0
        assert after.since(before) == after
        assert after.pending_rows == 0

    run_virtual(main())


def test_a_hundred_thousand_requests() -> None:
    """A thousand coroutines with a hundred requests each: every answer is the asker's own."""
    callers, requests = 1000, 100
    questions = np.random.default_rng().integers(0, 2**63, (callers, requests, 1, 2), np.uint64)
    key = np.uint64(0x9E3779B97F4A7C15)

    def scramble(x: np.ndarray) -> np.ndarray:
        return (x ^ key) * key

    async def caller(batcher: DynamicBatcher, mine: np.ndarray) -> int:
        right = 0
        for question in mine:
            right += np.array_equal(await batcher(question), scramble(question))
        return right

    async def main() -> None:
        with DynamicBatcher(scramble, maximum_batch_size=300) as batcher:
            async with asyncio.timeout(3 * WATCHDOG_S):
                right = await asyncio.gather(*(caller(batcher, mine) for mine in questions))
            assert right == [requests] * callers
            statistics = batcher.statistics()
        assert statistics.requests == statistics.rows == callers * requests
        assert statistics.mean_batch_size > 100, "batches form"

    uvloop.run(main())


# All of it in random order.

EVENTS = st.one_of(
    st.tuples(st.just("ask"), st.integers(1, 5)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("compute"), st.just(0)),
    st.tuples(st.just("break"), st.just(0)),
    st.tuples(st.just("wait"), st.integers(1, 80)),
    st.tuples(st.just("turn"), st.just(0)),
)


class Story:
    """Plays events on a batcher and checks what every waiter was told."""

    def __init__(self, minimum: int, callers: int) -> None:
        self.taken: list[int] = []
        self.broken: set[int] = set()
        self.breaks = False
        self.asked: list[tuple[asyncio.Future[np.ndarray], list[int]]] = []
        self.cancelled_early: set[int] = set()
        self.num_rows = 0
        self.thread = HeldThread()
        self.batcher = DynamicBatcher(self.fn, minimum, 8, 50, thread=self.thread)
        self.callers = [self.batcher.register() for _ in range(callers)]

    def fn(self, x: np.ndarray) -> np.ndarray:
        """Remembers the rows it saw; fails when it is told to."""
        assert 1 <= len(x) <= 8
        self.taken += x[:, 0].tolist()
        if self.breaks:
            self.broken.update(x[:, 0].tolist())
            raise ZeroDivisionError
        return -x

    async def play(self, event: str, number: int) -> None:
        """One event; ``number`` is its rows, index or milliseconds."""
        if event == "ask":
            mine = list(range(self.num_rows, self.num_rows + number))
            self.num_rows += number
            self.asked.append((self.batcher(rows(*mine)), mine))
        elif event == "cancel" and self.asked:
            future, mine = self.asked[-1 - number % len(self.asked)]
            queued = [id(request.future) for request in self.batcher._pending]
            if id(future) in queued:
                self.cancelled_early.update(mine)
            future.cancel()
        elif event in ("compute", "break") and self.thread.held:
            self.breaks = event == "break"
            self.thread.release()
            await turns()
        elif event == "wait":
            await asyncio.sleep(number / 1000)
        elif event == "turn":
            await turns()

    async def drain(self) -> None:
        """Compute all that is still to be computed."""
        for caller in self.callers:
            caller.close()
        await asyncio.sleep(0.051)
        while self.thread.held:
            await self.play("compute", 0)
            await asyncio.sleep(0.051)

    def check(self) -> None:
        """Every future has ended, with its own rows, its batch's failure, or as its owner said."""
        assert len(self.taken) == len(set(self.taken)), "no row is computed twice"
        assert self.taken == sorted(self.taken), "first come, first served"
        assert not self.cancelled_early & set(self.taken)
        for future, mine in self.asked:
            assert future.done()
            if future.cancelled():
                continue
            if isinstance(future.exception(), BatcherClosed):
                assert self.batcher._closed
            elif self.broken & set(mine):
                assert isinstance(future.exception(), ZeroDivisionError)
                assert set(mine) <= self.broken, "a request is never split"
            else:
                assert future.result()[:, 0].tolist() == [-k for k in mine]
                assert set(mine) <= set(self.taken)


@settings(max_examples=150, deadline=None)
@given(
    events=st.lists(EVENTS, max_size=40),
    minimum=st.integers(1, 8),
    callers=st.integers(0, 3),
    close=st.booleans(),
)
def test_any_story_ends_well(
    events: list[tuple[str, int]], minimum: int, callers: int, close: bool
) -> None:
    """Whatever is asked, cancelled, broken and closed: every future ends, and rightly."""

    async def main() -> None:
        story = Story(minimum, callers)
        for event in events:
            await story.play(*event)
        if close:
            story.batcher.close()
        else:
            await story.drain()
        await turns()
        story.check()
        if close:
            taken = list(story.taken)
            while story.thread.held:
                story.thread.release()
            await turns()
            assert len(story.taken) <= len(taken) + 8, "only the batch in flight was left"
        else:
            expected = set(range(story.num_rows)) - story.cancelled_early
            assert set(story.taken) == expected, "no row is lost"

    run_virtual(main())
