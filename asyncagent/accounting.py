"""Keeps a run's accounts: tracks, lag and processor time become the ``Stages`` of a report."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from asyncagent.cpu_times import CpuClock, CpuTimes
from asyncagent.metrics import HostReport
from asyncagent.stages import Stages
from asyncagent.tracks import (
    COMPUTES,
    COPIES,
    STEPS,
    WAITS,
    WAITS_ACTIONS,
    WAITS_LEARNER,
    Lag,
    Track,
)

TICK_S = 0.05
"""The loop's lag is looked at so often."""

_log = logging.getLogger(__name__)


class Accounts:
    """Where the time of one run goes. Belongs to the event loop's thread."""

    def __init__(
        self, num_groups: int, inference: Track, learner: Track, inference_threads: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        """``inference_threads``: that each operator of the inference is shared by."""
        self.groups = [Track(4, clock) for _ in range(num_groups)]
        """Each to be told by its actor."""
        self._inference = inference
        self._learner = learner
        self._inference_threads = inference_threads
        self._clock = clock
        self._lag = Lag(TICK_S, clock())
        self._loop_name = threading.current_thread().name
        self._cpu_clock: CpuClock | None = None
        self._cpu_is_unknown = False
        self._ended: tuple[Stages, float] | None = None

    def begin(self) -> None:
        """Time counts from now on."""
        for track in (*self.groups, self._inference, self._learner):
            track.take()
        self._lag = Lag(TICK_S, self._clock())

    async def watch_loop(self) -> None:
        """See how late the event loop is, for ever."""
        while True:
            await asyncio.sleep(self._lag.wait_s(self._clock()))
            self._lag.ran(self._clock())

    def read_cpu(self) -> CpuTimes | None:
        """Processor time since the last call; None at the first. Reads files: on a thread.

        None, too, where it cannot be read: a figure is not worth a run.
        """
        try:
            if self._cpu_clock is None:
                self._cpu_clock = CpuClock()
                return None
            return self._cpu_clock.read()
        except Exception:
            if not self._cpu_is_unknown:
                _log.warning("processor times are not known; the run goes on", exc_info=True)
            self._cpu_is_unknown = True
            return None

    def end(self) -> None:
        """The run ends: what its end takes is no part of what it was."""
        self._ended = self._ended or self._take(None, ())

    def take(
        self, cpu: CpuTimes | None, hosts: Iterable[HostReport] = ()
    ) -> tuple[Stages, float]:  # fmt: skip
        """Shares since the last call, and how late the loop was, in milliseconds."""
        return self._ended or self._take(cpu, hosts)

    def _take(
        self, cpu: CpuTimes | None, hosts: Iterable[HostReport]
    ) -> tuple[Stages, float]:  # fmt: skip
        groups = [track.take() for track in self.groups]
        inference, learner = self._inference.take(), self._learner.take()
        there = list(hosts)
        stages = Stages(
            env_steps=_mean([shares[STEPS] for shares in groups]),
            env_waits_actions=_mean([shares[WAITS_ACTIONS] for shares in groups]),
            env_waits_learner=_mean([shares[WAITS_LEARNER] for shares in groups]),
            inference_computes=inference[COMPUTES],
            inference_copies=inference[COPIES],
            inference_waits=inference[WAITS],
            learner_computes=learner[COMPUTES],
            learner_copies=learner[COPIES],
            learner_waits=learner[WAITS],
            hosts_wait=_mean([host.waits for host in there]),
            hosts_step=_mean([host.env_steps for host in there]),
        )
        if cpu is not None:
            stages = stages._replace(**self._cpu_shares(cpu))
        return stages, self._lag.take_ms()

    def _cpu_shares(self, cpu: CpuTimes) -> dict[str, float]:
        def of(prefix: str) -> float:
            return sum(used for name, used in cpu.threads.items() if name.startswith(prefix))

        # Threads within an operator are the library's: they work while their caller does.
        inference = of("inference") * self._inference_threads
        learner, loop = of("learner"), cpu.threads.get(self._loop_name, 0.0)
        # Engines step on threads and in processes of their own making: theirs is what is left.
        rest = max(0.0, cpu.run - inference - learner - loop)
        return {
            "loop_busy": min(loop, 1.0),
            "cores_busy": min(cpu.run / cpu.num_cores, 1.0),
            "cores_taken": min(cpu.taken / cpu.num_cores, 1.0),
            "env_cpu": rest / cpu.num_cores if self.groups else math.nan,
            "inference_cpu": inference / cpu.num_cores,
            "learner_cpu": learner / cpu.num_cores,
        }


def _mean(values: Sequence[float]) -> float:
    """Of the numbers among them; nan of none."""
    numbers = [value for value in values if math.isfinite(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan
