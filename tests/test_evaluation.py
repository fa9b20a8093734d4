"""Evaluation: fixed quotas, every game counts once, fresh seeds."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncagent.config import resolve
from asyncagent.errors import CheckpointError, UsageError
from asyncagent.evaluation import _play, evaluate, quotas
from asyncagent.loop import train
from asyncagent.structs import Episode
from tests.fakes import CounterGroup, CountingPolicy


@given(st.integers(1, 500), st.integers(1, 64))
def test_quotas_share_the_games_evenly(num_episodes: int, num_envs: int) -> None:
    """Quotas add up to the games asked for and differ by at most one."""
    shares = quotas(num_episodes, num_envs)
    assert len(shares) == num_envs
    assert sum(shares) == num_episodes
    assert max(shares) - min(shares) <= 1


def test_short_games_are_not_favoured() -> None:
    """With quotas 2 and 2, a game of 50 steps counts as often as one of 2 steps."""
    group = CounterGroup([[2], [50]])
    policy = CountingPolicy()
    seen: list[Episode] = []
    episodes = asyncio.run(_play(group, policy, policy.initial_state(2), [2, 2], seen.append))
    assert sorted(episode.steps for episode in episodes) == [2, 2, 50, 50]
    assert seen == episodes


def test_evaluate_plays_the_newest_checkpoint(tmp_path: Path) -> None:
    """Every game asked for is played; the same seed gives games of the same kind as JSON tells."""
    train(resolve("catch", logdir=str(tmp_path), total_environment_frames=3000))
    result = evaluate(tmp_path, 37)
    assert len(result.returns) == len(result.steps) == 37
    assert set(result.returns) <= {-1.0, 1.0}
    assert result.frames >= 3000
    told = json.loads(result.to_json())
    assert told["num_episodes"] == 37
    assert told["mean"] == pytest.approx(result.mean)


def test_nothing_to_play(tmp_path: Path) -> None:
    """No games, or no checkpoint, is said in one line."""
    with pytest.raises(UsageError, match="test_num_episodes=0 must be >= 1"):
        evaluate(tmp_path, 0)
    with pytest.raises(UsageError, match="seed=-1 must be in"):
        evaluate(tmp_path, 1, seed=-1)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        evaluate(tmp_path, 1)
