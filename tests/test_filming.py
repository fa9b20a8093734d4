"""Clips while training: when, of what, how long, and that nothing of it concerns the run."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import asyncagent.filming as filming_module
from asyncagent.checkpoint import checkpoint_paths
from asyncagent.config import Config, resolve
from asyncagent.errors import ConfigError, UsageError
from asyncagent.filming import MAX_STEPS, Filming
from asyncagent.loop import train
from asyncagent.models import make_net
from asyncagent.policy import Policy
from asyncagent.structs import ArraySpec, Discrete, EnvSpec, EnvStep, IntArray
from asyncagent.weights import num_weights
from tests.fakes import CounterGroup
from tests.test_loop import config as loop_config
from tests.test_loop import groups

__all__ = ["groups"]

WATCHDOG_S = 60
SPEC = EnvSpec(ArraySpec((8, 8, 3), "uint8"), Discrete(3), 4)


class Pictures(CounterGroup):
    """A counter that is shown as a shade of grey."""

    def __init__(self, length: int) -> None:
        super().__init__([[length]])
        self.spec = SPEC

    async def reset(self) -> EnvStep:
        return self._shown(await super().reset())

    async def step(self, action: IntArray) -> EnvStep:
        return self._shown(await super().step(action))

    def _shown(self, row: EnvStep) -> EnvStep:
        shades = (row.observation[:, :, None, None] * 20 % 256).astype(np.uint8)
        return row._replace(observation=np.tile(shades, (1, 8, 8, 3)))


class Run:
    """What filming knows of a run, told by a test."""

    def __init__(self, spec: EnvSpec = SPEC, **flags: Any) -> None:
        values: dict[str, Any] = {"net": "mlp", "video_interval_frames": 1000} | flags
        level_name = values.pop("level_name", "atari_pong,atari_breakout")
        self.config = resolve(level_name, **values)
        net = make_net("mlp", spec, False, 1)
        self.net = net
        self.policy = Policy(net, spec.actions, torch.device("cpu"), torch.float32, 1)
        self.frames = 0
        self.clips: asyncio.Queue[tuple[Any, int]] = asyncio.Queue()
        self.filming = Filming(
            self.config,
            spec,
            num_weights(net),
            self.policy.snapshot,
            lambda: self.frames,
            lambda clip, frames: self.clips.put((clip, frames)),
        )


async def during(run: Run, test: Callable[[], Any]) -> None:
    """Film while ``test()`` is awaited."""
    async with asyncio.timeout(WATCHDOG_S):
        task = asyncio.create_task(run.filming.run())
        try:
            checks = asyncio.ensure_future(test())
            await asyncio.wait({task, checks}, return_when=asyncio.FIRST_COMPLETED)
            assert not task.done(), task
            await checks
        finally:
            task.cancel()
            await asyncio.wait({task})
    assert task.cancelled()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filming_module, "LOOK_S", 0.005)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Pictures]:
    """Games of seven steps are filmed; the list holds the groups that were made."""
    return making(monkeypatch, lambda number: Pictures(7))


def making(monkeypatch: pytest.MonkeyPatch, make: Callable[[int], Pictures]) -> list[Pictures]:
    groups: list[Pictures] = []

    def make_group(config: Config, *, level_name: str, num_envs: int, **_: Any) -> Pictures:
        assert num_envs == 1
        group = make(len(groups))
        group.level_name = level_name
        groups.append(group)
        return group

    monkeypatch.setattr(filming_module, "make_group", make_group)
    return groups


def test_a_clip_every_interval(made: list[Pictures]) -> None:
    """One game each time another interval is complete, of one level after the other, acted by the
    newest weights."""
    run = Run()
    run.frames = 2500  # resumed there

    async def test() -> None:
        for frames in (3200, 4100):
            run.policy.publish(frames, run.net)
            run.frames = frames
            clip, when = await run.clips.get()
            level = ("atari_breakout", "atari_pong")[frames == 4100]
            assert (clip.tag, when) == (f"{level}/video", frames)
            with Image.open(io.BytesIO(clip.image.encoded_image_string)) as film:
                assert film.n_frames == 8  # type: ignore[attr-defined]
            assert run.filming._policy is not None
            assert run.filming._policy.policy.version == frames

    asyncio.run(during(run, test))
    assert [group.level_name for group in made] == ["atari_breakout", "atari_pong"]
    assert all(group.closed for group in made)


def test_a_long_game_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a game that does not end, MAX_STEPS are played, and shown."""
    (group,) = groups = [Pictures(10**6)]
    making(monkeypatch, groups.__getitem__)
    run = Run()

    async def test() -> None:
        run.frames = 1000
        clip, _ = await run.clips.get()
        assert clip.image.encoded_image_string

    asyncio.run(during(run, test))
    assert len(group.actions) == MAX_STEPS and group.closed


def test_the_run_samples_as_if_nobody_filmed(made: list[Pictures]) -> None:
    """The generator that training samples its actions with is not touched."""
    run = Run()
    before = run.policy.generator_state()
    common = torch.get_rng_state()

    async def test() -> None:
        run.frames = 1000
        await run.clips.get()

    asyncio.run(during(run, test))
    assert torch.equal(run.policy.generator_state(), before)
    assert torch.equal(torch.get_rng_state(), common)


def test_what_fails_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An environment that cannot be made, or breaks, is a warning, and the next clip is shown."""

    class Breaks(Pictures):
        async def step(self, action: IntArray) -> EnvStep:
            raise RuntimeError("broken")

    def make(number: int) -> Pictures:
        if not caplog.records:
            raise OSError("no such engine")
        return Pictures(7) if number else Breaks(7)

    groups = making(monkeypatch, make)
    run = Run()

    async def test() -> None:
        for warnings in (1, 2):
            run.frames += 1000
            while len(caplog.records) < warnings:
                await asyncio.sleep(0.001)
        run.frames += 1000
        _, when = await run.clips.get()
        assert when == 3000

    with caplog.at_level(logging.WARNING):
        asyncio.run(during(run, test))
    first, second = (record.getMessage() for record in caplog.records)
    assert "no such engine" in first and "broken" in second
    assert len(groups) == 2 and all(group.closed for group in groups)


def test_what_cannot_be_filmed_is_told_once(
    made: list[Pictures], caplog: pytest.LogCaptureFixture
) -> None:
    """Without a picture there are no clips: one warning, and no environment is ever made."""
    run = Run(EnvSpec(ArraySpec((4,), "float32"), Discrete(3), 4))

    async def test() -> None:
        for _ in range(50):
            run.frames += 1000
            await asyncio.sleep(0.002)

    with caplog.at_level(logging.WARNING):
        asyncio.run(during(run, test))
    (warning,) = caplog.records
    assert "hold no image" in warning.getMessage()
    assert made == []


def test_a_level_that_cannot_be_made_is_the_only_one_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told once; the others have their turns, however many intervals a clip takes."""
    shown = []

    def make_group(config: Config, *, level_name: str, **_: Any) -> Pictures:
        if level_name == "atari_breakout":
            raise UsageError("breakout needs a folder")
        shown.append(level_name)
        return Pictures(7)

    monkeypatch.setattr(filming_module, "make_group", make_group)
    run = Run(level_name="atari_pong,atari_breakout,atari_qbert")

    async def test() -> None:
        for _ in range(4):
            while run.clips.empty():
                run.frames += 3000
                await asyncio.sleep(0.002)
            run.clips.get_nowait()

    with caplog.at_level(logging.WARNING):
        asyncio.run(during(run, test))
    (warning,) = caplog.records
    assert "atari_breakout" in warning.getMessage() and "a folder" in warning.getMessage()
    assert {"atari_pong", "atari_qbert"} == {*shown}
    assert all(shown[index] != shown[index + 1] for index in range(3))


def test_without_what_makes_films_nothing_is_played(
    monkeypatch: pytest.MonkeyPatch, made: list[Pictures], caplog: pytest.LogCaptureFixture
) -> None:
    """One warning says what to install, before a game is played for nothing."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    run = Run()

    async def test() -> None:
        for _ in range(20):
            run.frames += 1000
            await asyncio.sleep(0.002)

    with caplog.at_level(logging.WARNING):
        asyncio.run(during(run, test))
    (warning,) = caplog.records
    assert "[video]" in warning.getMessage()
    assert made == []


def test_the_end_does_not_wait_for_a_film(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled in the middle of a game, it closes the environment and leaves no thread."""
    stepping = asyncio.Event()

    class Hangs(Pictures):
        async def step(self, action: IntArray) -> EnvStep:
            stepping.set()
            await asyncio.Event().wait()
            raise AssertionError

    (group,) = groups = [Hangs(7)]
    making(monkeypatch, groups.__getitem__)
    run = Run()

    async def test() -> None:
        run.frames = 1000
        await stepping.wait()

    asyncio.run(during(run, test))
    assert group.closed and run.clips.empty()


def test_off(made: list[Pictures]) -> None:
    """With an interval of 0, nothing is filmed."""
    run = Run(video_interval_frames=0)

    async def test() -> None:
        for _ in range(20):
            run.frames += 1000
            await asyncio.sleep(0.002)

    asyncio.run(during(run, test))
    assert made == []


def test_a_run_that_cannot_film_goes_on(
    tmp_path: Path, groups: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A whole run whose level shows no picture says so and learns to its end."""
    with caplog.at_level(logging.WARNING):
        result = train(loop_config(tmp_path, video_interval_frames=1))
    assert result.frames >= 2000
    assert caplog.text.count("no clips of catch") == 1


def test_the_end_is_saved_before_a_film_has_ended(
    tmp_path: Path, groups: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment that takes its time to close costs the run no checkpoint."""
    saved = False

    async def slow(filming: Filming) -> None:
        nonlocal saved
        try:
            await asyncio.Event().wait()
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(10):  # less than what the run's end may take
                    while not checkpoint_paths(tmp_path):
                        await asyncio.sleep(0.001)
                    saved = True

    monkeypatch.setattr(Filming, "run", slow)
    train(loop_config(tmp_path))
    assert saved


def test_deterministic_runs_do_not_film() -> None:
    """The flag is refused there, in words."""
    with pytest.raises(ConfigError, match="video_interval_frames=5 must be 0 with --deterministic"):
        resolve("memory", num_actors=16, deterministic=True, video_interval_frames=5)
    assert issubclass(ConfigError, UsageError)
