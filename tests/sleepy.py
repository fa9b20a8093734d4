"""An environment that does nothing but sleep, and knows exactly when it slept.

``tests.sleepy:Sleepy`` sleeps $ASYNCAGENT_SLEEPS seconds in every step and writes the beginning and
the end to a file of its own in the folder $ASYNCAGENT_SLEPT.  Times are ``perf_counter``'s, which
all processes of a machine share.  No torch: worker processes import this.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

FOLDER, SECONDS, SIZE = "ASYNCAGENT_SLEPT", "ASYNCAGENT_SLEEPS", "ASYNCAGENT_ROW"
Row = npt.NDArray[np.float32]


class Sleepy(gymnasium.Env[Row, np.int64]):
    """Observes $ASYNCAGENT_ROW numbers that do not compress; an episode never ends."""

    def __init__(self) -> None:
        size = int(os.environ.get(SIZE, "1"))
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.row = np.random.default_rng(1).random(size, np.float32)
        self.path = Path(os.environ[FOLDER]) / uuid.uuid4().hex

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Row, dict[str, Any]]:
        super().reset(seed=seed)
        return self.row, {}

    def step(self, action: np.int64) -> tuple[Row, float, bool, bool, dict[str, Any]]:
        with self.path.open("a") as file:
            print(time.perf_counter(), file=file, flush=True)
            time.sleep(float(os.environ[SECONDS]))
            print(time.perf_counter(), file=file)
        return self.row, 0.0, False, False, {}


def slept_s(intervals: list[tuple[float, float]], begin_s: float, end_s: float) -> float:
    """Seconds of the intervals that lie within [begin_s, end_s]."""
    return sum(max(0.0, min(to, end_s) - max(since, begin_s)) for since, to in intervals)


def environments(folder: Path) -> list[list[tuple[float, float]]]:
    """When each environment slept; one that sleeps now does so for ever."""
    found = []
    for path in folder.iterdir():
        times = [*map(float, path.read_text().split())]
        found.append(list(zip(times[::2], [*times[1::2], float("inf")], strict=False)))
    return found
