"""Whether every row comes out of group, actor, batcher and queue at its place.

The environments show their number and how many rows they have shown; everything else in a row,
and all that is chosen at it, follows from these two by the rules at the top of ``structs``, which
are written out here a second time.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import numpy as np

from asyncagent.actor import act
from asyncagent.batcher import DynamicBatcher
from asyncagent.envs.pool import PoolGroup, Rows
from asyncagent.selftest.outcome import Failed, require
from asyncagent.structs import (
    ArraySpec,
    Discrete,
    EnvSpec,
    EnvStep,
    FloatArray,
    IntArray,
    Nest,
    PolicyStep,
    Unroll,
)
from asyncagent.tasks import first_of
from asyncagent.unroll import UnrollQueue, gather_columns

NUM_ACTIONS = 5
T = 7
GROUPS = (2, 3)
"""Environments of each group."""
BATCH = 4
"""Columns: no multiple of a group."""
BATCHES = 12
LENGTHS = (4, 1, 6, 7, 13)
"""Steps of every episode, by environment: shorter than, as long as and longer than an unroll."""


class Row(NamedTuple):
    """What must stand in the unrolls for row ``n`` of environment ``e``."""

    reward: float
    first: bool
    terminated: bool
    truncated: bool
    last_action: int
    action: int
    logit: float
    valid: bool
    state_before: float
    """The core state counts rows since ``first``; this is before it is zeroed."""


def expected(e: int, n: int) -> Row:
    """By the rules: an episode is a first row and ``LENGTHS[e]`` more, the last its end row."""
    period = LENGTHS[e] + 1
    episode, position = divmod(n, period)
    first, end = position == 0, position == LENGTHS[e]
    cut = episode % 2 == 1
    return Row(
        reward=0.0 if first else points(e, n),
        first=first,
        terminated=end and not cut,
        truncated=end and cut,
        last_action=0 if first else chosen(e, n - 1),
        action=chosen(e, n),
        logit=0.25 * n - e,
        valid=not end,
        state_before=0.0 if n == 0 else (n - 1) % period + 1.0,
    )


def points(e: int, n: int) -> float:
    """The reward that led to row ``n``."""
    return 100.0 * e + n


def chosen(e: int, n: int) -> int:
    """The action at row ``n``; never 0, which stands for none."""
    return 1 + (3 * n + e) % (NUM_ACTIONS - 1)


class Counters:
    """The ``Engine`` of environments ``start ... start + count - 1``."""

    def __init__(self, start: int, count: int) -> None:
        self.spec = EnvSpec(ArraySpec((2,), "float32"), Discrete(NUM_ACTIONS), 1)
        self.num_envs = count
        self.strays: list[str] = []
        """Actions that were not those of their row."""
        self._envs = range(start, start + count)
        self._n = 0

    def reset(self) -> Rows:
        """See ``Engine``."""
        return self._rows()

    def step(self, action: IntArray) -> Rows:
        """See ``Engine``."""
        for e, taken in zip(self._envs, action.tolist(), strict=True):
            if expected(e, self._n).valid and taken != chosen(e, self._n):
                self.strays.append(f"row {self._n} of environment {e} was sent action {taken}")
        self._n += 1
        return self._rows()

    def close(self) -> None:
        """See ``Engine``."""

    def _rows(self) -> Rows:
        rows = [expected(e, self._n) for e in self._envs]
        terminated = np.array([row.terminated for row in rows])
        truncated = np.array([row.truncated for row in rows])
        shown = np.array([[e, self._n] for e in self._envs], np.float32)
        reward = np.array([row.reward for row in rows], np.float32)
        return Rows(shown, reward, terminated, truncated, terminated | truncated)


def choose(
    observation: FloatArray, reward: FloatArray, last_action: IntArray, first: np.ndarray,
    core_state: Nest,
) -> PolicyStep:  # fmt: skip
    """The policy: rows [N, ...]; its version is the row's number, its state counts rows."""
    pairs = observation.astype(np.int64).tolist()
    (count,) = core_state
    count = np.where(first[:, None], 0, count) + 1
    logits = np.array([[expected(e, n).logit] * NUM_ACTIONS for e, n in pairs], np.float32)
    action = np.array([chosen(e, n) for e, n in pairs])
    version = np.array([n for _, n in pairs])
    return PolicyStep(action, logits, (count.astype(np.float32),), version)


def check() -> str:
    """Two groups of different size play through one batcher into one queue; every row is read."""
    try:
        return asyncio.run(_play())
    except BaseExceptionGroup as failures:
        raise first_of(failures) from None


async def _play() -> str:
    starts = np.cumsum((0, *GROUPS)).tolist()
    engines = [Counters(start, count) for start, count in zip(starts, GROUPS, strict=False)]
    groups = [
        PoolGroup(engine, level_name="counter", name=f"counter-{index}")
        for index, engine in enumerate(engines)
    ]
    queue = UnrollQueue(2 * BATCH, BATCH)
    reader = Reader()
    with DynamicBatcher(choose, 1, sum(GROUPS), timeout_ms=1.0) as batcher:
        async with asyncio.TaskGroup() as tasks:
            actors = [
                tasks.create_task(
                    act(group, batcher, queue.put, T, _nothing_yet(group.num_envs), _unseen)
                )
                for group in groups
            ]
            try:
                for _ in range(BATCHES):
                    parts = await queue.get()
                    reader.read(gather_columns(parts))
                    queue.release(parts)
            finally:
                for actor in actors:
                    actor.cancel()
        for group in groups:
            await group.close()
    for engine in engines:
        if engine.strays:
            raise Failed(engine.strays[0])
    rows, ends, seams = reader.totals()
    counts = batcher.statistics()
    return (
        f"{rows:,} rows of {len(LENGTHS)} environments, {ends} ends, {seams} seams; "
        f"{counts.batches} batches of {counts.requests} requests"
    )


def _nothing_yet(num_envs: int) -> Nest:
    return (np.zeros((num_envs, 1), np.float32),)


def _unseen(row: EnvStep) -> None:
    """Nobody looks at rows before they are in an unroll."""


class Reader:
    """Compares batches with what must be in them, and counts what it has compared."""

    def __init__(self) -> None:
        self._rows = 0
        self._ends, self._seams = [0] * len(LENGTHS), [0] * len(LENGTHS)
        self._next = [0] * len(LENGTHS)

    def totals(self) -> tuple[int, int, int]:
        """Rows with an action, ends and seams; Failed unless all that there must be were seen."""
        wanted = BATCHES * BATCH * T
        require(self._rows == wanted, f"{self._rows} rows came out of the queue, must be {wanted}")
        for what, counts in (("end", self._ends), ("seam", self._seams)):
            none = [e for e, count in enumerate(counts) if count == 0]
            require(not none, f"no {what} came out of the queue of environments {none}")
        return self._rows, sum(self._ends), sum(self._seams)

    def read(self, batch: Unroll) -> None:
        """One batch [T+1, B]; Failed names the first thing that is out of place."""
        for column in range(batch.reward.shape[1]):
            shown = batch.observation[:, column].astype(int).tolist()
            e, start = shown[0]
            require(0 <= e < len(LENGTHS), f"an unroll is of environment {e}, which there is not")
            require(
                shown == [[e, start + t] for t in range(T + 1)],
                f"an unroll's rows are {shown}: not consecutive rows of one environment",
            )
            before = self._next[e]
            require(
                start == before,
                f"environment {e}: an unroll begins with row {start}, must with {before}, "
                "the last row of the one before it",
            )
            self._seams[e] += start > 0
            self._next[e] = start + T
            for t in range(T + 1):
                row = expected(e, start + t)
                self._read_row(batch, column, t, row, f"row {start + t} of {e}")
                if t < T:  # row T is the next unroll's first
                    self._rows += 1
                    self._ends[e] += not row.valid

    def _read_row(self, batch: Unroll, column: int, t: int, row: Row, where: str) -> None:
        fields = ["reward", "first", "terminated", "truncated", "last_action"]
        if t < T:  # row T carries no action
            fields += ["action", "valid"]
            logits = batch.behaviour_logits[t, column].tolist()
            same = logits == [row.logit] * NUM_ACTIONS
            require(same, f"{where}: logits {logits}, must be {row.logit}")
            version, shown = batch.policy_version[t, column], batch.observation[t, column, 1]
            require(version == shown, f"{where}: policy version {version}")
        if t == 0:
            state = batch.core_state[0][column, 0]
            require(
                state == row.state_before,
                f"{where}: the core state before it is {state}, must be {row.state_before}",
            )
        for field in fields:
            found, wanted = getattr(batch, field)[t, column], getattr(row, field)
            require(bool(found == wanted), f"{where}: {field} is {found}, must be {wanted}")
