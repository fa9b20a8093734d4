"""The protocol of an environment group: what an actor may ask of any engine."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import numpy as np

from asyncagent.errors import UsageError
from asyncagent.structs import BoolArray, EnvSpec, EnvStep, Episode, FloatArray, IntArray


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

    async def step(self, action: IntArray) -> EnvStep:
        """The row that follows ``action`` (int64 [E]); the action is ignored after an end row."""
        ...

    async def close(self) -> None:
        """Let the engine go; harmless when repeated."""
        ...


class EpisodeTracker:
    """Whole-game returns and lengths from a group's rows.

    A *game* may span several training episodes (life loss ends an episode, not a game).
    """

    def __init__(self, num_envs: int, level_name: str) -> None:
        self._level_name = level_name
        self._return = np.zeros(num_envs, np.float64)
        self._steps = np.zeros(num_envs, np.int64)

    def update(
        self, reward: FloatArray, first: BoolArray, game_over: BoolArray
    ) -> tuple[Episode, ...]:
        """Account one row; returns the games that ended with it.

        Args:
          reward: float32 [E], unclipped.
          first: bool [E]; a first row's observation cost no agent step.
          game_over: bool [E], True in the end row of a game.
        """
        self._return += reward
        self._steps += ~first
        if not game_over.any():
            return ()
        ended = np.flatnonzero(game_over)
        episodes = tuple(
            Episode(self._level_name, float(self._return[i]), int(self._steps[i]), int(i))
            for i in ended
        )
        self._return[ended] = 0.0
        self._steps[ended] = 0
        return episodes


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
            f"{package} cannot be imported ({error}): pip install 'asyncagent[{extra}]'"
        ) from error


def env_seeds(seed: int, first_env_index: int, num_envs: int) -> list[int]:
    """Seeds in [0, 2**31) of the environments ``first_env_index ...`` of a run.

    Each is a hash of the run's seed and the environment's index in the whole run: groups differ,
    runs with neighbouring seeds have no environment in common, and how environments are split
    into groups changes none of them.
    """
    indices = range(first_env_index, first_env_index + num_envs)
    words = [np.random.SeedSequence((seed, index)).generate_state(1)[0] for index in indices]
    return [int(word) >> 1 for word in words]
