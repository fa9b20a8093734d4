"""Level ``endurance.counted_env:Counted``: shows which environment it is and how far it has come.

Together with the net of ``counted_net`` it tells exactly which steps were learned from.
"""

from __future__ import annotations

import os
import time
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

STEP_S = 0.01
"""Of every step: other runs want the cores, too."""
EPISODE = 50
"""Steps of an episode; a number that no unroll's length divides evenly."""
HALF = 1 << 24
"""Whole numbers below it are exact in float32."""

Row = npt.NDArray[np.float32]


class Counted(gymnasium.Env[Row, np.int64]):
    """Observes [upper half of its number, lower half, steps in all its episodes]."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = spaces.Discrete(2)
        # Zeros stand where an environment was lost.
        self._number = 1 + int.from_bytes(os.urandom(5))
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Row, dict[str, Any]]:
        super().reset(seed=seed)
        return self._show(), {}

    def step(self, action: np.int64) -> tuple[Row, float, bool, bool, dict[str, Any]]:
        time.sleep(STEP_S)
        self._steps += 1
        return self._show(), 0.0, False, self._steps % EPISODE == 0, {}

    def _show(self) -> Row:
        return np.array([*divmod(self._number, HALF), self._steps], np.float32)
