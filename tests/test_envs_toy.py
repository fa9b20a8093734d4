"""catch, cartpole and memory: their rows in next-step form, their rewards and their seeds."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import numpy as np
import pytest

from asyncagent.config import Config
from asyncagent.envs import env_spec, make_group
from asyncagent.structs import EnvStep, IntArray

Choose = Callable[[EnvStep], IntArray]


def play(
    level_name: str,
    choose: Choose,
    num_rows: int,
    *,
    num_envs: int = 4,
    first: int = 0,
    seed: int = 1,
) -> list[EnvStep]:
    """Rows of ``num_rows`` steps of ``choose`` (and the reset's before them)."""

    async def main() -> list[EnvStep]:
        config = Config(level_name=level_name, num_action_repeats=1, env_threads=1)
        group = make_group(
            config,
            level_name=config.level_name,
            num_envs=num_envs,
            first_env_index=first,
            seed=seed,
        )
        async with asyncio.timeout(60):
            rows = [await group.reset()]
            while len(rows) <= num_rows:
                rows.append(await group.step(choose(rows[-1])))
            await group.close()
        return rows

    return asyncio.run(main())


def always(action: int) -> Choose:
    return lambda row: np.full(len(row.reward), action)


def memorise() -> Choose:
    """Remember the cue of the first row, say it all the time."""
    cue = np.zeros(0, np.int64)

    def choose(row: EnvStep) -> IntArray:
        nonlocal cue
        shown = row.observation[:, :2].argmax(axis=1)
        cue = shown if row.first.all() else np.where(row.first, shown, cue)
        return cue.copy()

    return choose


def balance(row: EnvStep) -> IntArray:
    """Hold cartpole's pole up for as long as the limit allows."""
    weights = np.array([0.05, 0.1, 1.0, 0.5], np.float32)
    return np.where(row.observation @ weights > 0, 1, 0)


@pytest.mark.parametrize("level_name", ["catch", "cartpole", "memory"])
def test_rows_fit_the_spec_and_the_contract(level_name: str) -> None:
    """Shapes and dtypes are the spec's; first follows end; rows handed out never change."""
    copies: list[bytes] = []

    def choose(row: EnvStep) -> IntArray:
        copies.append(b"".join(np.ascontiguousarray(field).tobytes() for field in row[:5]))
        return np.arange(4) % 2

    rows = play(level_name, choose, 80)
    spec = env_spec(Config(level_name=level_name, num_action_repeats=1))
    assert rows[0].first.all()
    ends = 0
    for before, row in itertools.pairwise(rows):
        assert row.observation.shape == (4, *spec.observation.shape)
        assert row.observation.dtype == spec.observation.dtype
        assert row.reward.dtype == "float32" and row.first.dtype == "bool"
        assert (row.first == (before.terminated | before.truncated)).all()
        assert not row.reward[row.first].any()
        assert not (row.terminated & row.truncated).any()
        assert len(row.episodes) == (row.terminated | row.truncated).sum()
        ends += len(row.episodes)
    assert ends > 0
    for row, copy in zip(rows, copies, strict=False):
        assert b"".join(np.ascontiguousarray(field).tobytes() for field in row[:5]) == copy


@pytest.mark.parametrize("level_name", ["catch", "cartpole", "memory"])
def test_environments_are_seeded_by_index(level_name: str) -> None:
    """Environment 2 is the same in a group of its own; another index or seed is another."""
    together = play(level_name, always(0), 60, num_envs=4)
    apart = play(level_name, always(0), 60, num_envs=2, first=2)
    other = play(level_name, always(0), 60, num_envs=2, first=2, seed=2)

    def rows(played: list[EnvStep], column: int) -> bytes:
        return b"".join(row.observation[column].tobytes() for row in played)

    assert rows(together, 2) == rows(apart, 0) and rows(together, 3) == rows(apart, 1)
    assert len({rows(together, 2), rows(together, 3), rows(other, 0), rows(other, 1)}) == 4


def test_cartpole_is_truncated_at_500() -> None:
    """A pole held up ends by the time limit, not by the rules; a fallen one terminates."""
    rows = play("cartpole", balance, 501)
    assert not any(row.terminated.any() for row in rows)
    assert [n for n, row in enumerate(rows) if row.truncated.all()] == [500]
    assert [(game.episode_return, game.steps) for game in rows[500].episodes] == [(500, 500)] * 4
    assert rows[501].first.all()
    fallen = play("cartpole", always(0), 30)
    assert any(row.terminated.any() for row in fallen)
    assert not any(row.truncated.any() for row in fallen)


def test_catch_rewards_at_the_ninth_step() -> None:
    """Every ninth row ends an episode with +1 or -1; a paddle under the ball catches it."""

    def follow(row: EnvStep) -> IntArray:
        ball = row.observation[:, :9].max(axis=1).argmax(axis=1)
        paddle = row.observation[:, 9].argmax(axis=1)
        return np.where(ball < paddle, 0, np.where(ball > paddle, 2, 1))

    rows = play("catch", follow, 39)
    assert [n for n, row in enumerate(rows) if row.terminated.all()] == [9, 19, 29, 39]
    assert not any(row.truncated.any() for row in rows)
    games = [game for row in rows for game in row.episodes]
    assert {(game.episode_return, game.steps) for game in games} == {(1.0, 9)}
    assert [n for n, row in enumerate(rows) if row.reward.any()] == [9, 19, 29, 39]


def test_memory_episode() -> None:
    """Cue, 5 to 10 waiting rows, question, end row with the answer's reward; then a new cue."""
    rows = play("memory", memorise(), 2000, num_envs=1)
    letters = ["".join("01wq"[k] for k in np.flatnonzero(row.observation[0])) for row in rows]
    starts = [n for n, row in enumerate(rows) if row.first[0]]
    waits = set()
    for start, next_start in itertools.pairwise(starts):
        cue, *wait, question, end = letters[start:next_start]
        assert (cue in "01", set(wait), question, end) == (True, {"w"}, "q", "")
        waits.add(len(wait))
        rewards = [float(row.reward[0]) for row in rows[start:next_start]]
        assert rewards == [0.0] * (len(rewards) - 1) + [1.0]
        (game,) = rows[next_start - 1].episodes
        assert (game.episode_return, game.steps) == (1.0, len(rewards) - 1)
    assert waits == set(range(5, 11))
    assert {letters[start] for start in starts} == {"0", "1"}


def test_memory_needs_memory() -> None:
    """Any constant answer is worth nothing on average, and the wrong answer costs a point."""
    rows = play("memory", always(1), 2000, num_envs=16)
    returns = [game.episode_return for row in rows for game in row.episodes]
    assert set(returns) == {-1.0, 1.0} and len(returns) > 2000
    assert abs(np.mean(returns)) < 0.05
    for env in range(16):
        cue = -1
        for row in rows:
            if row.first[env]:
                cue = int(row.observation[env, :2].argmax())
            if row.terminated[env]:
                assert row.reward[env] == (1 if cue == 1 else -1)


def test_only_the_answer_counts() -> None:
    """What is done while memory's cue is shown or one waits changes no reward."""

    def only_when_asked(row: EnvStep) -> IntArray:
        answer = remembered(row)
        return np.where(row.observation[:, 3] == 1, answer, 1 - answer)

    remembered = memorise()
    rows = play("memory", only_when_asked, 200)
    assert {game.episode_return for row in rows for game in row.episodes} == {1.0}
