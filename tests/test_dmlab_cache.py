"""``asyncagent dmlab-cache``: a run finds the maps of its first episodes compiled."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncagent.__main__ import main
from asyncagent.config import resolve
from asyncagent.envs import make_group
from asyncagent.envs.level_cache import LevelCache
from tests import fake_deepmind_lab

STAND_INS = Path(__file__).resolve().parent / "stand_ins"
STEPS = -(-fake_deepmind_lab.EPISODE_FRAMES // 4)
"""Agent steps of the stand-in's episodes."""
SMALL, LARGE = "explore_goal_locations_small", "explore_goal_locations_large"


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(STAND_INS)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def fill(tmp_path: Path, level_name: str = SMALL, **flags: Any) -> int:
    """The command's exit status."""
    flags = {"num_actors": 2, "num_episodes": 2, "level_cache": tmp_path / "cache"} | flags
    return main(
        ["dmlab-cache", f"--level_name={level_name}", *(f"--{n}={v}" for n, v in flags.items())]
    )


def num_levels(tmp_path: Path) -> int:
    return LevelCache(tmp_path / "cache", 10**9).contents().num_levels


async def play(num_episodes: int, level_name: str, first: int, size: int, folder: Path) -> None:
    """So many episodes, and the next one's first row, as a training run plays them."""
    config = resolve(SMALL, seed=7, level_cache=str(folder))
    group = make_group(
        config, level_name=level_name, num_envs=size, first_env_index=first, seed=config.seed
    )
    try:
        await group.reset()
        for _ in range(num_episodes * (STEPS + 1)):
            row = await group.step(np.zeros(size, np.int64))
            assert not row.lost.any()
        assert row.first.all()
    finally:
        await group.close()


def test_a_run_finds_its_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run with the same flags, the first episodes of each environment compile nothing; the
    episode after them does."""
    levels = f"{SMALL},{LARGE}"
    assert fill(tmp_path, levels, num_actors=4, num_groups=2, num_episodes=3, seed=7) == 0
    said = capsys.readouterr().out
    assert "4 environments of 2 levels, 3 episodes each" in said
    assert "12 of 12 resets: 12 maps compiled, 0 found in the cache" in said
    assert f"12 maps, 0.4 MB, in {tmp_path / 'cache'}" in said
    for index, level_name in enumerate((SMALL, LARGE)):
        asyncio.run(play(2, level_name, 2 * index, 2, tmp_path / "cache"))
    assert num_levels(tmp_path) == 12
    asyncio.run(play(3, SMALL, 0, 2, tmp_path / "cache"))
    assert num_levels(tmp_path) == 14


def test_filling_again_finds_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is there already is found, and only what more episodes need is compiled."""
    assert fill(tmp_path, num_episodes=2) == 0
    assert fill(tmp_path, num_episodes=3) == 0
    assert "6 of 6 resets: 2 maps compiled, 4 found in the cache" in capsys.readouterr().out
    assert fill(tmp_path, num_episodes=3, seed=2) == 0
    assert "6 maps compiled, 0 found" in capsys.readouterr().out.splitlines()[-2]


def test_levels_without_maps_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Levels whose maps come with the module say that there is nothing to do."""
    assert fill(tmp_path, "rooms_watermaze") == 0
    said = capsys.readouterr().out
    assert "0 maps compiled" in said and "nothing to compile" in said


def test_dmlab30_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a level, the suite: as many of its levels as there are groups."""
    flags = [f"--level_cache={tmp_path / 'cache'}", "--num_actors=3", "--num_episodes=1"]
    assert main(["dmlab-cache", *flags]) == 0
    assert "3 environments of 3 levels" in capsys.readouterr().out


def test_failing_levels_hold_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A level that fails again and again is told of, with status 1; the others are filled."""
    monkeypatch.setenv("FAKE_DEEPMIND_LAB", json.dumps({LARGE: {"fail_resets": True}}))
    assert fill(tmp_path, f"{LARGE},{SMALL}", num_actors=4, num_groups=2, max_env_failures=2) == 1
    said = capsys.readouterr().out
    assert f"level {LARGE}" in said and "map does not compile" in said
    assert "4 of 8 resets: 4 maps compiled" in said


def test_a_cache_too_small_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Maps that were pushed out by later ones are told of, with status 1."""
    assert fill(tmp_path, num_episodes=4, level_cache_gb=100e-6) == 1
    said = capsys.readouterr().out
    assert "8 maps compiled" in said and "of 8 maps fit: give a larger --level_cache_gb" in said
    assert 0 < num_levels(tmp_path) < 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"level_name": "catch"}, ["'catch'", "DeepMind Lab"]),
        ({"level_name": f"{SMALL},atari_pong"}, ["atari_pong"]),
        ({"level_name": "tests/no_such_level"}, ["tests/no_such_level", "not found"]),
        ({"level_name": "psychlab_continuous_recognition"}, ["--dataset_path"]),
        ({"num_episodes": 0}, ["num_episodes=0", ">= 1"]),
        ({"num_workers": -1}, ["num_workers=-1", ">= 0"]),
        ({"level_cache": ""}, ["level_cache"]),
        ({"level_cache": "/proc/cache"}, ["/proc/cache", "cannot be written"]),
        ({"num_episode": 1}, ["--num_episode", "--num_episodes"]),
        ({"preset": "fast"}, ["fast", "workstation"]),
    ],
)
def test_mistakes_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, Any], words: list[str]
) -> None:
    """Bad input gives status 2 and one line with the fault and what would be right."""
    assert fill(tmp_path, **flags) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and [word for word in words if word not in said] == []


def test_missing_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without deepmind_lab one line says how to get it."""
    monkeypatch.setitem(sys.modules, "deepmind_lab", None)
    assert fill(tmp_path) == 2
    assert "build a wheel" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_there(tmp_path: Path) -> None:
    """Interrupted in mid-compilation it says what was done, leaves whole levels and no process."""
    path = f"{STAND_INS}:{STAND_INS.parent.parent}"
    running = subprocess.Popen(
        [sys.executable, "-m", "asyncagent", "dmlab-cache", f"--level_name={SMALL}",
         "--num_actors=1", "--num_episodes=10000", f"--level_cache={tmp_path / 'cache'}"],
        env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while num_levels(tmp_path) < 3:
        assert running.poll() is None
    running.send_signal(signal.SIGINT)
    said, complained = running.communicate(timeout=60)
    assert (running.returncode, complained) == (130, "")
    kept = num_levels(tmp_path)
    done = int(said.splitlines()[-2].partition(" of 10,000 resets")[0].replace(",", ""))
    # The row of the level that was counted last may not have arrived when it was interrupted.
    assert 2 <= done <= kept <= done + 1 and f"{kept} maps, " in said.splitlines()[-1]
    cache = LevelCache(tmp_path / "cache", 10**9)
    assert all(len(path.read_bytes()) > 1000 for path in cache.folder.glob("*.level"))
