"""Unroll buffers, which are reused, and the bounded queue between actors and learner."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import optree

from asyncagent.errors import EndOfUnrolls
from asyncagent.structs import (
    ActionArray,
    EnvSpec,
    EnvStep,
    Nest,
    PolicyStep,
    Unroll,
    map_nest,
)


def empty_unroll(unroll_length: int, num_envs: int, spec: EnvSpec, initial_state: Nest) -> Unroll:
    """An unroll of uninitialised arrays; ``initial_state`` gives the core state's shapes."""
    rows = (unroll_length + 1, num_envs)
    steps = (unroll_length, num_envs)
    one = spec.actions.array
    return Unroll(
        observation=map_nest(
            lambda leaf: np.empty(rows + leaf.shape, leaf.dtype), spec.observation
        ),
        reward=np.empty(rows, np.float32),
        terminated=np.empty(rows, np.bool_),
        truncated=np.empty(rows, np.bool_),
        first=np.empty(rows, np.bool_),
        last_action=np.empty(rows + one.shape, one.dtype),
        action=np.empty(steps + one.shape, one.dtype),
        behaviour_logits=np.empty((*steps, spec.actions.num_logits), np.float32),
        policy_version=np.empty(steps, np.int64),
        valid=np.empty(steps, np.bool_),
        core_state=map_nest(np.empty_like, initial_state),
    )


class UnrollWriter:
    """Writes one unroll of T steps: T+1 rows, in between T choices, then ``finish``.

    An observation is copied at once.  The arrays around it, which nobody writes to again, are
    kept until the unroll is whole: to write T of them together costs hardly more than one, and
    one costs the most where other threads have emptied the caches since the step before.
    """

    def __init__(self, unroll: Unroll, core_state: Nest) -> None:
        """``unroll`` is overwritten; ``core_state`` (copied) is that before row 0."""
        self._unroll = unroll
        self._rows: list[tuple[np.ndarray, ...]] = []
        self._choices: list[tuple[np.ndarray, ...]] = []
        optree.tree_map_(np.copyto, unroll.core_state, core_state)

    def add_row(self, row: EnvStep, last_action: ActionArray) -> None:
        """x_t and what led to it; ``last_action`` [E, ...], 0 where ``row.first``."""
        t = len(self._rows)
        if isinstance(row.observation, np.ndarray):
            np.copyto(self._unroll.observation[t], row.observation)
        else:
            optree.tree_map_(
                lambda target, value: np.copyto(target[t], value),
                self._unroll.observation,
                row.observation,
            )
        # Not the row itself: it would keep its observation.
        self._rows.append(
            (row.reward, row.terminated, row.truncated, row.first, row.lost, last_action)
        )

    def add_choice(self, choice: PolicyStep) -> None:
        """What was chosen at the row added last."""
        self._choices.append((choice.action, choice.logits, choice.policy_version))

    def finish(self) -> Unroll:
        """The unroll, whole. ValueError if there were not T+1 rows and T choices.

        Not valid are choices that go nowhere: those at end rows and lost rows, and where the
        environment was lost on the way to the next row.
        """
        unroll = self._unroll
        reward, terminated, truncated, first, losts, last_action = zip(*self._rows, strict=True)
        action, logits, policy_version = zip(*self._choices, strict=True)
        _join(reward, unroll.reward)
        _join(terminated, unroll.terminated)
        _join(truncated, unroll.truncated)
        _join(first, unroll.first)
        _join(last_action, unroll.last_action)
        _join(action, unroll.action)
        _join(logits, unroll.behaviour_logits)
        _join(policy_version, unroll.policy_version)
        lost = np.array(losts)
        nowhere = unroll.terminated | unroll.truncated | lost
        np.logical_not(nowhere[:-1] | lost[1:], out=unroll.valid)
        return unroll


def _join(arrays: Sequence[np.ndarray], out: np.ndarray) -> None:
    """Write arrays [E, ...], one for each t, to ``out`` [t, E, ...], which is contiguous."""
    np.concatenate(arrays, out=out.reshape(-1, *out.shape[2:]))


class UnrollBuffers:
    """Free list of one group's unrolls; the queue's bound bounds how many there ever are."""

    def __init__(self, make: Callable[[], Unroll]) -> None:
        self._make = make
        self._free: list[Unroll] = []
        self.num_made = 0

    def take(self) -> Unroll:
        """A buffer nobody else holds."""
        if self._free:
            return self._free.pop()
        self.num_made += 1
        return self._make()

    def give_back(self, unroll: Unroll) -> None:
        """Return a buffer that nobody reads any more."""
        self._free.append(unroll)


class Columns(NamedTuple):
    """Environment columns [start, stop) of an unroll."""

    unroll: Unroll
    start: int
    stop: int
    origin: str = ""
    """Who played them: level and actor."""


class _Queued:
    """An unroll in the queue: how far it has been taken, and how much of that is still in use."""

    __slots__ = ("columns", "give_back", "in_use", "origin", "taken", "unroll")

    def __init__(self, unroll: Unroll, give_back: Callable[[Unroll], None], origin: str) -> None:
        self.unroll = unroll
        self.give_back = give_back
        self.origin = origin
        self.columns = unroll.reward.shape[1]
        self.taken = 0
        self.in_use = self.columns


class UnrollQueue:
    """Bounded queue of unrolls that hands out batches of exactly B columns.

    ``put`` waits while ``capacity`` columns are waiting: this is the backpressure on the actors.
    Unrolls stay in the queue until a whole batch is there, so a cancelled ``get`` loses nothing.
    """

    def __init__(self, capacity: int, batch_size: int) -> None:
        if capacity < batch_size:
            raise ValueError(
                f"capacity={capacity} must be >= {batch_size}: the learner takes a whole batch "
                "at once"
            )
        self._capacity = capacity
        self._batch_size = batch_size
        self._waiting: deque[_Queued] = deque()
        self._held: dict[int, _Queued] = {}
        self._columns = 0
        self._closed = False
        self._changed: deque[asyncio.Future[None]] = deque()
        self._empty = asyncio.Event()

    def __len__(self) -> int:
        """Columns waiting."""
        return self._columns

    async def put(
        self, unroll: Unroll, give_back: Callable[[Unroll], None], origin: str = ""
    ) -> None:
        """Add an unroll; ``give_back(unroll)`` is called once its last column is released.

        ``origin`` says who played it, and stays with its columns.

        Raises EndOfUnrolls once the queue is closed.
        """
        while self._columns >= self._capacity and not self._closed:
            await self._wait()
        if self._closed:
            raise EndOfUnrolls
        queued = _Queued(unroll, give_back, origin)
        self._waiting.append(queued)
        self._columns += queued.columns
        self._wake()

    async def get(self) -> list[Columns]:
        """Take batch_size columns, oldest first; give them to ``release`` when done.

        Raises EndOfUnrolls once the queue is closed and holds less than a batch.
        """
        while self._columns < self._batch_size:
            if self._closed:
                raise EndOfUnrolls
            await self._wait()
        parts: list[Columns] = []
        missing = self._batch_size
        while missing:
            queued = self._waiting[0]
            stop = min(queued.columns, queued.taken + missing)
            parts.append(Columns(queued.unroll, queued.taken, stop, queued.origin))
            missing -= stop - queued.taken
            queued.taken = stop
            self._held[id(queued.unroll)] = queued
            if stop == queued.columns:
                self._waiting.popleft()
        self._columns -= self._batch_size
        self._wake()
        return parts

    def release(self, parts: list[Columns]) -> None:
        """Say that nobody reads these columns any more."""
        for part in parts:
            queued = self._held[id(part.unroll)]
            queued.in_use -= part.stop - part.start
            if queued.in_use == 0:
                del self._held[id(part.unroll)]
                queued.give_back(part.unroll)
        if not self._columns and not self._held:
            self._empty.set()

    async def join(self) -> None:
        """Wait until every column has been taken and released."""
        while self._columns or self._held:
            self._empty.clear()
            await self._empty.wait()

    def close(self) -> None:
        """Refuse further unrolls and wake everybody; whole batches can still be taken."""
        self._closed = True
        self._wake()

    async def _wait(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._changed.append(future)
        try:
            await future
        except asyncio.CancelledError:
            with contextlib.suppress(ValueError):  # woken and cancelled at once
                self._changed.remove(future)
            raise

    def _wake(self) -> None:
        # A future only wakes: whoever wakes looks again, so a cancelled waiter loses nothing.
        while self._changed:
            future = self._changed.popleft()
            if not future.done():
                future.set_result(None)


def gather_columns(parts: list[Columns]) -> Unroll:
    """One contiguous unroll [T+1, B, ...] of all the columns, in their order."""
    slices = [
        map_nest(
            lambda leaf, part=part: leaf[:, part.start : part.stop],
            part.unroll._replace(core_state=()),
        )
        for part in parts
    ]
    states = [
        map_nest(lambda leaf, part=part: leaf[part.start : part.stop], part.unroll.core_state)
        for part in parts
    ]
    rows = map_nest(lambda *leaves: np.concatenate(leaves, axis=1), *slices)
    core_state = map_nest(lambda *leaves: np.concatenate(leaves, axis=0), *states)
    unroll: Unroll = rows._replace(core_state=core_state)
    return unroll


def origins_of(parts: list[Columns]) -> tuple[str, ...]:
    """Who played each of the columns, in their order."""
    return tuple(part.origin for part in parts for _ in range(part.start, part.stop))


def split_columns(parts: list[Columns], sizes: Iterable[int]) -> list[list[Columns]]:
    """Cut the columns of ``parts`` into runs of the given sizes, in order.

    ValueError if the sizes do not add up to the columns that there are.
    """
    runs: list[list[Columns]] = []
    waiting = deque(parts)
    for size in sizes:
        runs.append([])
        while size:
            if not waiting:
                raise ValueError("there are fewer columns than the sizes add up to")
            part = waiting.popleft()
            end = min(part.stop, part.start + size)
            runs[-1].append(part._replace(stop=end))
            size -= end - part.start
            if end < part.stop:
                waiting.appendleft(part._replace(start=end))
    if waiting:
        raise ValueError("there are more columns than the sizes add up to")
    return runs
