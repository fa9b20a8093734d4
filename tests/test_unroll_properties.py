"""The unroll queue under any program of puts, gets, releases, cancellations and a close.

An oracle keeps the columns in the order in which they went in, and the buffers that are in use.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncagent.errors import EndOfUnrolls
from asyncagent.structs import ArraySpec, Discrete, EnvSpec, Unroll
from asyncagent.unroll import (
    Columns,
    UnrollBuffers,
    UnrollQueue,
    empty_unroll,
    gather_columns,
    split_columns,
)
from tests.programs import Program, programs, statements_of
from tests.virtual_clock import run_virtual, turns

SPEC = EnvSpec(ArraySpec((), "uint8"), Discrete(2), 1)


class Options(NamedTuple):
    """Of the queue, and of the groups that fill it."""

    batch_size: int
    spare: int
    """Columns that it holds beyond a batch."""
    sizes: tuple[int, ...]
    """Environments of each group."""


class Group:
    """Fills buffers of its own, and knows which of them are in use."""

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.buffers = UnrollBuffers(lambda: empty_unroll(1, num_envs, SPEC, ()))
        self.in_use: dict[int, set[int]] = {}
        """By buffer: its columns' marks that nobody has done with."""
        self.most_in_use = 0

    def fill(self, first_mark: int) -> Unroll:
        """A buffer whose column e carries the mark ``first_mark + e``."""
        unroll = self.buffers.take()
        assert id(unroll) not in self.in_use, "a buffer nobody else holds"
        marks = range(first_mark, first_mark + self.num_envs)
        unroll.reward[:] = marks
        self.in_use[id(unroll)] = set(marks)
        self.most_in_use = max(self.most_in_use, len(self.in_use))
        return unroll

    def give_back(self, unroll: Unroll) -> None:
        """What the queue calls: every column has been released by then, and this was not yet."""
        assert self.in_use.pop(id(unroll)) == set()
        self.buffers.give_back(unroll)

    def keep(self, unroll: Unroll) -> None:
        """The queue did not take it."""
        del self.in_use[id(unroll)]
        self.buffers.give_back(unroll)


class Play:
    """Plays a program on a queue, and is the oracle."""

    def __init__(self, options: Options) -> None:
        self.batch_size = options.batch_size
        self.capacity = options.batch_size + options.spare
        self.queue = UnrollQueue(self.capacity, self.batch_size)
        self.groups = [Group(size) for size in options.sizes]
        self.puts: list[asyncio.Task[None]] = []
        self.gets: list[asyncio.Task[None]] = []
        self.inside: deque[int] = deque()
        """Marks of the columns that went in and did not come out, oldest first."""
        self.held: list[tuple[list[Columns], list[int]]] = []
        """What gets gave, with the marks that it had then."""
        self.num_marks = 0
        self.closed = False

    async def put(self, group: Group) -> None:
        unroll = group.fill(self.num_marks)
        marks = range(self.num_marks, self.num_marks + group.num_envs)
        self.num_marks += group.num_envs
        try:
            await self.queue.put(unroll, group.give_back)
        except EndOfUnrolls:
            assert self.closed
            group.keep(unroll)
            return
        except asyncio.CancelledError:
            group.keep(unroll)
            raise
        assert not self.closed
        assert len(self.inside) < self.capacity, "the queue is the backpressure"
        self.inside += marks

    async def get(self) -> None:
        try:
            parts = await self.queue.get()
        except EndOfUnrolls:
            assert self.closed and len(self.inside) < self.batch_size
            return
        expected = [self.inside.popleft() for _ in range(self.batch_size)]
        assert marks_of(parts) == expected, "each column once, oldest first"
        self.held.append((parts, expected))

    # The program.

    async def play(self, name: str, number: int) -> None:
        """One statement, and what holds after each."""
        await getattr(self, f"do_{name}")(number)
        assert len(self.queue) == len(self.inside)
        for parts, marks in self.held:
            assert marks_of(parts) == marks, "what is held is not written to"

    async def do_put(self, number: int) -> None:
        group = self.groups[number % len(self.groups)]
        self.puts.append(asyncio.create_task(self.put(group)))

    async def do_get(self, number: int) -> None:
        self.gets.append(asyncio.create_task(self.get()))

    async def do_cancel(self, number: int) -> None:
        """Somebody leaves, whatever moment it is."""
        waiting = pending(self.puts) + pending(self.gets)
        if waiting:
            waiting[number % len(waiting)].cancel()

    async def do_release(self, number: int) -> None:
        """Some of a batch's columns, of any batch."""
        if not self.held:
            return
        parts, marks = self.held.pop(number % len(self.held))
        first = number % len(marks)
        if first:
            parts, rest = split_columns(parts, [first, len(marks) - first])
            self.held.append((rest, marks[first:]))
            marks = marks[:first]
        gathered = gather_columns(parts)
        assert gathered.reward[0].tolist() == marks
        for part in parts:
            for group in self.groups:
                group.in_use.get(id(part.unroll), set()).difference_update(marks)
        self.queue.release(parts)
        for group in self.groups:
            assert set() not in group.in_use.values(), "given back with its last column"

    async def do_turn(self, number: int) -> None:
        """One turn of the loop: what happens next meets things half done."""
        await asyncio.sleep(0)

    async def do_rest(self, number: int) -> None:
        """Nobody waits without a reason, and who left is forgotten."""
        await turns(4 + 2 * len(self.puts + self.gets))
        for task in self.puts + self.gets:
            if task.done() and not task.cancelled():
                task.result()
        self.puts, self.gets = pending(self.puts), pending(self.gets)
        assert not (self.closed and self.puts + self.gets)
        assert not self.puts or len(self.queue) >= self.capacity
        assert not self.gets or len(self.queue) < self.batch_size
        assert len(self.queue._changed) == len(self.puts) + len(self.gets)

    async def do_close(self, number: int) -> None:
        self.queue.close()
        self.closed = True

    async def finish(self) -> None:
        """Take all that can be taken, and see where every buffer is."""
        await self.do_rest(0)
        while self.puts or len(self.queue) >= self.batch_size:
            await self.play("get", 0)
            await self.play("rest", 0)
        await self.do_close(0)
        await self.do_rest(0)
        for _ in range(2):
            with pytest.raises(EndOfUnrolls):
                await self.queue.get()
            await self.put(self.groups[0])
        while self.held:
            await self.play("release", 0)
        left = sorted(mark for group in self.groups for marks in group.in_use.values()
                      for mark in marks)  # fmt: skip
        assert left == sorted(self.inside) and len(left) < self.batch_size
        for group in self.groups:
            assert group.buffers.num_made == group.most_in_use


def marks_of(parts: list[Columns]) -> list[int]:
    """Of the columns, in order."""
    columns: list[Any] = [part.unroll.reward[0, part.start : part.stop] for part in parts]
    return [int(mark) for mark in np.concatenate(columns)]


def pending(tasks: list[asyncio.Task[None]]) -> list[asyncio.Task[None]]:
    """Those that have not ended."""
    return [task for task in tasks if not task.done()]


OFTEN = [name for name in statements_of(Play) if name != "close"]
PROGRAMS = programs([*OFTEN, *OFTEN, *OFTEN, "put", "put", "get", "turn", "close"])
OPTIONS = st.builds(
    Options,
    st.integers(1, 6),
    st.integers(0, 6),
    st.lists(st.integers(1, 8), min_size=1, max_size=3).map(tuple),
)


def any_program(examples: int) -> None:
    """So many of them."""

    @settings(max_examples=examples, deadline=None)
    @given(PROGRAMS, OPTIONS)
    def check(program: Program, options: Options) -> None:
        async def main() -> None:
            play = Play(options)
            for name, number in program:
                await play.play(name, number)
            await play.finish()

        run_virtual(main())

    check()


def test_any_program() -> None:
    """Every wait ends, each column comes out once and in order, each buffer comes back once."""
    any_program(250)


@pytest.mark.slow
def test_many_programs() -> None:
    """The same for thousands."""
    any_program(5_000)
