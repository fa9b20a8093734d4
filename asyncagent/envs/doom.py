"""ViZDoom: ten scenarios, the user's own by ``doom:<path to cfg>``, and a game as an ``Env``."""

from __future__ import annotations

import contextlib
import difflib
import glob
import hashlib
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asyncagent.envs import doom_cfg
from asyncagent.envs.base import Env, EnvRecipe, Outcome, import_engine
from asyncagent.envs.doom_rewards import (
    NUM_MEASUREMENTS,
    measurements,
    selected_weapon,
    shaping,
)
from asyncagent.envs.doom_scenarios import LEVELS, Scenario, buttons_of
from asyncagent.envs.scratch import temporary_folder
from asyncagent.errors import UsageError
from asyncagent.structs import ArraySpec, Discrete, EnvSpec, MultiDiscrete, Nest

__all__ = [
    "LEVELS",
    "PREFIX",
    "DoomEnv",
    "check",
    "make_env",
    "map_path",
    "recipe",
    "shrink",
    "spec",
]

PREFIX = "doom:"

_RGB = ArraySpec((72, 128, 3), "uint8")
_ROWS = np.flatnonzero(np.isin(np.arange(120) % 5, (0, 1, 3)))
_MEASUREMENTS = ArraySpec((NUM_MEASUREMENTS,), "float32")


def check(level_name: str) -> None:
    """UsageError, in one line, unless there is such a scenario or such a cfg; asks no engine."""
    if level_name.startswith(PREFIX):
        doom_cfg.check(level_name.removeprefix(PREFIX), level_name)
    elif level_name not in LEVELS:
        near = difflib.get_close_matches(level_name, LEVELS, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose {', '.join(LEVELS)}"
        raise UsageError(f"unknown level_name={level_name!r}: {hint} ({PREFIX}<path> takes a cfg)")


def spec(level_name: str, action_repeats: int) -> EnvSpec:
    """What a policy must know of one of the ten; asks no engine. UsageError on other levels."""
    if level_name not in LEVELS:
        raise UsageError(f"the spec of level_name={level_name!r} shows only in a game of it")
    return _spec(LEVELS[level_name], action_repeats)


def _spec(scenario: Scenario, action_repeats: int) -> EnvSpec:
    sizes = tuple(len(part) for part in scenario.parts)
    return EnvSpec(
        {"rgb": _RGB, "measurements": _MEASUREMENTS} if scenario.battle else _RGB,
        MultiDiscrete(sizes) if len(sizes) > 1 else Discrete(sizes[0]),
        action_repeats,
    )


def recipe(level_name: str, action_repeats: int) -> EnvRecipe:
    """How a worker process makes one environment; a cfg's path is looked up from here."""
    if level_name.startswith(PREFIX):
        level_name = PREFIX + doom_cfg.absolute(level_name.removeprefix(PREFIX))
    return EnvRecipe(
        "asyncagent.envs.doom:make_env",
        {"level_name": level_name, "action_repeats": action_repeats},
    )


def make_env(*, seed: int, level_name: str, action_repeats: int) -> Env:
    """A game of the level; ``seed`` in [0, 2**31) determines all its episodes.

    While the game starts (0.1 s), the current folder of the *process* is another one.

    Raises:
      UsageError: no such level, a package or its map is missing or another one, a faulty cfg.
      Exception: whatever ViZDoom raised.
    """
    check(level_name)
    vizdoom = import_engine("vizdoom", "doom")
    game = vizdoom.DoomGame()
    if level_name.startswith(PREFIX):
        path = doom_cfg.absolute(level_name.removeprefix(PREFIX))
        scenario = doom_cfg.load(vizdoom, game, path)
    else:
        scenario = LEVELS[level_name]
        _configure(vizdoom, game, scenario)
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_window_visible(False)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_seed(seed)
    _start(game)
    return DoomEnv(game, scenario, action_repeats)


def map_path(scenario: Scenario) -> Path:
    """The map's file in the package that brings it; UsageError if it is missing or another one."""
    if scenario.wad.startswith("D"):
        package = import_engine("envpool_assets", "doom")
        path = Path(package.__file__).parent / "vizdoom" / "maps" / scenario.wad
    else:
        path = Path(import_engine("vizdoom", "doom").scenarios_path) / scenario.wad
    if not path.is_file():
        raise UsageError(
            f"{path} is missing; in asyncagent's folder: pip install --force-reinstall --no-deps "
            "-c scripts/constraints.txt vizdoom envpool-assets"
        )
    if scenario.md5 is not None:
        found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        if found != scenario.md5:
            raise UsageError(f"{path} has md5 {found}, but the scenario's map has {scenario.md5}")
    return path


def _configure(vizdoom: Any, game: Any, scenario: Scenario) -> None:
    game.set_doom_scenario_path(os.fspath(map_path(scenario)))
    game.set_doom_map("map01")
    game.set_available_buttons(
        [vizdoom.Button.__members__[name] for name in buttons_of(scenario.parts)]
    )
    game.set_available_game_variables(
        [vizdoom.GameVariable.__members__[name] for name in scenario.variables]
    )
    if scenario.skill is not None:
        game.set_doom_skill(scenario.skill)
    game.set_episode_timeout(scenario.timeout)
    game.set_episode_start_time(scenario.start)
    game.set_living_reward(scenario.living_reward)
    game.set_death_penalty(scenario.death_penalty)
    game.set_render_hud(scenario.hud)
    game.set_render_crosshair(scenario.crosshair)
    game.set_render_weapon(scenario.weapon)
    game.set_render_decals(False)
    game.set_render_particles(False)


STARTING_S = 10.0
"""A game that starts has its memory by then."""
_SHARED = "/dev/shm/ViZDoom"
_starting = threading.Lock()


def _start(game: Any) -> None:
    """Start the game's process, such that however it ends it leaves nothing behind.

    The process makes a folder where it stands, and shares memory under a name: both are removed as
    soon as it has them; where we are killed before, by the next game to start.  Its settings, kept
    in a file from game to game, start afresh.  Signals to the program (Ctrl-C) are none of its
    business.
    """
    game.set_doom_config_path(os.devnull)
    _remove_leftovers()
    with _starting, temporary_folder() as folder:
        here = os.open(".", os.O_PATH | os.O_CLOEXEC)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            os.chdir(folder)
            game.init()
        finally:
            os.fchdir(here)
            os.close(here)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for kind in ("SM", "MQCtr", "MQDoom"):
        Path(f"{_SHARED}{kind}{game.get_instance_id()}").unlink(missing_ok=True)


def _remove_leftovers() -> None:
    """Remove the names of shared memory that nobody uses: of games killed while they started."""
    found = []
    for path in map(Path, glob.glob(f"{_SHARED}*")):
        with contextlib.suppress(OSError):
            status = path.stat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > STARTING_S:
                found.append(path)
    in_use = _mapped() if found else ""
    for path in found:
        if str(path) not in in_use:
            path.unlink(missing_ok=True)


def _mapped() -> str:
    """What maps memory of games, in all processes that we may look into."""
    lines = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            lines += [line for line in maps.read_text().splitlines() if _SHARED in line]
    return "\n".join(lines)


class DoomEnv:
    """One running game. Where a step ends the episode, the engine shows nothing any more.

    A game that was won or lost on the very tic of its time limit counts as truncated, unless the
    player is dead: the engine does not tell.
    """

    def __init__(self, game: Any, scenario: Scenario, action_repeats: int) -> None:
        """Take over ``game``, a ``vizdoom.DoomGame`` of that scenario, which runs.

        Args:
          action_repeats: tics per step.
        """
        self.spec = _spec(scenario, action_repeats)
        self.game = game
        """The ``vizdoom.DoomGame``."""
        self._scenario = scenario
        buttons = buttons_of(scenario.parts)
        self._released = [0.0] * len(buttons)
        self._parts = [
            [None if press is None else (buttons.index(press[0]), press[1]) for press in part]
            for part in scenario.parts
        ]
        self.variables: Mapping[str, float] = {}
        """The engine's variables that the scenario offers; at an episode's end those before."""
        self._weapon_held_steps = 0

    def reset(self) -> Nest:
        """Begin a new episode; its image, with the measurements in a battle."""
        self.game.new_episode()
        state = self.game.get_state()
        self.variables = self._variables_of(state)
        self._weapon_held_steps = 0
        return self._observation(state)

    def step(self, action: Any) -> Outcome:
        """Hold what ``action`` presses for ``action_repeats`` tics."""
        game = self.game
        reward = game.make_action(self.pressed(action), self.spec.action_repeats)
        reward *= self._scenario.reward_scale
        if game.is_episode_finished():
            truncated = game.is_episode_timeout_reached() and not game.is_player_dead()
            return Outcome(None, reward, not truncated, truncated)
        state = game.get_state()
        before, after = self.variables, self._variables_of(state)
        self.variables = after
        if self._scenario.health_bonus and after["HEALTH"] > before["HEALTH"]:
            reward += self._scenario.health_bonus
        shaped = self._shaping(before, after) if self._scenario.battle else 0.0
        return Outcome(self._observation(state), reward + shaped, False, False, score=reward)

    def close(self) -> None:
        """End the game and its process."""
        self.game.close()

    def pressed(self, action: Any) -> list[float]:
        """The value of every button, in the game's order, while ``action`` is held."""
        values = self._released.copy()
        for part, choice in zip(self._parts, np.atleast_1d(action).tolist(), strict=True):
            press = part[choice]
            if press is not None:
                values[press[0]] = press[1]
        return values

    def _shaping(self, before: Mapping[str, float], after: Mapping[str, float]) -> float:
        held = self._weapon_held_steps > 0 and selected_weapon(before) == selected_weapon(after)
        self._weapon_held_steps = self._weapon_held_steps + 1 if held else 1
        return shaping(before, after, self._weapon_held_steps)

    def _variables_of(self, state: Any) -> Mapping[str, float]:
        if not self._scenario.variables:
            return {}
        return dict(zip(self._scenario.variables, state.game_variables.tolist(), strict=True))

    def _observation(self, state: Any) -> Nest:
        rgb = shrink(state.screen_buffer)
        if not self._scenario.battle:
            return rgb
        return {"rgb": rgb, "measurements": measurements(self.variables)}


def shrink(screen: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """uint8 [120, 160, 3] to [72, 128, 3], by nearest neighbours as the ancestor's.

    Of every five rows the first, second and fourth stay, of every five columns the first four:
    what OpenCV's INTER_NEAREST takes.
    """
    return screen[_ROWS].reshape(72, 32, 5 * 3)[:, :, : 4 * 3].reshape(_RGB.shape)
