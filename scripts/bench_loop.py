#!/usr/bin/env python3
"""The loop's own ceiling: steps/s through act, batcher, unroll buffers and queue, all else free.

The environments show uint8 [4, 84, 84] observations: random bytes out of a ring of buffers, every
row stamped with its place; the policy answers to the stamp (``free_envs``).  Everything between
them is the program's own: ``act``, ``DynamicBatcher`` and its thread, the unrolls and their
buffers, ``UnrollQueue``.  At its end a thread takes batches, verifies and releases them.

Verified while the clock runs, of every row: that the stamps are those of its place (all three: a
row torn between two steps is seen), and that the action recorded there is the one that follows
from its observation.  Verified by a checksum over all bytes, against that of what the environment
showed: every row (``checksums_of_all``), or one row of every environment of each unroll, and all
of the warm-up (``checksums_of_sample``: closer to what the loop alone costs).  The two take turns.

    python scripts/bench_loop.py [--json] [--profile] [--seconds S] [--rounds N]
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from asyncagent import actor, batch, batcher
from asyncagent.envs.base import EnvGroup
from asyncagent.envs.pool import PoolGroup
from asyncagent.metrics import Counters
from asyncagent.threads import NamedThread
from asyncagent.unroll import UnrollQueue, UnrollWriter
from free_envs import SPEC, FreeEngine, FreeGroup, Ring, Verifier, free_policy

WARM_UP_UNROLLS = 4  # of each group, before the clock starts


class Cell(NamedTuple):
    """What is measured."""

    groups: int
    group_size: int
    unroll_length: int
    maximum_batch_size: int
    env_threads: bool
    """Every group steps on a thread of its own, as engines do."""


class Result(NamedTuple):
    """What was measured."""

    steps_per_s: float
    group_steps: float
    inference_batch_mean: float
    summed_share: float
    """Of all rows, those whose checksum was compared."""
    seconds: float
    cpu_s: dict[str, float]
    """CPU seconds by the name of the thread; those of environments together."""


async def measure(
    cell: Cell, seconds: float, verify_all: bool = False, started: Callable[[], None] | None = None
) -> Result:
    """Run the loop for ``seconds`` after a warm-up, at whose end ``started()`` is called."""
    rings = [Ring(index, cell.group_size) for index in range(cell.groups)]
    groups: list[EnvGroup] = [
        PoolGroup(FreeEngine(ring), level_name="ring", name=ring.name)
        if cell.env_threads
        else FreeGroup(ring)
        for ring in rings
    ]
    verifier = Verifier(rings, float("inf") if verify_all else WARM_UP_UNROLLS)
    counters = Counters(SPEC.action_repeats, 0, 0, 0.0)
    queue = UnrollQueue(cell.group_size, cell.group_size)
    requests = batcher.DynamicBatcher(free_policy, maximum_batch_size=cell.maximum_batch_size)

    async def take(batches: int) -> None:
        for _ in range(batches):
            parts = await queue.get()
            await learner.run(verifier.check, parts)
            queue.release(parts)

    with requests, closing(NamedThread("verifier")) as learner:
        async with asyncio.TaskGroup() as tasks:
            actors = [
                tasks.create_task(
                    actor.act(group, requests, queue.put, cell.unroll_length, (), counters.on_row)
                )
                for group in groups
            ]
            await take(WARM_UP_UNROLLS * cell.groups)
            if started is not None:
                started()
            before, steps, summed = requests.statistics(), verifier.steps, verifier.rows_summed
            cpu_before, started_s = cpu_per_thread(), time.perf_counter()
            elapsed_s = 0.0
            while elapsed_s <= seconds:
                await take(1)
                elapsed_s = time.perf_counter() - started_s
            cpu = {name: s - cpu_before[name] for name, s in cpu_per_thread().items()}
            steps, summed = verifier.steps - steps, verifier.rows_summed - summed
            batches = requests.statistics().since(before)
            for task in actors:
                task.cancel()
        for group in groups:
            await group.close()
    rows = steps / cell.unroll_length * (cell.unroll_length + 1)
    return Result(
        steps / elapsed_s, steps / cell.group_size, batches.mean_batch_size, summed / rows,
        elapsed_s, cpu,
    )  # fmt: skip


def cpu_per_thread() -> dict[str, float]:
    """CPU seconds that threads have used, by name; environments' together."""
    seconds: dict[str, float] = defaultdict(float)
    for thread in threading.enumerate():
        if thread.ident is not None:
            name = thread.name.partition("-")[0]
            seconds[name] += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return seconds


class Profile:
    """Seconds within functions, their callees' not counted, by thread; wall clock."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._inner = threading.local()

    def timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, accounted under ``label``."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            outer_s = getattr(self._inner, "s", 0.0)
            self._inner.s = 0.0
            started_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed_s = time.perf_counter() - started_s
                thread = threading.current_thread().name.partition("-")[0]
                self.seconds[thread, label] += elapsed_s - self._inner.s
                self._inner.s = outer_s + elapsed_s

        return call

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Account what the hot path calls meanwhile."""
        with ExitStack() as patches:
            for owner, name, label in HOT_PATH:
                timed = self.timed(label, getattr(owner, name))
                patches.enter_context(mock.patch.object(owner, name, timed))
            yield


HOT_PATH: list[tuple[Any, str, str]] = [
    (UnrollWriter, "add_row", "act: write the observation into the unroll"),
    (UnrollWriter, "add_choice", "act: keep the choice"),
    (UnrollWriter, "finish", "act: write the rest of the unroll"),
    (actor, "action_that_led_to", "act: last action"),
    (Counters, "on_row", "metrics: count the row"),
    (Ring, "show", "environment (this script's)"),
    (batcher.DynamicBatcher, "__call__", "batcher: take the request"),
    (batcher.DynamicBatcher, "_flush_if_due", "batcher: decide"),
    (batcher.DynamicBatcher, "_start", "batcher: start the batch"),
    (NamedThread, "submit", "batcher: hand to the thread"),
    (batcher.DynamicBatcher, "_finish", "batcher: account the batch"),
    (batch.Batch, "answer", "batcher: wake the callers"),
    (batcher.DynamicBatcher, "_compute", "thread: rest of the batch, call_soon_threadsafe"),
    (batch.Form, "concatenate", "thread: concatenate the requests"),
    (sys.modules[__name__], "free_policy", "thread: policy (this script's)"),
    (batch, "_split", "thread: split the answer"),
    (UnrollQueue, "put", "queue"),
    (Verifier, "check", "verify (this script's)"),
]


def report_profile(cell: Cell, seconds: float) -> None:
    """Print where the time of one group's step goes, per thread."""
    profile = Profile()
    with profile():
        result = uvloop.run(measure(cell, seconds, started=profile.seconds.clear))
    print(f"profile, timers included: {result.steps_per_s:,.0f} steps/s; µs per step of a group")
    scale = 1e6 / result.group_steps
    by_thread: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for (thread, label), s in profile.seconds.items():
        by_thread[thread].append((s * scale, label))
    for thread, rows in by_thread.items():
        cpu_us = result.cpu_s.get(thread, 0.0) * scale
        print(f"  {thread}: {cpu_us:.1f} µs CPU, {result.seconds * scale:.1f} µs wall")
        for us, label in sorted(rows, reverse=True):
            print(f"    {us:8.1f}  {label}")
        rest = result.seconds * scale - sum(us for us, _ in rows)
        print(f"    {rest:8.1f}  the rest: event loop, coroutines, waiting")


def summary(results: list[Result]) -> dict[str, float]:
    """Steps/s of several rounds, and what belongs to them."""
    rates = [result.steps_per_s for result in results]
    return {
        "median": statistics.median(rates),
        "min": min(rates),
        "max": max(rates),
        "inference_batch_mean": statistics.median(r.inference_batch_mean for r in results),
        "summed_share": statistics.median(r.summed_share for r in results),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--profile", action="store_true", help="then where the time goes; not in JSON"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--unroll_length", type=int, default=20)
    parser.add_argument("--maximum_batch_size", type=int, default=1024)
    parser.add_argument("--env_threads", action="store_true", help="a thread for every group")
    flags = parser.parse_args()
    cell = Cell(
        flags.groups,
        flags.group_size,
        flags.unroll_length,
        flags.maximum_batch_size,
        flags.env_threads,
    )
    results: dict[str, list[Result]] = {"all": [], "sample": []}
    for _ in range(flags.rounds):
        for summed, of_kind in results.items():
            of_kind.append(uvloop.run(measure(cell, flags.seconds, summed == "all")))
    figures = {f"checksums_of_{summed}": summary(of_kind) for summed, of_kind in results.items()}
    if flags.json:
        print(json.dumps({**cell._asdict(), **figures}))
        return
    for kind, figure in figures.items():
        print(f"{kind:20s} {figure['median']:10,.0f} steps/s   ", end="")
        print(f"spread {figure['min']:,.0f} to {figure['max']:,.0f}", end="   ")
        print(f"{figure['inference_batch_mean']:.0f} rows per inference batch", end="   ")
        print(f"{figure['summed_share']:.1%} of the rows summed")
    if flags.profile:
        report_profile(cell, flags.seconds)


if __name__ == "__main__":
    main()
