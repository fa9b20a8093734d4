"""Games by quota: fixed shares, lost games played again, few groups at a time, nothing left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

import asyncagent.games as games_module
from asyncagent.envs.base import EnvGroup
from asyncagent.errors import ActorLost, Stalled
from asyncagent.games import Job, Played, plan, play, play_group, shares
from asyncagent.structs import EnvStep, Episode, IntArray
from tests.fakes import CounterGroup, CountingPolicy
from tests.virtual_clock import VirtualClockLoop

WATCHDOG_S = 60.0


async def ignore(row: EnvStep) -> None:
    """Nobody looks at the rows."""


async def played(group: EnvGroup, quotas: Sequence[int]) -> Played:
    """Games that environments in a group play; nothing may take longer than a minute."""
    policy = CountingPolicy()
    state = policy.initial_state(group.num_envs)
    return await play_group(group, policy, state, quotas, lambda episode: None, ignore, 60.0)


async def play_all(
    jobs: Sequence[Job], make: Callable[[Job], EnvGroup], num_lanes: int = 2,
    on_episode: Callable[[Episode, int], None] = lambda episode, left: None,
) -> list[Played]:  # fmt: skip
    policy = CountingPolicy()
    async with asyncio.timeout(60):
        return await play(
            jobs,
            make,
            policy,
            policy.initial_state,
            num_lanes=num_lanes,
            stall_timeout_s=60.0,
            on_episode=on_episode,
        )


@given(st.integers(1, 500), st.integers(1, 64))
def test_shares_are_even(total: int, parts: int) -> None:
    """Shares add up to the whole and differ by at most one."""
    found = shares(total, parts)
    assert len(found) == parts
    assert sum(found) == total
    assert max(found) - min(found) <= 1


@given(st.integers(1, 4), st.integers(1, 300), st.integers(1, 64), st.integers(1, 16))
def test_plan_is_the_same_on_every_machine(
    num_levels: int, num_episodes: int, max_envs: int, num_lanes: int
) -> None:
    """How a level is split into groups changes neither its environments nor their quotas."""
    levels = [f"level_{index}" for index in range(num_levels)]
    jobs = plan(levels, num_episodes, max_envs, num_lanes)
    for level in levels:
        mine = [job for job in jobs if job.level_name == level]
        quotas: list[int] = []
        for job in mine:
            assert job.first_env_index == len(quotas)
            quotas += job.quotas
        assert quotas == shares(num_episodes, min(num_episodes, max_envs))
        assert len(mine) <= num_lanes
    assert num_lanes * max(len(job.quotas) for job in jobs) < max_envs + num_lanes


def test_short_games_are_not_favoured() -> None:
    """With quotas 2 and 2, a game of 50 steps counts as often as one of 2 steps."""
    episodes, _ = asyncio.run(played(CounterGroup([[2], [50]]), [2, 2]))
    assert sorted(episode.steps for episode in episodes) == [2, 2, 50, 50]


def test_lost_game_is_played_again() -> None:
    """A game lost with its environment does not count; its replacement plays in its stead."""
    # Environment 0 ends its first game at row 3, and is lost on the way to row 6, in its second.
    group = CounterGroup([[3], [4]], lost=[(0, 6)])
    episodes, env_losses = asyncio.run(played(group, [2, 1]))
    assert [(episode.env_index, episode.steps) for episode in episodes] == [(0, 3), (1, 4), (0, 3)]
    # The replacement opens at row 7: rewards 8, 9, 10; the first game's were 1, 2, 3.
    assert [episode.episode_return for episode in episodes if episode.env_index == 0] == [6, 27]
    assert env_losses == 1


def test_lost_environment_is_told_of_no_action() -> None:
    """What follows a loss is told last_action 0, as in training."""
    seen: list[tuple[bool, int]] = []

    class Noting(CountingPolicy):
        async def __call__(self, observation, reward, last_action, first, core_state):  # type: ignore[no-untyped-def]
            seen.append((bool(first[0]), int(last_action[0])))
            return await super().__call__(observation, reward, last_action, first, core_state)

    policy = Noting()
    group = CounterGroup([[4]], lost=[(0, 2)])
    asyncio.run(
        play_group(group, policy, policy.initial_state(1), [1], lambda episode: None, ignore, 60.0)
    )
    # Rows 0 ... 6: the action at row n is n % 3; row 2 is lost, row 3 opens.
    assert seen == [
        (True, 0),
        (False, 0),
        (False, 0),
        (True, 0),
        (False, 0),
        (False, 1),
        (False, 2),
    ]


class Counted(CounterGroup):
    """Keeps a tape of who opens and closes."""

    def __init__(self, job: Job, tape: list[str]) -> None:
        super().__init__([[3]] * len(job.quotas))
        self.tape = tape
        tape.append("open")

    async def close(self) -> None:
        assert not self.closed
        await super().close()
        self.tape.append("close")


def test_few_groups_at_a_time() -> None:
    """All jobs are played, results in their order, at most as many groups alive as lanes."""
    tape: list[str] = []
    jobs = plan([f"level_{index}" for index in range(7)], 5, max_envs=4, num_lanes=3)
    left: list[int] = []
    results = asyncio.run(
        play_all(jobs, lambda job: Counted(job, tape), 3, lambda episode, n: left.append(n))
    )
    assert [len(result.episodes) for result in results] == [sum(job.quotas) for job in jobs]
    assert left == list(range(34, -1, -1))
    alive = [tape[:n].count("open") - tape[:n].count("close") for n in range(len(tape) + 1)]
    assert max(alive) == 3
    assert alive[-1] == 0


class Failing(Counted):
    """Its environments fail again and again."""

    async def step(self, action: IntArray) -> EnvStep:
        raise ActorLost("level_2 failed 5 times")


def test_failing_level_closes_the_others() -> None:
    """What a group raises comes out, and no group stays open."""
    tape: list[str] = []

    def make(job: Job) -> EnvGroup:
        return (Failing if job.level_name == "level_2" else Counted)(job, tape)

    jobs = plan(["level_1", "level_2", "level_3"], 1000, max_envs=4, num_lanes=2)
    with pytest.raises(ExceptionGroup) as failures:
        asyncio.run(play_all(jobs, make))
    assert failures.group_contains(ActorLost, match="level_2 failed 5 times")
    assert tape.count("open") == tape.count("close") > 0


def test_film_of_an_unfinished_game_is_dropped() -> None:
    """A recorder sees every row from the first, and is closed where the games end early."""
    tape: list[str] = []

    class Taping:
        done = False

        def on_row(self, row: EnvStep) -> None:
            tape.append(f"row {row.observation[0, 0]:.0f} on {threading.current_thread().name}")

        def close(self) -> None:
            tape.append(f"close on {threading.current_thread().name}")

    class FailsLater(CounterGroup):
        async def step(self, action: IntArray) -> EnvStep:
            if len(self.actions) == 2:
                raise ActorLost("gone")
            return await super().step(action)

    job = Job("level", 0, (5,), Taping())
    with pytest.raises(ExceptionGroup):
        asyncio.run(play_all([job], lambda job: FailsLater([[9]])))
    assert tape == [*(f"row {index} on video" for index in range(3)), "close on video"]


def test_group_made_too_late_is_closed() -> None:
    """A group whose making outlives the test's cancellation is closed, too."""
    tape: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        making = asyncio.Event()

        def make(job: Job) -> EnvGroup:
            # The test is cancelled before this returns: the loop runs what is asked of it in turn.
            asyncio.run_coroutine_threadsafe(_set(making), loop).result(60)
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(60)
            return Counted(job, tape)

        task = asyncio.create_task(play_all([Job("level", 0, (1,))], make, 1))
        await making.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def _set(event: asyncio.Event) -> None:
        event.set()

    asyncio.run(main())
    assert tape == ["open", "close"]


def test_group_that_takes_long_to_make_holds_no_end_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The games end while it is being made; when it is there at last, it is closed."""
    monkeypatch.setattr(games_module, "MAKING_S", 0.01)
    tape: list[str] = []
    release = threading.Event()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        begun = asyncio.Event()

        def make(job: Job) -> EnvGroup:
            loop.call_soon_threadsafe(begun.set)
            assert release.wait(WATCHDOG_S)
            return Counted(job, tape)

        task = asyncio.create_task(play_all([Job("level", 0, (1,))], make, 1))
        async with asyncio.timeout(WATCHDOG_S):
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert tape == []
            release.set()
            while tape != ["open", "close"]:
                await asyncio.sleep(0.001)

    asyncio.run(main())


@pytest.mark.parametrize("stuck", ["reset", "step", "inference"])
def test_no_answer_is_no_silence(stuck: str) -> None:
    """Environments or inference that never answer end the games with a message that says which."""

    class Stuck(CounterGroup):
        async def reset(self) -> EnvStep:
            return await (asyncio.Future() if stuck == "reset" else super().reset())

        async def step(self, action: IntArray) -> EnvStep:
            return await (asyncio.Future() if stuck == "step" else super().step(action))

    class StuckPolicy(CountingPolicy):
        async def __call__(self, *rows):  # type: ignore[no-untyped-def]
            return await (asyncio.Future() if stuck == "inference" else super().__call__(*rows))

    policy = StuckPolicy()
    with (
        asyncio.Runner(loop_factory=VirtualClockLoop) as runner,
        pytest.raises(Stalled, match=f"{stuck} has not ended within 300 s"),
    ):
        runner.run(
            play_group(
                Stuck([[3]]),
                policy,
                policy.initial_state(1),
                [1],
                lambda episode: None,
                ignore,
                300,
            )
        )
