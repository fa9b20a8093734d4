"""An environment whose steps take very different times, for ``bench_peers.py --scenario=varying``.

Every step takes 0.2 ms, but one in 200, at random, takes 100 times as long: 20 ms, as where a level
is made or a simulator resets itself; 0.3 ms on average.  With VARYING_WAIT=burn (the default) the
step computes that long, with VARYING_WAIT=sleep it waits for something elsewhere.  The observation
is Atari's, uint8 [4, 84, 84], so that the net costs what it usually does; an episode has 1,000.
"""

from __future__ import annotations

import os
import time
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

STEP_S = 0.2e-3
SLOW_FACTOR = 100
SLOW_CHANCE = 1 / 200
EPISODE_STEPS = 1000


class VaryingEnv(gymnasium.Env[npt.NDArray[np.uint8], np.int64]):
    """See the module's docstring; the first action of four is rewarded."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(4)
        self._burn = os.environ.get("VARYING_WAIT", "burn") == "burn"
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        self._frame = self.np_random.integers(0, 256, (4, 84, 84), np.uint8)
        return self._frame, {}

    def step(
        self, action: np.int64
    ) -> tuple[npt.NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        slow = self.np_random.random() < SLOW_CHANCE
        take(STEP_S * SLOW_FACTOR if slow else STEP_S, self._burn)
        self._steps += 1
        return self._frame, float(action == 0), self._steps >= EPISODE_STEPS, False, {}


def take(seconds: float, burn: bool) -> None:
    """Compute (seconds of this thread's own CPU time) or sleep."""
    if not burn:
        time.sleep(seconds)
        return
    # CPU time, not the clock: who is kept off a core must make up for it, as real work must.
    stop = time.thread_time() + seconds
    while time.thread_time() < stop:
        pass
