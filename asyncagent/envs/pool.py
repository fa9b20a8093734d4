"""PoolGroup: an environment group over any engine that blocks, on a thread of its own.

An *engine* steps E environments with one blocking call.  ``PoolGroup`` runs that call, and the
accounting of the rows it brings, as one job on one named thread, so that the event loop never
waits and an engine is only ever touched from one thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from asyncagent.envs.base import EpisodeTracker, check_action
from asyncagent.errors import ActorLost
from asyncagent.structs import ActionArray, BoolArray, EnvSpec, EnvStep, FloatArray, Nest
from asyncagent.threads import NamedThread


class Rows(NamedTuple):
    """What an engine returns: one row of each of its E environments, in their order."""

    observation: Nest
    """[E, ...]; the engine never writes to it again."""
    reward: FloatArray
    """float32 [E]: all points since the previous row, unclipped; 0 if the game was restarted."""
    terminated: BoolArray
    """bool [E]: the episode ended by the rules. Never together with ``truncated``."""
    truncated: BoolArray
    """bool [E]: a time limit cut the episode off."""
    game_over: BoolArray
    """bool [E]: with the episode the whole game ended; only where one of the two is True."""


class Engine(Protocol):
    """E environments stepped by blocking calls, all of them from one thread."""

    spec: EnvSpec
    num_envs: int

    def reset(self) -> Rows:
        """The first row of every environment. Called once, before ``step``."""
        ...

    def step(self, action: ActionArray) -> Rows:
        """The next row; after an end row it opens an episode, whatever ``action`` [E] says."""
        ...

    def close(self) -> None:
        """Let the emulators go. Called once, after the last ``step`` returned."""
        ...


@runtime_checkable
class Saves(Protocol):
    """What an engine may offer: to save itself, and to go on from there in another process."""

    def state(self) -> dict[str, Any]:
        """All that the rows to come depend on: numbers, strings, lists and dicts of them."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where ``state()`` was taken; instead of ``reset``."""
        ...


class PoolGroup:
    """The ``EnvGroup`` over an engine.

    A step that is cancelled still happens: its row is dropped, the next step goes on from there.
    """

    def __init__(
        self, engine: Engine, *, level_name: str, name: str, close_timeout_s: float = 5.0
    ) -> None:
        """Take over ``engine``; callable from any thread.

        Args:
          level_name: goes into the group's ``Episode`` records.
          name: of the group's thread, e.g. ``env-0``.
          close_timeout_s: how long ``close`` waits for a call that may never return.
        """
        self.spec = engine.spec
        self.num_envs = engine.num_envs
        self.name = name
        self._engine = engine
        self._close_timeout_s = close_timeout_s
        self._thread = NamedThread(name)
        self._pending: set[asyncio.Future[EnvStep]] = set()
        self._closing: asyncio.Future[None] | None = None
        # Only the group's thread touches what follows.
        self._tracker = EpisodeTracker(engine.num_envs, level_name)
        self._ended: BoolArray | None = None
        self._failure: BaseException | None = None

    async def reset(self) -> EnvStep:
        """The first row of every environment, ``first`` everywhere. Raises as ``step`` does."""
        return await self._run(self._first_row)

    async def step(self, action: ActionArray) -> EnvStep:
        """The row that follows ``action`` [E, ...]; end rows' entries are ignored.

        Raises:
          ActorLost: the group is closed, or the engine has failed before.
          ValueError: ``action`` has the wrong shape, type or range; nothing was stepped.
          RuntimeError: ``reset`` has not been called.
          Exception: whatever the engine raised.
        """
        return await self._run(self._next_row, action)

    @property
    def can_save(self) -> bool:
        """Whether ``state`` and ``restore`` are to be had."""
        return isinstance(self._engine, Saves)

    async def state(self) -> dict[str, Any]:
        """All that the rows to come depend on: numbers, strings, lists and dicts of them."""
        return await self._thread.run(self._save)

    async def restore(self, state: dict[str, Any]) -> None:
        """Go on where ``state()`` was taken; instead of ``reset``."""
        await self._thread.run(self._restore, state)

    def progress(self) -> None:
        """Nothing: what goes on inside a pool's call cannot be seen."""

    async def close(self) -> None:
        """Fail pending steps with ActorLost and let the engine go; harmless when repeated.

        The engine is let go on its own thread, after the call it is in.  If that call does not
        return within ``close_timeout_s`` the (daemon) thread is left behind with it.
        """
        if self._closing is None:
            for step in self._pending:
                if not step.done():
                    step.set_exception(self._lost("was closed while it stepped"))
            self._closing = self._thread.run(self._engine.close)
            self._thread.close()
        done, _ = await asyncio.wait({self._closing}, timeout=self._close_timeout_s)
        for closing in done:
            closing.result()

    async def _run(self, job: Callable[..., EnvStep], *args: ActionArray) -> EnvStep:
        if self._closing is not None:
            raise self._lost("is closed")
        future = self._thread.run(job, *args)
        self._pending.add(future)
        try:
            return await future
        finally:
            self._pending.discard(future)

    def _lost(self, why: str) -> ActorLost:
        return ActorLost(f"environment group {self.name!r} {why}")

    def _first_row(self) -> EnvStep:
        if self._ended is not None:
            raise RuntimeError(f"environment group {self.name!r} was reset before")
        rows = self._call(self._engine.reset)
        return self._account(rows, np.ones(self.num_envs, np.bool_))

    def _next_row(self, action: ActionArray) -> EnvStep:
        if self._ended is None:
            raise RuntimeError(f"environment group {self.name!r} steps before its reset")
        check_action(action, self.num_envs, self.spec.actions)
        rows = self._call(self._engine.step, action)
        return self._account(rows, self._ended)

    def _save(self) -> dict[str, Any]:
        assert isinstance(self._engine, Saves) and self._ended is not None
        return {
            "engine": self._engine.state(),
            "games": self._tracker.state(),
            "ended": self._ended.tolist(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        assert isinstance(self._engine, Saves)
        self._engine.restore(state["engine"])
        self._tracker.restore(state["games"])
        self._ended = np.array(state["ended"], np.bool_)

    def _call(self, function: Callable[..., Rows], *args: ActionArray) -> Rows:
        if self._failure is not None:
            raise self._lost("has failed before") from self._failure
        try:
            return function(*args)
        except BaseException as error:
            self._failure = error
            raise

    def _account(self, rows: Rows, first: BoolArray) -> EnvStep:
        # The tracker comes before the zeroing: what an opening scored belongs to the game.
        episodes = self._tracker.update(rows.reward, first, rows.game_over, rows.truncated)
        reward = np.where(first, np.float32(0), rows.reward)
        self._ended = rows.terminated | rows.truncated
        lost = np.zeros(self.num_envs, np.bool_)
        return EnvStep(
            rows.observation, reward, rows.terminated, rows.truncated, first, lost, episodes
        )
