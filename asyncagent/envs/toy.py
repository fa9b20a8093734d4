"""Small environments that are learnt in a minute: catch, cartpole and memory.

- ``catch`` (envpool's Catch-v0): float32 [10, 5], 1 where the falling ball and the paddle are;
  left, stay, right; after nine steps +1 if the ball was caught, else -1.
- ``cartpole`` (envpool's CartPole-v1): float32 [4], two actions, +1 per step, terminated when the
  pole falls, truncated after 500 steps.
- ``memory`` (our own, no package needed): see ``MemoryEngine``.

Every episode is a whole game; an agent step is one frame.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from asyncagent.envs.base import env_seeds, import_envpool
from asyncagent.envs.pool import Engine, Rows
from asyncagent.structs import ArraySpec, Discrete, EnvSpec, FloatArray, IntArray

SPECS = {
    "cartpole": EnvSpec(ArraySpec((4,), "float32"), Discrete(2), 1),
    "catch": EnvSpec(ArraySpec((10, 5), "float32"), Discrete(3), 1),
    "memory": EnvSpec(ArraySpec((4,), "float32"), Discrete(2), 1),
}
_TASKS = {"cartpole": "CartPole-v1", "catch": "Catch-v0"}
_FAMILIES = {"cartpole": "classic_control", "catch": "toy_text"}
"""Of envpool's environments."""


def make_engine(
    level_name: str, *, num_envs: int, first_env_index: int, seed: int, num_threads: int
) -> Engine:
    """Environments ``first_env_index ...`` of the run ``seed`` (see ``env_seeds``)."""
    seeds = env_seeds(seed, first_env_index, num_envs)
    if level_name == "memory":
        return MemoryEngine(seeds)
    return EnvpoolToyEngine(level_name, seeds, num_threads)


class EnvpoolToyEngine:
    """``catch`` or ``cartpole``; envpool restarts an episode at the step after its end row."""

    def __init__(self, level_name: str, seeds: list[int], num_threads: int) -> None:
        envpool = import_envpool(_FAMILIES[level_name])
        # About cartpole's bounds, which nobody reads here.
        warnings.filterwarnings("ignore", ".*precision lowered by casting to float32")
        self.spec = SPECS[level_name]
        self.num_envs = len(seeds)
        self._in_order = np.arange(self.num_envs)
        self._pool: Any = envpool.make_gymnasium(
            _TASKS[level_name],
            num_envs=self.num_envs,
            env_seed=seeds,
            num_threads=min(num_threads, self.num_envs),
        )

    def reset(self) -> Rows:
        """See ``Engine``."""
        observation, info = self._pool.reset()
        nothing = np.zeros(self.num_envs, np.float32)
        never = np.zeros(self.num_envs, np.bool_)
        return self._rows(observation, nothing, never, never, info)

    def step(self, action: IntArray) -> Rows:
        """See ``Engine``."""
        return self._rows(*self._pool.step(action))

    def close(self) -> None:
        """See ``Engine``."""
        self._pool = None

    def _rows(self, *answer: Any) -> Rows:
        *fields, info = answer
        if (info["env_id"] != self._in_order).any():
            places = np.argsort(info["env_id"])
            fields = [field[places] for field in fields]
        observation, reward, terminated, truncated = fields
        truncated = truncated & ~terminated
        return Rows(observation, reward, terminated, truncated, terminated | truncated)


class MemoryEngine:
    """See one of two cues, wait, then name it.

    Observation float32 [4]: cue 0, cue 1, waiting, asked; one of them is 1, in the end row none.
    The first row shows the cue, 5 to 10 rows wait, one row asks.  Only the action chosen there
    counts: +1 if it is the cue's number, else -1, and the episode terminates.  Without memory
    the mean return is 0.
    """

    MIN_WAIT = 5
    MAX_WAIT = 10
    _WAITING = 2
    _ASKED = 3

    def __init__(self, seeds: list[int]) -> None:
        self.spec = SPECS["memory"]
        self.num_envs = len(seeds)
        self._rngs = [np.random.default_rng(seed) for seed in seeds]
        self._cue = np.zeros(self.num_envs, np.int64)
        self._row = np.zeros(self.num_envs, np.int64)
        # Row in which the question comes; the row after it is the end row.
        self._question = np.zeros(self.num_envs, np.int64)

    def reset(self) -> Rows:
        """See ``Engine``."""
        self._row[:] = self._question + 1
        return self.step(np.zeros(self.num_envs, np.int64))

    def step(self, action: IntArray) -> Rows:
        """See ``Engine``."""
        answered = self._row == self._question
        over = self._row > self._question
        reward = np.where(answered, np.where(action == self._cue, 1, -1), 0).astype(np.float32)
        self._row += 1
        for env in np.flatnonzero(over):
            rng = self._rngs[env]
            self._cue[env] = rng.integers(2)
            self._question[env] = 1 + rng.integers(self.MIN_WAIT, self.MAX_WAIT, endpoint=True)
            self._row[env] = 0
        never = np.zeros(self.num_envs, np.bool_)
        return Rows(self._observation(), reward, answered, never, answered)

    def state(self) -> dict[str, Any]:
        """See ``pool.Saves``."""
        return {
            "cue": self._cue.tolist(),
            "row": self._row.tolist(),
            "question": self._question.tolist(),
            "generators": [rng.bit_generator.state for rng in self._rngs],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """See ``pool.Saves``."""
        self._cue[:] = state["cue"]
        self._row[:] = state["row"]
        self._question[:] = state["question"]
        for rng, generator in zip(self._rngs, state["generators"], strict=True):
            rng.bit_generator.state = generator

    def close(self) -> None:
        """See ``Engine``."""

    def _observation(self) -> FloatArray:
        shown = np.select(
            [self._row == 0, self._row < self._question, self._row == self._question],
            [self._cue, self._WAITING, self._ASKED],
            default=-1,
        )
        one_hot: FloatArray = (shown[:, None] == np.arange(4)).astype(np.float32)
        return one_hot
