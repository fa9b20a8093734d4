"""The unroll queue: bounds, order, closing, cancellation, column bookkeeping."""

from __future__ import annotations

import asyncio
import weakref

import numpy as np
import pytest

from asyncagent.errors import EndOfUnrolls
from asyncagent.structs import ArraySpec, Discrete, EnvSpec, EnvStep, PolicyStep, Unroll
from asyncagent.unroll import (
    Columns,
    UnrollBuffers,
    UnrollQueue,
    UnrollWriter,
    empty_unroll,
    gather_columns,
    split_columns,
)

SPEC = EnvSpec(ArraySpec((2,), "uint8"), Discrete(3), 1)


def unroll(num_envs: int, mark: int = 0) -> Unroll:
    """An unroll of T=2 whose column e carries ``10 * mark + e`` in every field."""
    made = empty_unroll(2, num_envs, SPEC, (np.zeros((num_envs, 4), np.float32),))
    columns = 10 * mark + np.arange(num_envs)
    made.observation[:] = columns[:, None]
    made.reward[:] = columns
    made.action[:] = columns
    made.core_state[0][:] = columns[:, None]
    return made


def taken(parts: list[Columns]) -> list[int]:
    return [int(part.unroll.reward[0, e]) for part in parts for e in range(part.start, part.stop)]


def drop(unroll: Unroll) -> None:
    pass


def test_batches_span_and_split_unrolls_in_order() -> None:
    """Batches of 4 from unrolls of 3 columns take every column once, oldest first."""

    async def run() -> None:
        queue = UnrollQueue(100, 4)
        for mark in range(4):
            await queue.put(unroll(3, mark), drop)
        batches = [taken(await queue.get()) for _ in range(3)]
        assert batches == [[0, 1, 2, 10], [11, 12, 20, 21], [22, 30, 31, 32]]
        assert len(queue) == 0

    asyncio.run(run())


def test_put_waits_while_the_queue_is_full() -> None:
    """The queue is the backpressure: a put beyond capacity waits until a batch is taken."""

    async def run() -> None:
        queue = UnrollQueue(4, 4)
        await queue.put(unroll(4), drop)
        waiting = asyncio.create_task(queue.put(unroll(4, 1), drop))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        await queue.get()
        await asyncio.wait_for(waiting, 30)

    asyncio.run(run())


def test_cancelled_get_loses_nothing() -> None:
    """A get that is cancelled while unrolls arrive leaves them for the next one."""

    async def run() -> None:
        queue = UnrollQueue(4, 4)
        getter = asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        await queue.put(unroll(4, 7), drop)
        getter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await getter
        assert taken(await queue.get()) == [70, 71, 72, 73]

    asyncio.run(run())


def test_cancelled_waiters_leave_nothing_behind() -> None:
    """However often a wait is given up while nothing moves, the queue does not grow by it."""

    async def run() -> None:
        queue = UnrollQueue(4, 4)
        for _ in range(3):
            getter = asyncio.create_task(queue.get())
            await asyncio.sleep(0)
            getter.cancel()
            await asyncio.wait([getter])
        assert not queue._changed

    asyncio.run(run())


def test_close_wakes_everybody_and_drains() -> None:
    """After close puts raise, whole batches can be taken, then gets raise, again and again."""

    async def run() -> None:
        queue = UnrollQueue(4, 4)
        await queue.put(unroll(6), drop)
        putter = asyncio.create_task(queue.put(unroll(4, 1), drop))
        await asyncio.sleep(0)
        queue.close()
        queue.close()
        with pytest.raises(EndOfUnrolls):
            await putter
        assert len(await queue.get()) == 1
        for _ in range(2):
            with pytest.raises(EndOfUnrolls):
                await queue.get()
            with pytest.raises(EndOfUnrolls):
                await queue.put(unroll(4), drop)

    asyncio.run(run())


def test_close_wakes_a_waiting_get() -> None:
    """A get that waits for a batch that will never be whole ends with EndOfUnrolls."""

    async def run() -> None:
        queue = UnrollQueue(4, 4)
        getter = asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        queue.close()
        with pytest.raises(EndOfUnrolls):
            await getter

    asyncio.run(run())


def test_queue_is_joined_once_all_is_released() -> None:
    """``join`` waits for columns that wait, and for those that are being learned from."""

    async def test() -> None:
        queue = UnrollQueue(8, 2)
        await queue.put(unroll(4), drop)
        joined = asyncio.create_task(queue.join())
        for last in (False, True):
            parts = await queue.get()
            await asyncio.sleep(0)
            assert not joined.done()
            queue.release(parts)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert joined.done() == last

    asyncio.run(test())


def test_buffers_come_back_when_their_last_column_is_released() -> None:
    """An unroll split over two batches is given back after both are released, once."""

    async def run() -> None:
        back: list[int] = []
        queue = UnrollQueue(4, 2)
        made = unroll(4)
        await queue.put(made, lambda unroll: back.append(id(unroll)))
        one, two = await queue.get(), await queue.get()
        queue.release(two)
        assert back == []
        queue.release(one)
        assert back == [id(made)]

    asyncio.run(run())


def test_capacity_below_a_batch_is_refused() -> None:
    """A queue that could never hold a whole batch would wait for ever: say so instead."""
    with pytest.raises(ValueError, match="capacity=2 must be >= 4"):
        UnrollQueue(2, 4)


def test_free_list_makes_only_what_is_in_use() -> None:
    """Buffers given back are handed out again."""
    buffers = UnrollBuffers(lambda: unroll(1))
    one, two = buffers.take(), buffers.take()
    buffers.give_back(one)
    assert buffers.take() is one
    assert buffers.take() is not two
    assert buffers.num_made == 3


def test_gather_keeps_columns_and_their_state_together() -> None:
    """Gathered columns carry their own observation, action and core state, in order."""
    one, two = unroll(3, 1), unroll(3, 2)
    batch = gather_columns([Columns(one, 1, 3), Columns(two, 0, 1)])
    assert batch.reward.tolist() == [[11, 12, 20]] * 3
    assert batch.action.tolist() == [[11, 12, 20]] * 2
    assert batch.observation[0, :, 0].tolist() == [11, 12, 20]
    assert batch.core_state[0][:, 0].tolist() == [11, 12, 20]
    assert batch.observation.flags.c_contiguous


@pytest.mark.parametrize("sizes", [[7], [1] * 7, [3, 1, 3], [2, 5], [6, 1]])
def test_split_covers_every_column_once(sizes: list[int]) -> None:
    """Runs have the sizes asked for and together all columns, in order."""
    parts = [Columns(unroll(3, 1), 1, 3), Columns(unroll(4, 2), 0, 4), Columns(unroll(2, 3), 0, 1)]
    runs = split_columns(parts, sizes)
    assert [mark for run in runs for mark in taken(run)] == taken(parts)
    assert [len(taken(run)) for run in runs] == sizes


@pytest.mark.parametrize("sizes", [[3, 3], [8], [7, 1], []])
def test_split_refuses_sizes_that_do_not_add_up(sizes: list[int]) -> None:
    """No column is learned from twice, none is forgotten."""
    with pytest.raises(ValueError, match="columns than the sizes add up to"):
        split_columns([Columns(unroll(4, 1), 0, 4), Columns(unroll(3, 2), 0, 3)], sizes)


def test_a_writer_wants_a_whole_unroll() -> None:
    """An unroll with a row or a choice too few is refused, and nobody gets it."""
    no = np.zeros(1, np.bool_)
    row = EnvStep(np.zeros((1, 2), np.uint8), np.zeros(1, np.float32), no, no, no, no)
    choice = PolicyStep(
        np.zeros(1, np.int64), np.zeros((1, 3), np.float32), (), np.zeros(1, np.int64)
    )
    last = np.zeros(1, np.int64)
    for rows, choices in [(3, 1), (2, 2), (2, 1)]:
        writer = UnrollWriter(empty_unroll(2, 1, SPEC, ()), ())
        for _ in range(rows):
            writer.add_row(row, last)
        for _ in range(choices):
            writer.add_choice(choice)
        with pytest.raises(ValueError):
            writer.finish()


def test_a_writer_copies_the_observation_and_lets_go_of_it() -> None:
    """An observation, a nest here, may be written to once its row is added, and is not kept."""
    spec = EnvSpec(
        {"a": ArraySpec((2,), "uint8"), "b": (ArraySpec((), "float32"),)}, Discrete(3), 1
    )
    writer = UnrollWriter(empty_unroll(1, 1, spec, ()), ())
    no, last = np.zeros(1, np.bool_), np.zeros(1, np.int64)
    kept = []
    for t in range(2):
        picture = np.full((1, 2), t, np.uint8)
        observation = {"a": picture, "b": (np.full(1, 5 + t, np.float32),)}
        kept.append(weakref.ref(picture))
        writer.add_row(EnvStep(observation, np.zeros(1, np.float32), no, no, no, no), last)
        picture[:] = 99
    del observation, picture
    assert [reference() for reference in kept] == [None, None]
    writer.add_choice(PolicyStep(last, np.zeros((1, 3), np.float32), (), last))
    unroll = writer.finish()
    assert unroll.observation["a"].tolist() == [[[0, 0]], [[1, 1]]]
    assert unroll.observation["b"][0].tolist() == [[5], [6]]
