"""The steps per second that cores, GPUs and bus would give if nothing ever waited.

A step is one agent step of one environment: the environment makes it once, inference answers to
it once and the learner learns from it once.
"""

from __future__ import annotations

from collections.abc import Mapping

from asyncagent.config import Config
from asyncagent.policy import resolve_devices

CPU = "cpu"


def places_of(config: Config) -> dict[str, str]:
    """Where each component computes: ``cpu`` or a GPU's name."""
    learner, inference = resolve_devices(config)
    return {"env": CPU, "inference": str(inference), "learner": str(learner)}


def bound_steps_per_s(
    rates: Mapping[str, float], places: Mapping[str, str], cores: int,
    transfer: float | None = None,
) -> float:  # fmt: skip
    """Steps per second under perfect packing: those of the slowest place.

    A core, or a GPU, computes the components that share it one after the other, so a step takes
    the sum of their seconds.  All on a CPU: cores / (1/env + 1/inference + 1/learner).

    Args:
      rates: steps per core-second or GPU-second by component.
      places: by component, ``cpu`` for all cores together or a GPU's name.
      transfer: steps per second that cross the bus to the GPU, where there is one.
    """
    bounds = [] if transfer is None else [transfer]
    for place in set(places.values()):
        step_s = sum(1 / rates[name] for name, where in places.items() if where == place)
        bounds.append((cores if place == CPU else 1) / step_s)
    return min(bounds)
