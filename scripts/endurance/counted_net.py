"""Net ``endurance.counted_net:build``: sees nothing, and writes down what it is to learn from.

A line of ``number:first:steps`` words for each column of a batch, to a file of its process in the
folder $ASYNCAGENT_LEARNED; a column has several words where an episode ended or a worker was lost.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from asyncagent.bodies import MlpBody
from asyncagent.models import ActorCritic, NetOutput
from asyncagent.structs import EnvSpec
from endurance.accounts import Column
from endurance.counted_env import HALF

FOLDER = "ASYNCAGENT_LEARNED"


class Net(ActorCritic):
    """The actions are as good as any."""

    file: ClassVar[int] = -1

    def forward(self, observation: Any, *rest: Any) -> NetOutput:
        if torch.is_grad_enabled() and FOLDER in os.environ:
            if Net.file < 0:
                path = Path(os.environ[FOLDER]) / str(os.getpid())
                Net.file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            lines = [
                " ".join(":".join(map(str, column)) for column in columns_of(rows)) + "\n"
                for rows in observation.numpy().astype(np.int64).swapaxes(0, 1)
            ]
            os.write(Net.file, "".join(lines).encode())
        return super().forward(torch.zeros_like(observation), *rest)


def build(spec: EnvSpec, use_lstm: bool) -> Net:
    """See ``--net``."""
    assert not isinstance(spec.observation, dict | tuple)
    return Net(MlpBody(spec.observation), spec.actions, 0)


def columns_of(rows: npt.NDArray[np.int64]) -> Iterator[Column]:
    """The steps between the rows [T+1, 3] of an unroll's column that happened in an environment.

    From an episode's last row to the first of the next there is none, nor to or from a lost row.
    """
    numbers, counts = rows[:, 0] * HALF + rows[:, 1], rows[:, 2]
    present = (np.diff(numbers) == 0) & (np.diff(counts) == 1)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], present, [False]))))
    for begin, end in edges.reshape(-1, 2).tolist():
        yield Column(int(numbers[begin]), int(counts[begin]) + 1, end - begin)


def learned(path: Path) -> list[list[Column]]:
    """What one process wrote, column after column; a line that a kill cut off is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [[Column(*map(int, word.split(":"))) for word in line.split()] for line in lines]
