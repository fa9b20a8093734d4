"""Which flags train fastest on this machine: one after the other, by short runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from asyncagent.bench import training
from asyncagent.bench.training import Training, TrainingFailed
from asyncagent.config import MAX_ACTORS_PER_COLUMN, Config, in_workers
from asyncagent.envs import levels_of
from asyncagent.errors import UsageError
from asyncagent.placement import cores

WORTH = 1.02
"""A change that does not make it faster by this factor is noise, and not made."""
GROUP_SIZES = (4, 8, 16, 32, 64)
GROUPS_PER_CORE = (1, 2, 4)


class Trial(NamedTuple):
    """One short run."""

    flags: dict[str, Any]
    """What differs from the defaults."""
    training: Training | None
    """None if the run failed or was refused."""
    failure: str = ""

    @property
    def steps_per_s(self) -> float:
        """0 if it failed."""
        return 0.0 if self.training is None else self.training.steps_per_s


class Tuner:
    """Takes the flags in turn: for each tries its values with the best of the others so far."""

    def __init__(
        self, config: Config, seconds: float, warmup_s: float, minutes: float,
        tell: Callable[[Trial, float], None],
        run: Callable[[Config], Training] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Runs nothing yet.

        Args:
          config: the defaults, and what is trained.
          seconds, warmup_s: of each run.
          minutes: no run is begun after so many.
          tell: called after each run with it and the share of the time that is over, in [0, 1].
          run: measures a configuration; None: ``training.run``.
        """
        self._config = config
        self._limit_s = 60 * minutes
        self._tell = tell
        self._clock = clock
        self._run = run or (lambda c: training.run(c, seconds, warmup_s, lambda _: None))
        self._trials: list[Trial] = []

    def tune(self) -> list[Trial]:
        """All trials, the defaults' first; the best is ``best_of``'s.

        UsageError where the defaults are refused.
        """
        started_s = self._clock()
        self._try({}, started_s)
        for knob in (self._shapes, self._env_threads, self._inference, self._learner):
            for change in knob():
                if self._clock() - started_s >= self._limit_s:
                    return self._trials
                flags = self._differing(best_of(self._trials).flags | change)
                if all(flags != trial.flags for trial in self._trials):
                    self._try(flags, started_s)
        return self._trials

    def _try(self, flags: dict[str, Any], started_s: float) -> None:
        try:
            trial = Trial(flags, self._run(dataclasses.replace(self._config, **flags)))
        except (TrainingFailed, UsageError) as error:
            # What is refused from the beginning was asked for; later a flag did not suit others.
            if isinstance(error, UsageError) and not self._trials:
                raise
            trial = Trial(flags, None, str(error))
        self._trials.append(trial)
        self._tell(trial, min(1.0, (self._clock() - started_s) / self._limit_s))

    def _differing(self, flags: dict[str, Any]) -> dict[str, Any]:
        return {k: value for k, value in flags.items() if value != getattr(self._config, k)}

    def _now(self) -> Config:
        return dataclasses.replace(self._config, **best_of(self._trials).flags)

    def _shapes(self) -> Iterator[dict[str, Any]]:
        """Numbers of groups and their sizes, the nearest to the defaults first."""
        config, levels = self._config, len(levels_of(self._config.level_name))
        most = MAX_ACTORS_PER_COLUMN * config.batch_size
        sizes = (1,) if config.group_size == 1 else GROUP_SIZES
        shapes = {
            (per_core * cores() * levels, size)
            for per_core in GROUPS_PER_CORE
            for size in sizes
            if per_core * cores() * levels * size <= most
        }

        def distance(shape: tuple[int, int]) -> float:
            groups, size = shape[0] / config.num_groups, shape[1] / config.group_size
            return max(groups, 1 / groups) * max(size, 1 / size)

        for groups, size in sorted(shapes, key=distance):
            yield {"num_groups": groups, "num_actors": groups * size}

    def _env_threads(self) -> Iterator[dict[str, Any]]:
        if in_workers(self._config.level_name):
            return
        for threads in {1, min(cores(), self._now().group_size)}:
            yield {"env_threads": threads}
        yield {"env_niceness": 0 if self._now().env_niceness else 10}

    def _inference(self) -> Iterator[dict[str, Any]]:
        for groups in (1, 2):
            yield {"min_inference_rows": groups * self._now().group_size}
        yield {"inference_threads": min(cores(), 2)}

    def _learner(self) -> Iterator[dict[str, Any]]:
        for threads in sorted({1, max(1, cores() // 2), cores()}):
            yield {"learner_threads": threads}


def best_of(trials: list[Trial]) -> Trial:
    """The fastest, where it is worth the change from the one before it."""
    best = trials[0]
    for trial in trials[1:]:
        if trial.steps_per_s > WORTH * best.steps_per_s:
            best = trial
    return best
