"""WorkerGroup: an environment group in a worker process of its own, which heals itself.

Observations of a row are views of memory that the worker writes to: they stay as they are until
the step after the next one is asked for (see ``shared.NUM_SLOTS``).
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from asyncagent.envs.base import EnvRecipe, check_action
from asyncagent.envs.process import WorkerDied, WorkerProcess
from asyncagent.envs.shared import (
    EVENTS,
    MESSAGE,
    NUM_SLOTS,
    ONLY_LOST,
    ROW,
    Hello,
    SharedArrays,
    arrays_in,
    next_seed,
    read_message,
    spec_from_json,
)
from asyncagent.errors import ActorLost, UsageError
from asyncagent.placement import cores
from asyncagent.structs import ActionArray, EnvSpec, EnvStep, Episode, Loss, map_nest
from asyncagent.threads import NamedThread

GOOD_STEPS = 1000
"""Steps after which an environment's earlier failures are forgotten, as after an episode's end."""

MAX_STARTING = min(8, 2 * cores())
"""Workers of one event loop that start at the same time: many games started at once can hang."""

# The groups of a loop keep their semaphore alive; with them its reference to the loop goes.
_log = logging.getLogger(__name__)

_turns: weakref.WeakValueDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore]
_turns = weakref.WeakValueDictionary()


def pause_s(failures: int) -> float:
    """Seconds to wait before an environment that failed so often in a row is made anew."""
    return 0.0 if failures <= 1 else min(0.1 * 2.0**failures, 10.0)


class WorkerGroup:
    """The ``EnvGroup`` over E environments in one worker process.

    An environment that raises is replaced: its column is ``lost`` in the row that was awaited, and
    the next row is the replacement's first; its neighbours do not notice.  A process that dies,
    hangs or talks nonsense is replaced likewise, with all its environments.

    A step that is cancelled still happens: its row is dropped, the next step goes on from there.
    """

    def __init__(
        self,
        recipe: EnvRecipe,
        spec: EnvSpec,
        *,
        level_name: str,
        seeds: Sequence[int],
        name: str,
        timeout_s: float,
        max_failures: int,
        niceness: int = 0,
        core: int | None = None,
        pause_s: Callable[[int], float] = pause_s,
        close_timeout_s: float = 5.0,
    ) -> None:
        """Start nothing yet; callable from any thread.

        Args:
          recipe: how the worker makes an environment.
          spec: what environments must be like.
          level_name: goes into the group's ``Episode`` and ``Loss`` records.
          seeds: one per environment; replacements get others, which follow from them.
          name: of the worker, e.g. ``env-0``.
          timeout_s: the worker is replaced if one call of one environment takes longer.
          max_failures: give up once an environment, or the worker with none of its environments at
            work, failed so often without ending an episode or 1,000 steps in between; >= 1.
          niceness: added to the worker's nice value, in [0, 19].
          core: the one core that the worker and what it starts may use; None: any.
          pause_s: ``pause_s(failures in a row)``, seconds to wait before a replacement is made.
          close_timeout_s: how long ``close`` waits for the environments to be closed.

        Raises UsageError if the recipe's options are not JSON.
        """
        Hello(recipe, tuple(seeds), spec, niceness, core).encode()
        self.spec = spec
        self.num_envs = len(seeds)
        self.name = name
        self._recipe = recipe
        self._level_name = level_name
        self._seeds = list(seeds)
        self._timeout_s = timeout_s
        self._niceness = niceness
        self._core = core
        self._pause_s = pause_s
        self._close_timeout_s = close_timeout_s
        self._failures = Failures(self.num_envs, max_failures)
        self._num_losses = 0
        # Most rows' terminated, truncated, first and lost; nobody writes to a row.
        self._no_flags = (np.zeros(self.num_envs, np.bool_),) * 4
        self._process: WorkerProcess | None = None
        self._arrays: SharedArrays | None = None
        self._alive = False
        self._fresh = False
        self._preparing: asyncio.Task[None] | None = None
        self._not_started: OSError | None = None
        self._turns: asyncio.Semaphore | None = None
        self._pause_due_s = 0.0
        self._slot = 0
        self._asked = False
        self._was_reset = False
        self._opened = False
        self._failure: Exception | None = None
        self._closed = False

    async def reset(self) -> EnvStep:
        """The first row of every environment, ``first`` everywhere. Raises as ``step`` does.

        What fails on the way is replaced until all are there, and told of in ``losses``.
        """
        self._check_usable()
        if self._was_reset:
            raise RuntimeError(f"environment group {self.name!r} was reset before")
        self._was_reset = True
        row = await self._row()
        losses = row.losses
        while row.lost.any():
            row = await self._row()
            losses += row.losses
        self._opened = True
        return row._replace(losses=losses)

    async def step(self, action: ActionArray) -> EnvStep:
        """The row that follows ``action`` [E, ...]; see ``EnvGroup``.

        Raises:
          ActorLost: the group is closed, or its limit of failures is reached.
          UsageError: the recipe makes no environment, or none as the spec says.
          ValueError: ``action`` has the wrong shape, type or range; nothing was stepped.
          RuntimeError: ``reset`` has not been called.
        """
        self._check_usable()
        if not self._opened:
            raise RuntimeError(f"environment group {self.name!r} steps before its reset")
        check_action(action, self.num_envs, self.spec.actions)
        if self._asked:
            await self._take_row()  # of a step that was cancelled
        return await self._row(action)

    def progress(self) -> Any:
        """Rows, losses, and how far the worker has come with the pending row."""
        marks = () if self._process is None else self._process.marks()
        return (self._failures.rows, self._num_losses, marks)

    async def close(self) -> None:
        """Fail a pending step with ActorLost and let the worker go; harmless when repeated."""
        self._closed = True
        if self._preparing is not None:
            self._preparing.cancel()
            await asyncio.wait({self._preparing})
        if self._process is not None:
            await self._process.end(self._close_timeout_s)
            # Whoever still holds this group, a traceback perhaps, shall not hold its memory.
            if self._arrays is not None:
                self._arrays = None
                self._process.forget_memory()

    async def _row(self, action: ActionArray | None = None) -> EnvStep:
        """The next row; without an action, another try at what is lost in the one before."""
        if not self._alive or self._pause_due_s > 0:
            if self._preparing is None:
                self._preparing = asyncio.create_task(self._prepare())
            # Not cancelled with us: the next step goes on waiting for it.
            await asyncio.wait({self._preparing})
            self._check_usable()
            preparing, self._preparing = self._preparing, None
            preparing.result()
            if not self._alive:
                why = f"worker process did not start: {self._not_started}"
                return self._lose_all(WorkerDied(why, None))
        assert self._process is not None and self._arrays is not None
        if self._fresh:
            self._fresh = False
            self._slot = request = 0
        elif action is None:
            request = self._slot + ONLY_LOST
        else:
            self._slot = request = (self._slot + 1) % NUM_SLOTS
            np.copyto(self._arrays.actions, action)
        self._process.ask(request)
        self._asked = True
        return await self._take_row()

    async def _prepare(self) -> None:
        """Pause where that is due; start a worker where there is none."""
        await asyncio.sleep(self._pause_due_s)
        self._pause_due_s = 0.0
        if self._alive:
            return
        if self._process is not None:
            await self._process.end(0)
        loop = asyncio.get_running_loop()
        self._turns = turns = _turns.setdefault(loop, asyncio.Semaphore(MAX_STARTING))
        await turns.acquire()
        try:
            hello = Hello(self._recipe, tuple(self._seeds), self.spec, self._niceness, self._core)
            self._process = WorkerProcess(self.name, hello, self._timeout_s, turns.release)
        except OSError as error:
            turns.release()
            self._not_started = error
            return
        self._arrays = arrays_in(self._process.memory, self.spec, self.num_envs)
        self._alive = self._fresh = True

    async def _take_row(self) -> EnvStep:
        """The row that was asked for. Cancelled, it can be had later."""
        process = self._process
        assert process is not None
        try:
            while (answer := process.take()) is None:
                await process.news()
            self._asked = False
            self._check_usable()
            if answer == ROW:
                return self._read_row(has_events=False)
            if answer == EVENTS:
                return self._read_row(has_events=True)
            if answer == MESSAGE:
                return self._read_row(has_events=True, failed=self._failed(process))
            raise WorkerDied(f"worker process talks nonsense: {answer!r}", None)
        except WorkerDied as death:
            self._asked = False
            self._check_usable()
            process.give_up(str(death))
            return self._lose_all(death)

    def _failed(self, process: WorkerProcess) -> list[tuple[int, str]]:
        """Indices and reasons of the environments that the worker says have failed.

        Raises:
          UsageError: it says that it cannot make any, and has never made them all.
          WorkerDied: it says something else.
        """
        try:
            message = read_message(process.memory)
            if "usage_error" in message:
                reason = str(message["usage_error"])
                if self._opened:
                    raise WorkerDied(f"an environment cannot be made: {reason}", None)
                raise self._fail(UsageError(reason))
            return [(range(self.num_envs)[i], str(reason)) for i, reason in message["losses"]]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise WorkerDied(f"worker process talks nonsense: {error!r}", None) from error

    def _read_row(self, *, has_events: bool, failed: Sequence[tuple[int, str]] = ()) -> EnvStep:
        """The row that lies in the slot."""
        assert self._arrays is not None
        row = self._arrays.rows[self._slot]
        self._failures.rows += 1
        if not has_events:
            return EnvStep(row.observation, row.reward.copy(), *self._no_flags)
        terminated, truncated, first, lost = row.flags.copy()
        episodes = tuple(
            Episode(
                self._level_name,
                float(row.game_return[i]),
                int(row.game_steps[i]),
                int(i),
                bool(truncated[i]),
            )
            for i in np.flatnonzero(terminated | truncated)
        )
        for episode in episodes:
            self._failures.ended(episode.env_index)
        losses = tuple(self._lose(i, reason) for i, reason in failed)
        for loss in losses:
            self._blame(loss.env_index, loss)
        reward = row.reward.copy()
        return EnvStep(
            row.observation, reward, terminated, truncated, first, lost, episodes, losses
        )

    def _lose_all(self, death: WorkerDied) -> EnvStep:
        """The row of a worker that died."""
        self._alive = False
        losses = tuple(self._lose(i, str(death)) for i in range(self.num_envs))
        self._blame(death.env_index, losses[death.env_index or 0])
        terminated, truncated, first, lost = np.zeros((4, self.num_envs), np.bool_)
        lost[:] = True
        observation = map_nest(
            lambda leaf: np.zeros((self.num_envs, *leaf.shape), leaf.dtype), self.spec.observation
        )
        reward = np.zeros(self.num_envs, np.float32)
        return EnvStep(observation, reward, terminated, truncated, first, lost, (), losses)

    def _lose(self, i: int, reason: str) -> Loss:
        loss = Loss(self._level_name, self._seeds[i], i, reason)
        self._seeds[i] = next_seed(self._seeds[i])
        self._num_losses += 1
        _log.warning(
            "%s: environment %d of level %s, seed %d, is being replaced: %s",
            self.name, i, loss.level_name, loss.seed, reason,
        )  # fmt: skip
        return loss

    def _blame(self, env_index: int | None, loss: Loss) -> None:
        """Count a failure of an environment, or of the worker itself; ActorLost at the limit."""
        failures = self._failures.failed(env_index)
        self._pause_due_s = max(self._pause_due_s, self._pause_s(failures))
        if failures < self._failures.limit:
            return
        who = "its worker" if env_index is None else f"environment {env_index}"
        output = "" if self._process is None else self._process.output()
        raise self._fail(
            ActorLost(
                f"environment group {self.name!r}, level {loss.level_name}: {who} failed "
                f"{failures} times without ending an episode or {GOOD_STEPS:,} steps in between, "
                f"at last with seed {loss.seed}: {loss.reason}\n"
                f"last output of the worker:\n{output or '(none)'}"
            )
        ) from None

    def _fail(self, error: Exception) -> Exception:
        self._failure = error
        if self._process is not None:
            self._process.give_up("its group has failed")
        return error

    def _check_usable(self) -> None:
        if self._closed:
            raise ActorLost(f"environment group {self.name!r} is closed")
        if self._failure is not None:
            raise ActorLost(f"environment group {self.name!r} has failed before") from self._failure


class Failures:
    """Who failed how often without doing well in between."""

    def __init__(self, num_envs: int, limit: int) -> None:
        self.limit = limit
        self.rows = 0
        """Rows until now; to be counted up by whoever sees them."""
        self._num_envs = num_envs
        # The worker's own come last.
        self._counts = [0] * (num_envs + 1)
        self._failed_row = [0] * (num_envs + 1)
        self._ended_row = [0] * (num_envs + 1)

    def ended(self, env_index: int) -> None:
        """The environment finished an episode with the last of ``rows``."""
        self._ended_row[env_index] = self._ended_row[-1] = self.rows

    def failed(self, env_index: int | None) -> int:
        """Failures of the environment (None: of the worker itself) in a row, this one included."""
        i = self._num_envs if env_index is None else env_index
        if max(self._ended_row[i], self.rows - GOOD_STEPS) > self._failed_row[i]:
            self._counts[i] = 0
        self._counts[i] += 1
        self._failed_row[i] = self.rows
        return self._counts[i]


def probe_spec(recipe: EnvRecipe, *, timeout_s: float) -> EnvSpec:
    """The spec of an environment made for the purpose, in a worker; blocks, from any thread.

    Raises:
      UsageError: the recipe makes no environment, by its own account.
      ActorLost: the worker died or took longer than ``timeout_s``; shows its last output.
    """
    answer: Future[EnvSpec] = Future()

    def probe() -> None:
        try:
            answer.set_result(asyncio.run(_probe(recipe, timeout_s)))
        except BaseException as error:
            answer.set_exception(error)

    # A loop of its own, on a thread of its own: ours may be running; and Ctrl-C leaves both behind.
    thread = NamedThread("probe")
    thread.submit(probe)
    thread.close()
    return answer.result()


async def _probe(recipe: EnvRecipe, timeout_s: float) -> EnvSpec:
    process = WorkerProcess("probe", Hello(recipe, (1,), None), timeout_s, lambda: None)
    try:
        process.ask(0)
        while process.take() is None:
            await process.news()
        words = read_message(process.memory)
    except WorkerDied as death:
        output = process.output() or "(none)"
        raise ActorLost(f"{recipe.maker}: {death}\nlast output of the worker:\n{output}") from None
    finally:
        await process.end(5.0)
    if "usage_error" in words:
        raise UsageError(words["usage_error"])
    return spec_from_json(words["spec"])
