"""Gymnasium's environments and the user's own are learnt, whatever their spaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncagent.config import resolve
from asyncagent.evaluation import evaluate
from asyncagent.loop import train

pytestmark = pytest.mark.slow


def mean_return(logdir: Path, level_name: str, **flags: Any) -> float:
    """Train in a run of its own with a fixed seed; mean return of 200 fresh games."""
    small: dict[str, Any] = {"num_actors": 16, "batch_size": 4, "reward_clipping": "none"}
    config = resolve(level_name, logdir=str(logdir), seed=1, **(small | flags))
    train(config)
    return evaluate(logdir, 200).mean


def test_cartpole_is_learnt(tmp_path: Path) -> None:
    """gym:CartPole-v1 stands for at least 400 of 500 steps; random play for 22."""
    assert mean_return(tmp_path, "gym:CartPole-v1", total_environment_frames=400_000) >= 400


def test_pendulum_is_learnt(tmp_path: Path) -> None:
    """With real-numbered actions Pendulum swings up: -300 or better; random play has -1,200."""
    flags = {"reward_clipping": "soft_asymmetric", "discounting": 0.9}
    returned = mean_return(tmp_path, "gym:Pendulum-v1", total_environment_frames=400_000, **flags)
    assert returned >= -300


def test_every_part_of_an_action_is_learnt(tmp_path: Path) -> None:
    """All three switches of a MultiDiscrete action are set right, 10 points; chance is 3.6."""
    level = "tests.my_envs:Switches"
    flags: dict[str, Any] = {"total_environment_frames": 80_000, "discounting": 0.5}
    assert mean_return(tmp_path, level, **flags) >= 9.5


def test_picture_and_vector_are_both_used(tmp_path: Path) -> None:
    """What only a picture and a vector together say is worth 10 points; their sum 7.5."""
    level = "tests.my_envs:Mirror"
    flags: dict[str, Any] = {"total_environment_frames": 80_000, "net": "shallow"}
    assert mean_return(tmp_path, level, **flags) >= 9.5
