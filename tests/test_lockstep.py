"""Deterministic runs: the same seed gives the same weights, interrupted and resumed or not."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import asyncagent.loop as loop_module
from asyncagent.checkpoint import checkpoint_paths, load_checkpoint
from asyncagent.commands.train import configure
from asyncagent.config import Config, resolve
from asyncagent.envs import make_group
from asyncagent.envs.pool import PoolGroup
from asyncagent.errors import CheckpointError, ConfigError, UsageError
from asyncagent.learner import Learner
from asyncagent.loop import train

FRAMES = 4000


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    """A run that stalls ends the tests with every thread's stack instead of hanging them."""
    import faulthandler

    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def config(logdir: Path, **flags: Any) -> Config:
    """A small recurrent run, of two updates for each unroll."""
    flags = {"num_actors": 8, "batch_size": 4, "use_lstm": True, "unroll_length": 7} | flags
    return resolve(
        "memory",
        deterministic=True,
        logdir=str(logdir),
        total_environment_frames=FRAMES,
        **flags,
    )


def final_state(logdir: Path) -> dict[str, Any]:
    """What the newest checkpoint says, but for the clock, the folder and the saves before it."""
    found = load_checkpoint(logdir)
    assert found is not None
    others = ("time_s", "config", "num_saves")
    return {name: value for name, value in found[1].items() if name not in others}


def same(one: Any, other: Any) -> bool:
    """Bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def stop_after(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    """Ask the run to stop in the middle of its so manieth update."""
    update = Learner.update

    def spy(self: Learner, parts: Any) -> None:
        if self.updates == updates:
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, parts)

    monkeypatch.setattr(Learner, "update", spy)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_interrupted_and_resumed_is_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Stopped twice, at odd moments, and resumed: the weights are those of a run in one piece."""
    whole = train(config(tmp_path / "whole", precision=precision))
    for updates in (5, 48):
        with monkeypatch.context() as patch:
            stop_after(patch, updates)
            stopped = train(config(tmp_path / "parts", precision=precision))
            assert updates < stopped.updates
            assert stopped.frames < FRAMES
    resumed = train(config(tmp_path / "parts", precision=precision))
    assert (resumed.frames, resumed.updates) == (whole.frames, whole.updates)
    assert same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
    train(config(tmp_path / "other", precision=precision, seed=2))
    assert not same(final_state(tmp_path / "other"), final_state(tmp_path / "whole"))


def test_killed_run_goes_on_from_a_checkpoint_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was saved between two unrolls is enough, whatever was lost after it."""
    train(config(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        save = loop_module._Run._save

        async def then_fail(self: Any) -> None:
            await save(self)
            if self.learner.updates > 20:
                raise KeyboardInterrupt

        patch.setattr(loop_module._Run, "_save", then_fail)
        with pytest.raises((KeyboardInterrupt, BaseExceptionGroup)):
            train(config(tmp_path / "parts", checkpoint_interval_s=1e-6))
    found = load_checkpoint(tmp_path / "parts")
    assert found is not None and 20 < found[1]["updates"] < 24
    assert checkpoint_paths(tmp_path / "parts")[1:], "it was saved before, too"
    train(config(tmp_path / "parts"))
    assert same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))


def test_complete_run_goes_on_with_new_games(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that was given more frames afterwards begins games anew, and says so."""
    train(config(tmp_path))
    longer = dataclasses.replace(config(tmp_path), total_environment_frames=2 * FRAMES)
    result = train(longer)
    assert result.frames >= 2 * FRAMES
    assert "games begin anew" in caplog.text


def test_another_number_of_environments_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were saved are all there are."""
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        train(config(tmp_path))
    with pytest.raises(CheckpointError, match="num_actors=8, not 12: a deterministic run keeps"):
        train(config(tmp_path, num_actors=12))


def test_restored_group_goes_on_as_the_saved_one() -> None:
    """Rows and finished games are those that the other group comes to, in mid-game too."""

    async def test() -> None:
        flags = resolve("memory", num_actors=6, num_groups=1)
        made = [
            make_group(flags, level_name="memory", num_envs=6, first_env_index=0, seed=seed)
            for seed in (3, 4)
        ]
        saved, restored = made
        assert isinstance(saved, PoolGroup) and isinstance(restored, PoolGroup)
        choices = np.random.default_rng(5).integers(0, 2, (80, 6))
        await saved.reset()
        for action in choices[:33]:
            await saved.step(action)
        state = json.loads(json.dumps(await saved.state()))
        await restored.restore(state)
        ended = 0
        for action in choices[33:]:
            rows = await saved.step(action), await restored.step(action)
            assert same(*(tuple(map(np.asarray, row[:6])) for row in rows))
            assert rows[0].episodes == rows[1].episodes
            ended += len(rows[0].episodes)
        assert ended > 10
        for group in made:
            await group.close()

    asyncio.run(test())


def test_level_that_cannot_save_itself_is_refused(tmp_path: Path) -> None:
    """In one line, before anything is learned."""
    catch = resolve("catch", deterministic=True, num_actors=32, logdir=str(tmp_path))
    with pytest.raises(UsageError, match="environments that can save themselves") as error:
        train(catch)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("num_groups=2", "num_groups=2 must be 1 with --deterministic"),
        ("learner_threads=2", "learner_threads=2 must be 1"),
        ("precision=auto", "precision='auto' must be named"),
        ("device=auto", "device='auto' must be cpu"),
        ("num_actors=24", "num_actors=24 must be a multiple of batch_size=16"),
        ("listen=tcp://127.0.0.1:1", "listen='tcp://127.0.0.1:1' must be empty"),
    ],
)
def test_flags_that_are_not_deterministic(tmp_path: Path, flag: str, says: str) -> None:
    """What contradicts --deterministic is named; what is left out is made to fit."""
    line = ["--level_name=memory", "--deterministic", f"--logdir={tmp_path}"]
    made = configure(line)
    assert (made.num_groups, made.learner_threads, made.precision) == (1, 1, "float32")
    assert not configure([*line, "--no_deterministic"]).deterministic
    with pytest.raises(ConfigError, match=says):
        configure([*line, f"--{flag}"])
