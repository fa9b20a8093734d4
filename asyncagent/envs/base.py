"""The protocol of an environment group: what an actor may ask of any engine."""

from __future__ import annotations

from typing import Protocol

import numpy as np

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
