"""Every component at the best of several settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from asyncagent.bench.bound import CPU, places_of
from asyncagent.bench.children import Children
from asyncagent.bench.job import Job, Kind, Parameters
from asyncagent.config import Config
from asyncagent.envs import family_of, levels_of

POOL_SIZES = {"ours": (8, 16, 32, 64), "reference": (16, 32)}
WORKER_SIZES = {"ours": (1, 2, 4, 8, 16), "reference": (1, 2, 4)}
DMLAB_SIZES = {"ours": (1, 2, 4), "reference": (1, 4)}
CPU_ROWS = {"ours": (8, 16, 32, 64, 128, 256), "reference": (16, 32, 64, 128, 256)}
GPU_ROWS = {"ours": (64, 256, 512, 1024, 2048, 4096), "reference": (256, 1024, 4096)}


class Point(NamedTuple):
    """One setting and what it gave."""

    parameters: Parameters
    rate: float
    """Steps per core-second or GPU-second."""


def settings(kind: Kind, component: str, config: Config) -> list[Parameters]:
    """What a component is tried with."""
    on_gpu = places_of(config).get(component) != CPU
    match component:
        case "env":
            family = family_of(levels_of(config.level_name)[0])
            sizes = {"atari": POOL_SIZES, "toy": POOL_SIZES, "dmlab": DMLAB_SIZES}
            # Two small groups of a pool: one's Python runs while the other's engine works.
            twice = kind == "ours" and family in ("atari", "toy")
            return [
                {"group_size": size, "groups": 2 if twice and size == 8 else 1}
                for size in sizes.get(family, WORKER_SIZES)[kind]
            ]
        case "inference":
            return [{"rows": rows} for rows in (GPU_ROWS if on_gpu else CPU_ROWS)[kind]]
        case "learner":
            most = 0 if on_gpu or kind == "reference" else config.batch_size
            powers = [1 << n for n in range(16) if 1 << n <= most]
            return [{"columns": columns} for columns in (0, *powers)]
        case "transfer":
            return [{"megabytes": size} for size in (4, 32)]
    raise ValueError(component)


class Gauge:
    """Measures components of one kind on the processes of that kind."""

    def __init__(self, kind: Kind, children: Children, config: Config, cores: int) -> None:
        self.kind = kind
        self._children = children
        self._config = config
        self._cores = cores

    def rate(self, component: str, parameters: Parameters, seconds: float) -> float:
        """Steps per core-second; per GPU-second of what runs there."""
        job = Job(self.kind, component, self._config, parameters, seconds)
        if places_of(self._config).get(component) == CPU:
            return self._children.measure(job) / self._cores
        return self._children.measure(job, 1)

    def sweep(self, component: str, seconds: float, tell: Callable[[Point], None]) -> list[Point]:
        """The points of all settings, in their order; ``tell(point)`` of each at once."""
        points = []
        for parameters in settings(self.kind, component, self._config):
            points.append(Point(parameters, self.rate(component, parameters, seconds)))
            tell(points[-1])
        return points


def best(points: list[Point]) -> Point:
    """The fastest."""
    return max(points, key=lambda point: point.rate)
