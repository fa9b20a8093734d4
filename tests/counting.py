"""An environment and a net that together tell exactly which steps were learned from.

``tests.counting:Counting`` observes a number of its own and its step counter; the net
``tests.counting:build`` writes down what it learns from, a line ``number first_step steps`` for
each column of a batch, to a file of its process in the folder $ASYNCAGENT_LEARNED.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces

from asyncagent.bodies import MlpBody
from asyncagent.models import ActorCritic, NetOutput
from asyncagent.structs import EnvSpec

FOLDER = "ASYNCAGENT_LEARNED"
Row = npt.NDArray[np.float32]


class Counting(gymnasium.Env[Row, np.int64]):
    """Observes [its number, steps until now]; an episode never ends."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.number = int.from_bytes(os.urandom(3))
        self.steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Row, dict[str, Any]]:
        super().reset(seed=seed)
        return self._show(), {}

    def step(self, action: np.int64) -> tuple[Row, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self._show(), 0.0, False, False, {}

    def _show(self) -> Row:
        return np.array([self.number, self.steps], np.float32)


class Net(ActorCritic):
    """Sees nothing, and writes down what it is shown to learn from."""

    file: ClassVar[int] = -1

    def forward(self, observation: Any, *rest: Any) -> NetOutput:
        if torch.is_grad_enabled() and FOLDER in os.environ:
            if Net.file < 0:
                path = Path(os.environ[FOLDER]) / str(os.getpid())
                Net.file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            columns = observation.numpy().astype(np.int64).swapaxes(0, 1)
            lines = [f"{rows[0, 0]} {rows[0, 1]} {len(rows) - 1}\n" for rows in columns]
            assert (np.diff(columns[..., 1], axis=1) == 1).all()
            assert (np.diff(columns[..., 0], axis=1) == 0).all()
            os.write(Net.file, "".join(lines).encode())
        return super().forward(torch.zeros_like(observation), *rest)


def build(spec: EnvSpec, use_lstm: bool) -> Net:
    """See ``--net``."""
    assert not isinstance(spec.observation, dict | tuple)
    return Net(MlpBody(spec.observation), spec.actions, 0)


class Learned(NamedTuple):
    """One column of one batch."""

    number: int
    first_step: int
    steps: int


def learned(path: Path) -> Iterator[Learned]:
    """What one process wrote; a line that a kill cut off is left out."""
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield Learned(*map(int, line.split()))
