"""What a level keeps beside another one whose resets take a hundred times longer.

    python scripts/bench_envs.py --fairness [--json] [--seconds S] [--rounds N]

Two workers of four environments play two levels on one event loop.  ``kept`` is what the fast level
makes of the steps/s that it makes alone on the same workers; where the resets burn processor time,
``of its fair share`` is the processor time of its worker, out of what is fair: a core, or half of
what both workers had where there were no two cores for them.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import uvloop

from asyncagent.envs.base import EnvRecipe, Outcome
from asyncagent.envs.subproc import WorkerGroup
from asyncagent.structs import ArraySpec, Discrete, EnvSpec
from bench_envs import cpu_s, our_children, spread

SPEC = EnvSpec(ArraySpec((1,), "float32"), Discrete(2), 1)


class Chore:
    """A level whose steps burn 0.1 ms of processor time and whose resets take ``reset_s``."""

    STEPS = 64

    def __init__(self, reset_s: float, burn: bool) -> None:
        self.spec = SPEC
        self._reset_s = reset_s
        self._burn = burn
        self._step = 0

    def reset(self) -> Any:
        self._step = 0
        (burn if self._burn else time.sleep)(self._reset_s)
        return np.zeros(1, np.float32)

    def step(self, action: Any) -> Outcome:
        self._step += 1
        burn(1e-4)
        return Outcome(np.zeros(1, np.float32), 1.0, self._step == self.STEPS, False)

    def close(self) -> None:
        pass


def burn(seconds: float) -> None:
    """Use up processor time."""
    stop_s = time.thread_time() + seconds
    while time.thread_time() < stop_s:
        pass


def chore(seed: int, reset_s: float, burn: bool) -> Chore:
    """The maker of the two levels' environments."""
    return Chore(reset_s, burn)


class Share(NamedTuple):
    """One round of the fast level alone, then of both levels together."""

    alone: float
    """Steps/s of the fast level."""
    fast: float
    """Steps/s of the fast level beside the slow one."""
    slow: float
    """Steps/s of the slow level."""
    fast_cpu: float
    """Cores that the fast level's worker had beside the slow one's."""
    slow_cpu: float
    """Cores that the slow level's worker had."""

    @property
    def kept(self) -> float:
        """What of its steps/s the fast level keeps."""
        return self.fast / self.alone

    @property
    def of_fair_share(self) -> float:
        """The fast worker's processor time, out of half of what both had, or of a whole core."""
        return self.fast_cpu / min(1.0, (self.fast_cpu + self.slow_cpu) / 2)


def fairness(burn: bool, seconds: float, rounds: int) -> list[Share]:
    """Two levels whose resets take 1 ms and 100 ms, of sleep or of processor time."""

    async def start(name: str, reset_s: float) -> tuple[WorkerGroup, set[int]]:
        before = our_children()
        group = WorkerGroup(
            EnvRecipe("bench_fairness:chore", {"reset_s": reset_s, "burn": burn}),
            SPEC,
            level_name=name,
            seeds=range(4),
            name=name,
            timeout_s=60,
            max_failures=1,
        )
        await group.reset()
        return group, our_children() - before

    async def rate(group: WorkerGroup) -> float:
        steps, started_s = 0, time.perf_counter()
        action = np.zeros(group.num_envs, np.int64)
        while time.perf_counter() < started_s + seconds:
            steps += int((~(await group.step(action)).first).sum())
        return steps / (time.perf_counter() - started_s)

    async def both(workers: Sequence[tuple[WorkerGroup, set[int]]], alone: float) -> Share:
        started_s, before = time.perf_counter(), [cpu_s(pids) for _, pids in workers]
        rates = [asyncio.create_task(rate(group)) for group, _ in workers]
        await rates[0]
        took_s = time.perf_counter() - started_s
        cores = [(cpu_s(w[1]) - was) / took_s for w, was in zip(workers, before, strict=True)]
        return Share(alone, rates[0].result(), await rates[1], *cores)

    async def play() -> list[Share]:
        workers = [await start("fast", 0.001), await start("slow", 0.1)]
        shares = [await both(workers, await rate(workers[0][0])) for _ in range(rounds)]
        await asyncio.gather(*(group.close() for group, _ in workers))
        return shares

    return uvloop.run(play())


def show_fairness(results: dict[str, list[Share]]) -> None:
    """A table of what the fast level keeps."""
    from rich.console import Console
    from rich.table import Table

    cores = len(os.sched_getaffinity(0))
    table = Table(title=f"the fast of two levels, 2 workers on {cores} cores: median (range)")
    columns = ("slow reset", "alone, steps/s", "beside", "kept", "of its fair share", "slow level")
    for column in columns:
        table.add_column(column, justify="right")
    for kind, shares in results.items():
        table.add_row(
            kind,
            spread([share.alone for share in shares]),
            spread([share.fast for share in shares]),
            spread([share.kept for share in shares], 2),
            spread([share.of_fair_share for share in shares], 2) if kind == "burns" else "",
            spread([share.slow for share in shares]),
        )
    Console().print(table)


def measure_and_print(seconds: float, rounds: int, as_json: bool) -> None:
    """Both kinds of resets: a table, or one JSON object of all rounds."""
    shares = {kind: fairness(kind == "burns", seconds, rounds) for kind in ("sleeps", "burns")}
    if as_json:
        print(json.dumps({kind: [s._asdict() for s in all_] for kind, all_ in shares.items()}))
    else:
        show_fairness(shares)
