"""PoolGroup: rows, flags, games, threads, failures and the end of a group."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from asyncagent.envs.pool import PoolGroup, Rows
from asyncagent.errors import ActorLost
from asyncagent.structs import ArraySpec, Discrete, EnvSpec, Episode, IntArray

STAY = np.zeros(2, np.int64)


class ScriptedEngine:
    """Two environments; the row's number is the observation and the reward.

    ``terminated``, ``truncated`` and ``game_over`` hold (row, environment) pairs.  Row ``hangs``
    waits for ``go_on``; row ``fails`` raises.
    """

    def __init__(
        self,
        terminated: set[tuple[int, int]] | None = None,
        truncated: set[tuple[int, int]] | None = None,
        game_over: set[tuple[int, int]] | None = None,
        hangs: int = -1,
        fails: int = -1,
    ) -> None:
        self.spec = EnvSpec(ArraySpec((1,), "float32"), Discrete(3), 1)
        self.num_envs = 2
        self.tape: list[str] = []
        self.threads: set[str] = set()
        self.hanging = threading.Event()
        self.go_on = threading.Event()
        self._flags = [pairs or set() for pairs in (terminated, truncated, game_over)]
        self._hangs = hangs
        self._fails = fails
        self._row = -1

    def _next(self, what: str) -> Rows:
        self.tape.append(what)
        self.threads.add(threading.current_thread().name)
        self._row += 1
        if self._row == self._hangs:
            self.hanging.set()
            self.go_on.wait()
        if self._row == self._fails:
            raise OSError("emulator on fire")
        flags = [np.array([(self._row, e) in pairs for e in range(2)]) for pairs in self._flags]
        reward = np.full(2, self._row, np.float32)
        return Rows(np.full((2, 1), self._row, np.float32), reward, *flags)

    def reset(self) -> Rows:
        return self._next("reset")

    def step(self, action: IntArray) -> Rows:
        return self._next(f"step {action.tolist()}")

    def close(self) -> None:
        self.tape.append("close")
        self.threads.add(threading.current_thread().name)


def make(engine: ScriptedEngine, close_timeout_s: float = 60.0) -> PoolGroup:
    return PoolGroup(engine, level_name="script", name="env-7", close_timeout_s=close_timeout_s)


def run(body: Callable[[PoolGroup], Awaitable[None]], engine: ScriptedEngine) -> None:
    """Run ``body`` on a fresh group over ``engine`` and close the group."""

    async def main() -> None:
        group = make(engine)
        async with asyncio.timeout(60):
            await body(group)
            await group.close()

    asyncio.run(main(), debug=True)


def test_first_row_follows_every_end_row() -> None:
    """The reset row is first; later exactly the rows after end rows are, per environment."""
    engine = ScriptedEngine(terminated={(2, 0)}, truncated={(3, 1)}, game_over={(2, 0), (3, 1)})

    async def body(group: PoolGroup) -> None:
        rows = [await group.reset()] + [await group.step(STAY) for _ in range(5)]
        assert [row.first.tolist() for row in rows] == [
            [True, True],
            [False, False],
            [False, False],
            [True, False],
            [False, True],
            [False, False],
        ]
        assert [row.reward.tolist() for row in rows] == [
            [0, 0],
            [1, 1],
            [2, 2],
            [0, 3],
            [4, 0],
            [5, 5],
        ]
        assert [row.terminated.tolist()[0] for row in rows] == [False, False, True] + [False] * 3
        assert [row.truncated.tolist()[1] for row in rows] == [False] * 3 + [True, False, False]
        assert all(row.reward.dtype == np.float32 for row in rows)
        assert [row.observation[0, 0] for row in rows] == list(range(6))

    run(body, engine)


def test_game_spans_life_losses() -> None:
    """A game's return holds all its points, openings included; its steps leave first rows out."""
    engine = ScriptedEngine(terminated={(2, 0), (4, 0), (4, 1)}, game_over={(4, 0), (4, 1)})

    async def body(group: PoolGroup) -> None:
        rows = [await group.reset()] + [await group.step(STAY) for _ in range(4)]
        assert [len(row.episodes) for row in rows] == [0, 0, 0, 0, 2]
        # Environment 0 loses a life in row 2: row 3 opens the next episode of the same game.
        assert rows[4].episodes == (
            Episode("script", 0 + 1 + 2 + 3 + 4, 3, 0),
            Episode("script", 0 + 1 + 2 + 3 + 4, 4, 1),
        )

    run(body, engine)


def test_engine_lives_on_one_named_thread() -> None:
    """reset, step and close of the engine all run on the group's own thread."""
    engine = ScriptedEngine()

    async def body(group: PoolGroup) -> None:
        await group.reset()
        await group.step(np.array([2, 1]))

    run(body, engine)
    assert engine.threads == {"env-7"}
    assert engine.tape == ["reset", "step [2, 1]", "close"]


def test_loop_runs_while_the_engine_blocks() -> None:
    """Other coroutines go on while a step blocks: here, one of them ends the blocking."""
    engine = ScriptedEngine(hangs=1)

    async def body(group: PoolGroup) -> None:
        await group.reset()
        step = asyncio.create_task(group.step(STAY))
        while not engine.hanging.is_set():
            await asyncio.sleep(0)
        engine.go_on.set()
        assert (await step).reward.tolist() == [1, 1]

    run(body, engine)


def test_engine_failure_comes_out_of_step() -> None:
    """What the engine raises comes out of step, and every later step says what happened."""
    engine = ScriptedEngine(fails=2)

    async def body(group: PoolGroup) -> None:
        await group.reset()
        await group.step(STAY)
        with pytest.raises(OSError, match="emulator on fire"):
            await group.step(STAY)
        for _ in range(2):
            with pytest.raises(ActorLost, match="'env-7' has failed before") as caught:
                await group.step(STAY)
            assert isinstance(caught.value.__cause__, OSError)

    run(body, engine)
    assert engine.tape == ["reset", "step [0, 0]", "step [0, 0]", "close"]


@pytest.mark.parametrize(
    "action",
    [np.zeros(3, np.int64), np.zeros(2, np.float32), np.array([0, 3]), np.array([-1, 0])],
)
def test_impossible_action_is_refused(action: IntArray) -> None:
    """An action of the wrong shape, type or range steps nothing and harms nothing."""
    engine = ScriptedEngine()

    async def body(group: PoolGroup) -> None:
        await group.reset()
        with pytest.raises(ValueError, match="action must be"):
            await group.step(action)
        assert (await group.step(STAY)).reward.tolist() == [1, 1]

    run(body, engine)


def test_reset_comes_first_and_once() -> None:
    """A step before the reset and a second reset are refused."""

    async def body(group: PoolGroup) -> None:
        with pytest.raises(RuntimeError, match="before its reset"):
            await group.step(STAY)
        await group.reset()
        with pytest.raises(RuntimeError, match="was reset before"):
            await group.reset()

    run(body, ScriptedEngine())


def test_cancelled_step_loses_its_row_only() -> None:
    """A cancelled step happens, its row is dropped, and the next step brings the row after."""
    engine = ScriptedEngine(hangs=1)

    async def body(group: PoolGroup) -> None:
        await group.reset()
        step = asyncio.create_task(group.step(STAY))
        while not engine.hanging.is_set():
            await asyncio.sleep(0)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        engine.go_on.set()
        assert (await group.step(STAY)).reward.tolist() == [2, 2]

    run(body, engine)


def test_close_twice() -> None:
    """close lets the engine go once, however often it is called; then steps raise ActorLost."""
    engine = ScriptedEngine()

    async def body(group: PoolGroup) -> None:
        await group.reset()
        await asyncio.gather(group.close(), group.close())
        await group.close()
        for _ in range(2):
            with pytest.raises(ActorLost, match="'env-7' is closed"):
                await group.step(STAY)

    run(body, engine)
    assert engine.tape == ["reset", "close"]


def test_close_during_a_hanging_step() -> None:
    """close fails the pending step and returns although the engine hangs for good."""
    engine = ScriptedEngine(hangs=1)

    async def main() -> None:
        group = make(engine, close_timeout_s=0.01)
        await group.reset()
        step = asyncio.create_task(group.step(STAY))
        while not engine.hanging.is_set():
            await asyncio.sleep(0)
        async with asyncio.timeout(60):
            await group.close()
            with pytest.raises(ActorLost, match="closed while it stepped"):
                await step
            assert engine.tape == ["reset", "step [0, 0]"]
            engine.go_on.set()
            await group.close()

    asyncio.run(main())


def test_failing_close_is_not_hidden() -> None:
    """What the engine raises when it is let go comes out of close."""

    class Stubborn(ScriptedEngine):
        def close(self) -> None:
            raise OSError("will not go")

    async def main() -> None:
        async with asyncio.timeout(60):
            with pytest.raises(OSError, match="will not go"):
                await make(Stubborn()).close()

    asyncio.run(main())
