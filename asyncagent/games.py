"""Games played by quota: groups of environments, a few at a time, that share one policy.

Every environment has a quota of games, fixed before the first one begins, and every game counts:
the first N to finish would favour short games.  A game that is lost with its environment is
played again.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from asyncagent.actor import Infer, action_that_led_to
from asyncagent.envs.base import EnvGroup
from asyncagent.errors import Stalled
from asyncagent.structs import EnvStep, Episode, Nest
from asyncagent.threads import NamedThread
from asyncagent.video import Camera

TICKS = 8
"""Of a stall's time: a program that was suspended comes back to one late tick."""

MAKING_S = 5.0
"""Longest that an end waits for a group that is just being made; then it is closed behind it."""

R = TypeVar("R")

_closing: set[asyncio.Future[None]] = set()
"""The event loop alone would forget them."""


class Job(NamedTuple):
    """The games that one group of environments plays."""

    level_name: str
    first_env_index: int
    quotas: tuple[int, ...]
    """Of each environment; as many environments as quotas."""
    recorder: Camera | None = None
    """Films the first game of the group's first environment."""
    max_steps: int | None = None
    """The job ends after so many, whatever has been played until then; None: only by quota."""


class Played(NamedTuple):
    """What came of a job."""

    episodes: tuple[Episode, ...]
    """The games that count, in the order in which they ended."""
    env_losses: int
    """Environments that crashed or hung."""


def shares(total: int, parts: int) -> list[int]:
    """``total`` split into ``parts`` whole numbers that differ by at most one."""
    share, rest = divmod(total, parts)
    return [share + (index < rest) for index in range(parts)]


def plan(levels: Sequence[str], num_episodes: int, max_envs: int, num_lanes: int) -> list[Job]:
    """The jobs, level after level, that come to ``num_episodes`` games of each level.

    Which environment plays how many games depends on ``num_episodes`` and ``max_envs`` alone, not
    on the groups they are split into.

    Args:
      max_envs: environments of one level.
      num_lanes: groups alive at a time; each level is split into so many.
    """
    quotas = shares(num_episodes, min(num_episodes, max_envs))
    sizes = shares(len(quotas), min(len(quotas), num_lanes))
    firsts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        Job(level, first, tuple(quotas[first : first + size]))
        for level in levels
        for first, size in zip(firsts, sizes, strict=True)
    ]


async def play(
    jobs: Sequence[Job], make: Callable[[Job], EnvGroup], infer: Infer,
    initial_state: Callable[[int], Nest], *, num_lanes: int, stall_timeout_s: float,
    on_episode: Callable[[Episode, int], None],
) -> list[Played]:  # fmt: skip
    """Play all jobs in turn, ``num_lanes`` at a time; every group made is closed at the end.

    Args:
      make: makes a job's group; called on a thread.
      initial_state: core state of so many rows.
      on_episode: called with each game that counts and the number of games still to play.

    Raises:
      BaseExceptionGroup: whatever a group, ``make``, inference or a recorder raised.
    """
    waiting = deque(enumerate(jobs))
    left = sum(sum(job.quotas) for job in jobs)
    played: dict[int, Played] = {}
    builder, films = NamedThread("build-envs"), NamedThread("video")

    def count(episode: Episode) -> None:
        nonlocal left
        left -= 1
        on_episode(episode, left)

    async def lane() -> None:
        while waiting:
            index, job = waiting.popleft()
            group = await _made(job, make, builder)
            film = _Film(job.recorder, films)
            try:
                played[index] = await play_group(
                    group, infer, initial_state(group.num_envs), job.quotas,
                    count, film.on_row, stall_timeout_s, job.max_steps,
                )  # fmt: skip
            finally:
                await group.close()
                await film.close()

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(num_lanes):
                tasks.create_task(lane())
    finally:
        builder.close()
        films.close()
    return [played[index] for index in range(len(jobs))]


async def _made(job: Job, make: Callable[[Job], EnvGroup], builder: NamedThread) -> EnvGroup:
    making = builder.run(make, job)
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        # The thread goes on making it: left to nobody, its processes would outlive these games.
        await asyncio.wait({making}, timeout=MAKING_S)
        if making.done():
            await making.result().close()
        else:
            making.add_done_callback(_close_soon)
        raise


def _close_soon(making: asyncio.Future[EnvGroup]) -> None:
    if not making.cancelled() and making.exception() is None:
        closing = asyncio.ensure_future(making.result().close())
        _closing.add(closing)
        closing.add_done_callback(_closing.discard)


class _Film:
    """A job's recorder, if it has one, worked on the thread for it."""

    def __init__(self, recorder: Camera | None, thread: NamedThread) -> None:
        self._recorder = recorder
        self._thread = thread

    async def on_row(self, row: EnvStep) -> None:
        if self._recorder is not None and not self._recorder.done:
            await self._thread.run(self._recorder.on_row, row)

    async def close(self) -> None:
        if self._recorder is not None:
            await self._thread.run(self._recorder.close)


async def play_group(
    group: EnvGroup, infer: Infer, core_state: Nest, quotas: Sequence[int],
    on_episode: Callable[[Episode], None], on_row: Callable[[EnvStep], Awaitable[None]],
    stall_timeout_s: float, max_steps: int | None = None,
) -> Played:  # fmt: skip
    """Play until environment i has ended ``quotas[i]`` games; further games do not count.

    Args:
      core_state: before the first row, nest of float32 [E, ...].
      on_row: awaited with every row, the first included.
      max_steps: end after so many, whatever has been played until then.

    Raises:
      Stalled: no answer from the group, or from inference, within ``stall_timeout_s``.
    """
    left = list(quotas)
    episodes: list[Episode] = []
    num_losses = 0
    one = group.spec.actions.array
    last_action = np.zeros((group.num_envs, *one.shape), one.dtype)
    row = await _soon(group.reset(), "an environment's reset", stall_timeout_s)
    await on_row(row)
    steps = range(max_steps) if max_steps is not None else itertools.count()
    for _ in steps:
        if not any(left):
            break
        answer = infer(row.observation, row.reward, last_action, row.first, core_state)
        choice = await _soon(answer, "inference", stall_timeout_s)
        core_state = choice.core_state
        row = await _soon(group.step(choice.action), "an environment's step", stall_timeout_s)
        last_action = action_that_led_to(row, choice.action)
        await on_row(row)
        num_losses += len(row.losses)
        for episode in row.episodes:
            if left[episode.env_index]:
                left[episode.env_index] -= 1
                episodes.append(episode)
                on_episode(episode)
    return Played(tuple(episodes), num_losses)


async def _soon(answer: Awaitable[R], what: str, timeout_s: float) -> R:
    loop = asyncio.get_running_loop()
    deadline = asyncio.timeout(None)
    timer: asyncio.TimerHandle

    def tick(left: int) -> None:
        nonlocal timer
        if left == 0:
            deadline.reschedule(loop.time())
        timer = loop.call_later(timeout_s / TICKS, tick, left - 1)

    tick(TICKS)
    try:
        async with deadline:
            return await answer
    except TimeoutError:
        if not deadline.expired():
            raise
        raise Stalled(
            f"{what} has not ended within {timeout_s:.0f} s (--stall_timeout_s)"
        ) from None
    finally:
        timer.cancel()
