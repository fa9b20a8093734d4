"""Training goes on while environments crash, hang and fail to start, and counts every step once."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncagent.config import resolve
from asyncagent.errors import ActorLost
from asyncagent.learner import Learner
from asyncagent.loop import train
from asyncagent.unroll import Columns, gather_columns
from tests import breaking_envs

LEVEL = "tests.breaking_envs:Breaking"


NUM_LOSSES = 1 + 2 * 5
"""One column for the exception, a group's two for each of the other five faults."""


@pytest.fixture
def consumed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> list[np.ndarray[Any, Any]]:
    """What every valid step that was learned from led to: (steps in life, seed, process).

    The run is asked to stop 100 updates after the last loss was reported.
    """
    outcomes: list[np.ndarray[Any, Any]] = []
    update = Learner.update
    left = 100

    def record(self: Learner, parts: list[Columns]) -> None:
        nonlocal left
        batch = gather_columns(parts)
        outcomes.append(batch.observation[1:][batch.valid])
        update(self, parts)
        left -= caplog.text.count("is being replaced") >= NUM_LOSSES
        if left == 0:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Learner, "update", record)
    return outcomes


def test_training_survives_every_fault_and_counts_no_frame_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, consumed: list[np.ndarray[Any, Any]]
) -> None:
    """An exception in step, SIGKILL, a segfault, a hang and workers that do not start: each costs
    its own columns alone, is reported, and the frames are the distinct steps that were learned."""
    monkeypatch.setenv(breaking_envs.FOLDER, str(tmp_path))
    result = train(
        resolve(
            LEVEL,
            logdir=str(tmp_path / "run"),
            num_actors=6,
            num_groups=3,
            batch_size=6,
            unroll_length=10,
            total_environment_frames=10**9,
            env_timeout_s=2.0,
        )
    )
    happened = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert happened >= {*breaking_envs.FAULTS, *breaking_envs.FAILED_STARTS}
    assert result.last_report is not None
    assert result.last_report.env_losses == NUM_LOSSES
    steps = Counter(map(tuple, np.concatenate(consumed).tolist()))
    assert steps.total() == result.frames
    assert max(steps.values()) == 1
    # Row after row of one life: no step that an environment took is claimed by another row.
    assert min(step for step, _, _ in steps) == 1


def test_an_environment_that_always_fails_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the level and shows what the worker said last."""
    with pytest.raises(BaseExceptionGroup) as caught:
        train(
            resolve(
                "tests.breaking_envs:Hopeless",
                logdir=str(tmp_path / "run"),
                num_actors=2,
                num_groups=1,
                batch_size=2,
                max_env_failures=3,
            )
        )
    (error,) = caught.value.exceptions
    assert isinstance(error, ActorLost)
    message = str(error)
    assert "level tests.breaking_envs:Hopeless" in message and "failed 3 times" in message
    assert "the emulator's last words" in message
