"""Resets of DeepMind Lab without its episodes, which fill the level cache ahead of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from asyncagent.envs.base import EnvRecipe, Outcome
from asyncagent.envs.dmlab import DmlabEnv, make_env
from asyncagent.structs import ArraySpec, Discrete, EnvSpec

SPEC = EnvSpec(ArraySpec((3,), "int64"), Discrete(1), 1)
"""Of a ``Filler``: shows the hits, misses and writes of the level cache in its last reset."""


def recipe(of_level: EnvRecipe) -> EnvRecipe:
    """How a worker process makes the filler of a level, from how it makes its environment."""
    return EnvRecipe("asyncagent.envs.dmlab_filler:make_filler", of_level.options)


def make_filler(*, seed: int, **options: Any) -> Filler:
    """The filler over what ``dmlab.make_env`` makes; raises what that does."""
    return Filler(make_env(seed=seed, **options))


class Filler:
    """An ``Env`` whose episodes end with their first step.

    Its resets are those of the environment's episodes, one after the other, seeds included.
    """

    def __init__(self, env: DmlabEnv) -> None:
        """Take over ``env``."""
        self.spec = SPEC
        self._env = env

    def reset(self) -> npt.NDArray[np.int64]:
        """int64 [3]: hits, misses and writes of the level cache in this reset."""
        before = self._counts()
        self._env.reset()
        return self._counts() - before

    def step(self, action: Any) -> Outcome:
        """The end."""
        return Outcome(None, 0.0, terminated=True, truncated=False)

    def close(self) -> None:
        """See ``Env``."""
        self._env.close()

    def _counts(self) -> npt.NDArray[np.int64]:
        cache = self._env.level_cache
        counts = (0, 0, 0) if cache is None else (cache.hits, cache.misses, cache.writes)
        return np.array(counts, np.int64)
