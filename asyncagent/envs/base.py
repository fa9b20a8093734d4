"""The protocol of an environment group: what an actor may ask of any engine."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from asyncagent.errors import UsageError
from asyncagent.structs import (
    ActionArray,
    ActionSpace,
    BoolArray,
    Box,
    Discrete,
    EnvSpec,
    EnvStep,
    Episode,
    FloatArray,
    Nest,
)


class EnvGroup(Protocol):
    """E environments that step together and that the event loop awaits.

    Episodes come in *next-step* form (see ``structs``): the end row shows the final observation
    and the end flag, the next row opens the new episode and ignores the action it was sent.
    """

    spec: EnvSpec
    num_envs: int

    async def reset(self) -> EnvStep:
        """The first row of every environment: ``first`` True everywhere. Called once."""
        ...

    async def step(self, action: ActionArray) -> EnvStep:
        """The row that follows ``action`` [E, ...]; it is ignored after end rows and lost rows."""
        ...

    def progress(self) -> Any:
        """Differs from what it was before if environments got on within the pending call."""
        ...

    async def close(self) -> None:
        """Let the engine go; harmless when repeated."""
        ...


class Outcome(NamedTuple):
    """What one step of one environment came to."""

    observation: Nest
    """What the environment shows now; None if it shows nothing at an episode's end: the end row
    then repeats the observation before it."""
    reward: float
    terminated: bool
    """The episode ended by the rules. Never together with ``truncated``."""
    truncated: bool
    """A time limit cut the episode off."""
    score: float | None = None
    """What counts in the episode's reported return, where that is not ``reward``."""


class Env(Protocol):
    """One environment, blocking; every call from one thread.

    It is made with a seed of its own, from which all its episodes follow.  Whatever it raises, in
    ``reset`` or ``step``, means that it is lost and must be replaced.
    """

    spec: EnvSpec

    def reset(self) -> Nest:
        """Begin a new episode; returns its first observation, arrays as ``spec`` says."""
        ...

    def step(self, action: Any) -> Outcome:
        """Take ``action``, an array as ``spec.actions.array`` says; not after an episode's end."""
        ...

    def close(self) -> None:
        """Let the engine go. Called once, after the last ``step`` returned."""
        ...


@dataclass(frozen=True)
class EnvRecipe:
    """How a worker process makes one environment: ``maker(seed=..., **options) -> Env``."""

    maker: str
    """``module:function``, importable in a new process; the function imports the engine itself."""
    options: Mapping[str, Any]
    """Keyword arguments, of types that JSON has."""


class EpisodeTracker:
    """Whole-game returns and lengths from a group's rows.

    A *game* may span several training episodes (life loss ends an episode, not a game).
    """

    def __init__(self, num_envs: int, level_name: str) -> None:
        self._level_name = level_name
        self._return = np.zeros(num_envs, np.float64)
        self._steps = np.zeros(num_envs, np.int64)

    def update(
        self, score: FloatArray, first: BoolArray, game_over: BoolArray, truncated: BoolArray
    ) -> tuple[Episode, ...]:
        """Account one row; returns the games that ended with it.

        Args:
          score: float32 [E], unclipped and unshaped rewards.
          first: bool [E]; a first row's observation cost no agent step.
          game_over: bool [E], True in the end row of a game.
          truncated: bool [E], True where a time limit ended it.
        """
        self._return += score
        self._steps += ~first
        if not game_over.any():
            return ()
        ended = np.flatnonzero(game_over)
        episodes = tuple(
            Episode(
                self._level_name,
                float(self._return[i]),
                int(self._steps[i]),
                int(i),
                bool(truncated[i]),
            )
            for i in ended
        )
        self.forget(game_over)
        return episodes

    def state(self) -> dict[str, Any]:
        """What has been counted of the games under way."""
        return {"return": self._return.tolist(), "steps": self._steps.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where ``state()`` was taken."""
        self._return[:] = state["return"]
        self._steps[:] = state["steps"]

    def forget(self, which: BoolArray) -> None:
        """The games of ``which`` (bool [E]) are over or lost: what follows is another game."""
        self._return[which] = 0.0
        self._steps[which] = 0


def how_to_install(extra: str) -> str:
    """What brings the packages of one of asyncagent's extras, e.g. ``atari``, in a few words."""
    return f"in asyncagent's folder: pip install -e '.[{extra}]'"


def import_engine(module: str, extra: str) -> Any:
    """The engine's module; UsageError says how to install it where it cannot be imported.

    Args:
      module: e.g. ``envpool``.
      extra: of asyncagent, which brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise UsageError(
            f"{package} cannot be imported ({error}); {how_to_install(extra)}"
        ) from error


def import_envpool(family: str) -> Any:
    """envpool with one family of its environments (e.g. ``atari``); UsageError if it is missing.

    Left to itself it loads all of its 17 and matplotlib: 100 MB and a second per process.  Families
    asked for later are added, and ``import envpool.entry`` brings the others.
    """
    entry = "envpool.entry"  # imports every family
    alone = "envpool" not in sys.modules
    if alone:
        sys.modules[entry] = ModuleType(entry)
    try:
        envpool = import_engine("envpool", "atari")
    finally:
        if alone:
            del sys.modules[entry]
    import_engine(f"envpool.{family}.registration", "atari")
    return envpool


def env_seeds(seed: int, first_env_index: int, num_envs: int) -> list[int]:
    """Seeds in [0, 2**31) of the environments ``first_env_index ...`` of a run.

    Each is a hash of the run's seed and the environment's index in the whole run: groups differ,
    runs with neighbouring seeds have no environment in common, and how environments are split
    into groups changes none of them.
    """
    indices = range(first_env_index, first_env_index + num_envs)
    words = [np.random.SeedSequence((seed, index)).generate_state(1)[0] for index in indices]
    return [int(word) >> 1 for word in words]


def check_action(action: ActionArray, num_envs: int, space: ActionSpace) -> None:
    """ValueError unless ``action`` has the shape, kind and range of one action per environment."""
    if isinstance(space, Discrete):
        # In Python: for a group's few numbers numpy's calls take ten times as long.
        good = action.shape == (num_envs,) and action.dtype.kind == "i"
        if good and 0 <= min(choices := action.tolist()) <= max(choices) < space.num_actions:
            return
    elif action.shape == (num_envs, *space.array.shape):
        if isinstance(space, Box):
            good = action.dtype.kind == "f" and bool(np.isfinite(action).all())
        else:
            good = action.dtype.kind == "i"
            good = good and bool(((action >= 0) & (action < np.array(space.sizes))).all())
        if good:
            return
    raise ValueError(
        f"action must be one of {space} for each of {num_envs} environments, "
        f"not {action.dtype} {action.shape}: {action}"
    )
