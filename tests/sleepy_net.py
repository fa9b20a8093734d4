"""A net that sleeps, and knows exactly when it slept; see ``sleepy`` for its environment.

``tests.sleepy_net:build`` sleeps in its forward passes as ``SLEEPS`` says, and notes it in
``SLEPT``.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from asyncagent.bodies import MlpBody
from asyncagent.models import ActorCritic, NetOutput
from asyncagent.structs import ArraySpec, EnvSpec

SLEEPS = {"learner": 0.0, "inference": 0.0}
"""Seconds per forward pass on a thread of that name."""
SLEPT: dict[str, list[tuple[float, float]]] = {"learner": [], "inference": []}
"""From when to when."""


class Net(ActorCritic):
    """Sees nothing, and sleeps."""

    def forward(self, observation: Any, *rest: Any) -> NetOutput:
        name = threading.current_thread().name
        if seconds := SLEEPS.get(name, 0.0):
            SLEPT[name].append((time.perf_counter(), float("inf")))  # until now, for ever
            time.sleep(seconds)
            SLEPT[name][-1] = (SLEPT[name][-1][0], time.perf_counter())
        return super().forward(0 * observation[..., :1], *rest)


def build(spec: EnvSpec, use_lstm: bool) -> Net:
    return Net(MlpBody(ArraySpec((1,), "float32")), spec.actions, 0)
