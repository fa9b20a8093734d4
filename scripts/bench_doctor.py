#!/usr/bin/env python3
"""What the accounts cost: a run's frames per second with and without them, as JSON.

    python scripts/bench_doctor.py --rounds=8 --seconds=10 --level_name=atari_breakout

One run, in which the accounts are switched off and on again: with, without, without, with makes a
round, and its ratio is what both withs have learned per second / what both withouts have.  Slices
begin and end with an update.  Accounts cost far less than what rates vary by: they are kept --times
times over (every change of state, every reading and advice is repeated, the loop is looked at so
many times as often), and the cost of one is that of all, divided.  ``--parts=`` switches nothing:
how far ratios are from 1 by chance.  All other flags are ``asyncagent train``'s.

Also printed is what can be had without comparing rates: how many changes of state there were per
second, what one costs, and what a reading of the processor times costs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import asyncagent.loop as loop_module
from asyncagent import accounting, cpu_times
from asyncagent.accounting import Accounts
from asyncagent.bench.measure import resolved
from asyncagent.building import Parts, build
from asyncagent.commands.env_flags import parse_env_flags
from asyncagent.config import Config
from asyncagent.cpu_times import CpuClock, CpuTimes
from asyncagent.doctor import Doctor
from asyncagent.errors import AsyncAgentError, UsageError
from asyncagent.learner import Learner
from asyncagent.placement import cores
from asyncagent.stages import Stages, Verdict
from asyncagent.tracks import Track

PARTS = ("enter", "cpu", "take", "see", "lag")
"""Changes of state, processor times, shares, advice, and the loop's lag."""
POLL_S = 0.001
SILENCE_S = 300.0
"""Longest without an update."""


class Switch:
    """Takes parts of the accounts out of a run that goes on, and puts them back, multiplied."""

    def __init__(self, parts: Sequence[str], times: int) -> None:
        """Before the run is built; ``times``: that each part is done when it is there."""
        self.entered = 0
        self._on = True
        self._enter = Track.enter
        self._there: list[tuple[type, str, Any, Any]] = []
        """Class, name of its method, what is called with the accounts, and without."""
        for part, kind, name, nothing in (
            ("enter", Track, "enter", lambda track, state: None),
            ("cpu", CpuClock, "read", lambda clock: CpuTimes(0.0, {}, math.nan, cores())),
            ("take", Accounts, "_take", lambda accounts, cpu, hosts: (Stages(), math.nan)),
            ("see", Doctor, "see", lambda doctor, *figures: Verdict()),
        ):
            if part in parts:
                self._there.append((kind, name, _repeated(getattr(kind, name), times), nothing))
        if "cpu" in parts:  # every reading looks up the processes anew, which every second one does
            setattr(cpu_times, "SCAN_S", 0.0)  # noqa: B010 (mypy minds the other way)
        if "lag" in parts:
            self._watch(times)
        self.set(True)

    def _watch(self, times: int) -> None:
        switch, watch = self, Accounts.watch_loop
        setattr(accounting, "TICK_S", accounting.TICK_S / times)  # noqa: B010

        async def watched(accounts: Accounts) -> None:
            while True:  # what has been told to sleep is not told otherwise: it looks now and then
                if switch._on:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.2):
                            await watch(accounts)
                else:
                    await asyncio.sleep(0.2)

        setattr(Accounts, "watch_loop", watched)  # noqa: B010

    def set(self, on: bool) -> None:
        self._on = on
        for kind, name, repeated, nothing in self._there:
            setattr(kind, name, repeated if on else nothing)

    def count(self) -> None:
        """From now on count the changes of state, which are done once."""
        enter = self._enter

        def counted(track: Track, state: int) -> None:
            self.entered += 1
            enter(track, state)

        setattr(Track, "enter", counted)  # noqa: B010


def _repeated(method: Callable[..., Any], times: int) -> Callable[..., Any]:
    """The method, done so many times; what the first said counts."""

    def repeated(owner: Any, *arguments: Any) -> Any:
        first = method(owner, *arguments)
        for _ in range(times - 1):
            method(owner, *arguments)
        return first

    return repeated


def rate(learner: Learner, seconds: float) -> float:
    """Frames per second, from an update to the first after so long."""

    def next_update() -> tuple[float, int]:
        before, due_s = learner.updates, time.perf_counter() + SILENCE_S
        while learner.updates == before:
            if time.perf_counter() > due_s:
                raise SystemExit(f"no update for {SILENCE_S:g} s")
            time.sleep(POLL_S)
        return time.perf_counter(), learner.frames

    begin_s, begin = next_update()
    time.sleep(seconds)
    end_s, end = next_update()
    return (end - begin) / (end_s - begin_s)


def measure(
    config: Config, rounds: int, seconds: float, warmup_s: float, parts: Sequence[str], times: int
) -> dict[str, Any]:
    """Train, and switch; the figures."""
    direct = costs()
    switch = Switch(parts, times)
    learners: list[Learner] = []
    found: dict[str, Any] = {}

    async def noted(*args: Any) -> Parts:
        parts: Parts = await build(*args)
        learners.append(parts.learner)
        return parts

    setattr(loop_module, "build", noted)  # noqa: B010

    def watch() -> None:
        try:
            while not learners or not learners[0].updates:
                time.sleep(0.1)
            time.sleep(warmup_s)
            rates: list[tuple[float, float]] = []
            for _ in range(rounds):
                sums = {True: 0.0, False: 0.0}
                for on in (True, False, False, True):
                    switch.set(on)
                    sums[on] += rate(learners[0], seconds) / 2
                rates.append((sums[True], sums[False]))
            switch.count()
            time.sleep(seconds)
            found["rates"] = rates
            found["entered"] = switch.entered / seconds
            switch.set(True)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, name="bench", daemon=True).start()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        loop_module.train(
            dataclasses.replace(config, logdir=folder, total_environment_frames=10**12)
        )
    if "rates" not in found:
        raise AsyncAgentError("the run ended before it was measured")
    return {
        "parts": list(parts),
        **figures(config, found["rates"], times),
        **directly(config, found["entered"], *direct),
    }


def figures(config: Config, rates: list[tuple[float, float]], times: int) -> dict[str, Any]:
    """Of (with, without) of each round."""
    ratios = [on / off for on, off in rates]
    return {
        "level_name": config.level_name,
        "net": config.net,
        "cores": cores(),
        "frames_per_s_with": round(statistics.median(on for on, _ in rates)),
        "frames_per_s_without": round(statistics.median(off for _, off in rates)),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
        "times": times,
        "cost_mean": round((1 - statistics.mean(ratios)) / times, 5),
        "cost_standard_error": round(statistics.stdev(ratios) / math.sqrt(len(ratios)) / times, 5)
        if len(ratios) > 1
        else None,
    }


def directly(config: Config, entered: float, enter_s: float, read_s: float) -> dict[str, Any]:
    """Of changes of state per second, and the seconds of a change and of a reading."""
    share = entered * enter_s + read_s / config.report_interval_s
    return {
        "changes_per_s": round(entered),
        "change_us": round(1e6 * enter_s, 2),
        "reading_ms": round(1e3 * read_s, 2),
        "share_of_one_core": round(share, 5),
    }


def costs() -> tuple[float, float]:
    """Seconds of a change of state, and of a reading of processor times; the best of five."""
    track, clock = Track(4), CpuClock()

    def change() -> None:
        for _ in range(10_000):
            track.enter(1)

    def best(work: Any) -> float:
        times = []
        for _ in range(5):
            begin_s = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin_s)
        return min(times)

    return best(change) / 10_000, best(clock.read)


def main() -> None:
    """Parse the flags, measure, print one JSON object on stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each of a round's four")
    parser.add_argument("--warmup_s", type=float, default=10.0, help="time left out before them")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="what is switched; empty: nothing, for control"
    )
    parser.add_argument("--times", type=int, default=20, help="that the accounts are kept over")
    arguments, flags = parser.parse_known_args()
    parts = [part for part in arguments.parts.split(",") if part]
    prog, level = Path(__file__).name, Config.level_name
    try:
        if min(arguments.rounds, arguments.times) < 1 or arguments.seconds <= 0:
            raise UsageError("rounds and times must be >= 1, seconds > 0")
        if not set(parts) <= set(PARTS):
            raise UsageError(f"--parts must be of {','.join(PARTS)}, not {arguments.parts}")
        config = resolved(
            parse_env_flags(Config, flags, level_name=level, prog=prog, description="")
        )
        rounds, seconds, warmup_s = arguments.rounds, arguments.seconds, arguments.warmup_s
        found = measure(config, rounds, seconds, warmup_s, parts, arguments.times)
        print(json.dumps(found))
    except AsyncAgentError as error:
        print(f"bench_doctor: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    main()
