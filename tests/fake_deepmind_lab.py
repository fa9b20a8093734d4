"""A stand-in for ``deepmind_lab``: as strict as the real module, and as deadly.

It draws noise, and its episodes are 90 frames long; all else is the real module's behaviour as it
was observed, the ways in which its process dies included: ``die`` ends the process, unless a test
has put an exception in its place.

A level of this module may be told by the environment variable ``FAKE_DEEPMIND_LAB`` to misbehave:
a JSON object, from the last part of a level's name (or "*") to ``Faults``' fields.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

__all__ = ["Lab", "lp_num_threads", "runfiles_path", "set_runfiles_path", "version"]

EPISODE_FRAMES = 90
LEVELS = {
    *(
        f"contributed/dmlab30/{name}"
        for name in (
            *("rooms_collect_good_objects_train", "rooms_collect_good_objects_test"),
            *("rooms_exploit_deferred_effects_train", "rooms_exploit_deferred_effects_test"),
            *("rooms_select_nonmatching_object", "rooms_watermaze", "rooms_keys_doors_puzzle"),
            *("language_select_described_object", "language_select_located_object"),
            *("language_execute_random_task", "language_answer_quantitative_question"),
            *("lasertag_one_opponent_small", "lasertag_three_opponents_small"),
            *("lasertag_one_opponent_large", "lasertag_three_opponents_large"),
            *("natlab_fixed_large_map", "natlab_varying_map_regrowth"),
            *("natlab_varying_map_randomized", "skymaze_irreversible_path_hard"),
            *("skymaze_irreversible_path_varied", "psychlab_arbitrary_visuomotor_mapping"),
            *("psychlab_continuous_recognition", "psychlab_sequential_comparison"),
            *("psychlab_visual_search", "explore_object_locations_small"),
            *("explore_object_locations_large", "explore_obstructed_goals_small"),
            *("explore_obstructed_goals_large", "explore_goal_locations_small"),
            *("explore_goal_locations_large", "explore_object_rewards_few"),
            "explore_object_rewards_many",
        )
    ),
    *("tests/empty_room_test", "tests/no_instr_test", "nav_maze_static_01", "my_own"),
}
COMPILED_ONCE = ("rooms_", "psychlab_", "natlab_fixed_", "empty_room", "nav_maze_static")
"""Beginnings of the levels whose map ships with the module or is the same for every seed."""
NEEDS_DATASET = ("psychlab_arbitrary_visuomotor_mapping", "psychlab_continuous_recognition")
COLOURS = ("red", "green", "blue", "yellow")

lp_num_threads = os.environ.get("LP_NUM_THREADS")
"""What stood there when the module was imported."""
_runfiles = "."


class Faults(NamedTuple):
    """What goes wrong in a level, and when; frames are counted over an object's whole life."""

    reset_s: float = 0.0
    """Seconds that a reset which compiles takes, with the GIL held all the while."""
    burn_s: float = 0.0
    """The same, but of CPU time."""
    step_s: float = 0.0
    die_at: int = 0
    """``abort`` in the step that reaches this frame; 0: never."""
    exit_at: int = 0
    raise_at: int = 0
    hang_at: int = 0
    fail_resets: bool = False
    """A map that does not compile: an ordinary RuntimeError."""
    refuse: bool = False
    """The constructor raises, as for a renderer that this machine has not."""


def _faults(name: str) -> Faults:
    told = json.loads(os.environ.get("FAKE_DEEPMIND_LAB", "{}"))
    return Faults(**told.get(name, told.get("*", {})))


def die(how: str, status: int) -> NoReturn:
    """End the process as the engine does: abort (134), a segmentation fault (139), or an exit."""
    print(f"deepmind_lab: {how}", file=sys.stderr, flush=True)
    if status > 128:
        signal.signal(status - 128, signal.SIG_DFL)
        os.kill(os.getpid(), status - 128)
    os._exit(status)


def version() -> str:
    """Always the same."""
    return "1.0"


def runfiles_path() -> str:
    """Where maps and scripts are."""
    return _runfiles


def set_runfiles_path(path: str) -> bool:
    """Say where they are."""
    global _runfiles
    if not isinstance(path, str):
        raise TypeError("argument 1 must be str")
    _runfiles = path
    return True


class Lab:
    """One environment."""

    def __init__(
        self,
        level: str,
        observations: list[str],
        config: dict[str, str] | None = None,
        renderer: str = "software",
        level_cache: Any = None,
    ) -> None:
        config = {} if config is None else config
        if not isinstance(level, str) or not isinstance(renderer, str):
            raise TypeError("argument must be str")
        if not isinstance(observations, list):
            raise TypeError(f"argument 2 must be list, not {type(observations).__name__}")
        if not isinstance(config, dict):
            raise TypeError(f"argument 3 must be dict, not {type(config).__name__}")
        self._status = "closed"
        if renderer not in ("hardware", "software"):
            raise RuntimeError(
                f'Failed to set renderer must be "hardware" or "software" actual "{renderer}"!'
            )
        self._name = level.rpartition("/")[2]
        self._faults = _faults(self._name)
        if self._faults.refuse:
            raise RuntimeError("Failed to connect RL API")
        if level not in LEVELS:
            raise RuntimeError(
                f"Invalid levelName flag '{level}' - \"Level not found:\n\t{level}.lua\""
            )
        for key, value in config.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise TypeError("bad argument type for built-in operation")
        self._config = config
        self._width, self._height = int(config.get("width", 320)), int(config.get("height", 240))
        held_out = self._name.endswith("_test") and level.startswith("contributed/")
        if held_out and config.get("allowHoldOutLevels") != "true":
            raise RuntimeError(
                f"Failed to init environment - \"Level '{self._name}' is for testing only.\""
            )
        known = {"RGB_INTERLEAVED", "RGBD_INTERLEAVED", "RGB", "RGBD", "VEL.TRANS", "VEL.ROT"}
        if self._name != "no_instr_test":
            known.add("INSTR")
        for name in observations:
            if name not in known:
                raise ValueError(f"Unknown observation '{name}'.")
        self._shown = list(observations)
        self._cache = level_cache
        folder = os.environ.get("TEST_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
        self._folder = Path(tempfile.mkdtemp(prefix="dmlab_temp_folder_", dir=folder))
        self._status = "uninitialised"
        self._episodes = self._frame = self._steps = self._life = 0
        self._rng = np.random.default_rng(0)

    def reset(self, episode: int = -1, seed: int | None = None) -> bool:
        """Begin an episode."""
        self._must_be_open("reset")
        if seed is not None and not isinstance(seed, int):
            raise ValueError(f"'seed' must be int or None, was '{type(seed).__name__}'.")
        seed = int.from_bytes(os.urandom(3), "big") if seed is None else seed
        self._status = "ended"
        if self._name in NEEDS_DATASET and not self._config.get("datasetPath"):
            raise RuntimeError('Failed to start environment - "Must specify datasetPath"')
        os.write(1, f"loading {self._name}\n".encode())
        self._make_map(seed)
        # An object's first episode differs a little from what the same seed gives later.
        self._rng = np.random.default_rng((seed % 2**32, self._episodes == 0))
        self._status = "running"
        self._frame = self._steps = 0
        self._episodes += 1
        return True

    def step(self, action: npt.NDArray[np.intc], num_steps: int = 1) -> float:
        """Advance ``num_steps`` frames; the reward is the sum of what the action's numbers are."""
        if not isinstance(action, np.ndarray):
            raise TypeError(f"argument 1 must be numpy.ndarray, not {type(action).__name__}")
        if not isinstance(num_steps, int):
            raise TypeError("'num_steps' must be an integer")
        if self._status != "running":
            raise RuntimeError("Environment in wrong status to advance.")
        if action.shape != (7,):
            raise ValueError("action must have shape (7)")
        if action.dtype != np.intc:
            raise ValueError("action must have dtype np.intc")
        misread = np.lib.stride_tricks.as_strided(action, strides=(action.itemsize,))
        self._misbehave(num_steps)
        frames = min(num_steps, EPISODE_FRAMES - self._frame)
        self._frame += frames
        self._steps += num_steps
        if self._frame == EPISODE_FRAMES:
            self._status = "ended"
        return float(frames * (misread * (1, 10, 100, 1000, 10_000, 0, 0)).sum())

    def observations(self) -> dict[str, Any]:
        """What is seen now; noise that the seed decides."""
        if self._status != "running":
            raise RuntimeError("Environment in wrong status for call to observations()")
        noise = self._rng.integers(0, 256, (self._height, self._width, 4), np.uint8)
        instruction = ""
        if self._name.startswith("language_"):
            instruction = f"Pick the {COLOURS[self._episodes % 4]} object in the red room"
        everything: dict[str, Callable[[], Any]] = {
            "RGB_INTERLEAVED": lambda: noise[..., :3].copy(),
            "RGBD_INTERLEAVED": noise.copy,
            "RGB": lambda: noise[..., :3].transpose(2, 0, 1).copy(),
            "RGBD": lambda: noise.transpose(2, 0, 1).copy(),
            "VEL.TRANS": lambda: np.zeros(3),
            "VEL.ROT": lambda: np.zeros(3),
            "INSTR": lambda: instruction,
        }
        return {name: everything[name]() for name in self._shown}

    def is_running(self) -> bool:
        """Whether it may be stepped; never kills."""
        return self._status == "running"

    def num_steps(self) -> int:
        """Frames asked for, which at an episode's end are more than there were."""
        return self._steps

    def observation_spec(self) -> list[dict[str, Any]]:
        """Names, shapes and dtypes."""
        self._must_be_open("observation_spec")
        return [
            {"name": "RGB_INTERLEAVED", "shape": (self._height, self._width, 3), "dtype": np.uint8},
            {"name": "INSTR", "shape": (), "dtype": str},
        ]

    def action_spec(self) -> list[dict[str, Any]]:
        """Names and bounds of the seven."""
        self._must_be_open("action_spec")
        bounds = {
            "LOOK_LEFT_RIGHT_PIXELS_PER_FRAME": (-512, 512),
            "LOOK_DOWN_UP_PIXELS_PER_FRAME": (-512, 512),
            "STRAFE_LEFT_RIGHT": (-1, 1),
            "MOVE_BACK_FORWARD": (-1, 1),
            "FIRE": (0, 1),
            "JUMP": (0, 1),
            "CROUCH": (0, 1),
        }
        return [{"name": name, "min": low, "max": high} for name, (low, high) in bounds.items()]

    def close(self) -> bool:
        """True, then False."""
        if self._status == "closed":
            return False
        self._status = "closed"
        shutil.rmtree(self._folder, ignore_errors=True)
        return True

    def _must_be_open(self, method: str) -> None:
        if self._status == "closed":
            die(f"{method} of a closed environment: segmentation fault", 139)

    def _make_map(self, seed: int) -> None:
        if self._name.startswith(COMPILED_ONCE):
            return
        digest = hashlib.md5(f"{self._name} {seed}".encode()).hexdigest()
        pk3_path = self._folder / "baselab" / f"{self._name}.pk3"
        pk3_path.parent.mkdir(exist_ok=True)
        key = f"{self._name}_noaas_{digest}"
        if self._cache is not None:
            pk3_path.unlink(missing_ok=True)
            if self._cache.fetch(key, str(pk3_path)):
                self._load(pk3_path, digest)
                return
        if self._faults.fail_resets:
            raise RuntimeError('Failed to start environment - "map does not compile"')
        _hold_gil(self._faults.reset_s)
        _burn(self._faults.burn_s)
        with zipfile.ZipFile(pk3_path, "w") as file:
            file.writestr("map.bsp", digest * 1000)
        if self._cache is not None:
            self._cache.write(key, str(pk3_path))
        self._load(pk3_path, digest)

    def _load(self, pk3_path: Path, digest: str) -> None:
        try:
            with zipfile.ZipFile(pk3_path) as file:
                good = file.read("map.bsp") == (digest * 1000).encode()
        except (OSError, zipfile.BadZipFile):
            good = False
        if not good:
            die(f"Couldn't load {pk3_path}", 1)

    def _misbehave(self, num_steps: int) -> None:
        before, self._life = self._life, self._life + num_steps
        faults = self._faults
        time.sleep(faults.step_s)
        if before < faults.die_at <= self._life:
            die("PANIC: unprotected error in call to Lua API", 134)
        if before < faults.exit_at <= self._life:
            die("Couldn't load maps/arena.bsp", 1)
        if before < faults.raise_at <= self._life:
            raise ValueError('Failed to advance environment "a script raised"')
        if before < faults.hang_at <= self._life:
            _hold_gil(3600.0)


def _hold_gil(seconds: float) -> None:
    # Called through PyDLL, the C library sleeps without letting go of it.
    ctypes.PyDLL(None).usleep(ctypes.c_uint(int(seconds * 1e6)))


def _burn(cpu_s: float) -> None:
    end_s = time.process_time() + cpu_s
    while time.process_time() < end_s:
        pass
