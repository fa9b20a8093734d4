#!/usr/bin/env python3
"""Memory of training: whether it stays what it is, and what actors and batch columns take.

    python scripts/bench_memory.py --level_name=atari_breakout --minutes=30
    python scripts/bench_memory.py --pid=1234
    python scripts/bench_memory.py --table

The first trains and takes a sample every 10 seconds, the second watches a run that is there.
Either says how far the mean of the last minute is above that of the minute after the first five;
the exit status is 1 from 2% on.  --table makes short runs and fits a line.  Counted is what a
process and its children have in RAM: their own, what they share once, and mapped files as the one
that maps most has them (the kernel's shares of those change with every program that uses them).
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from asyncagent.bench import training
from asyncagent.commands.bench import Meter
from asyncagent.commands.env_flags import parse_env_flags
from asyncagent.config import Config
from asyncagent.errors import AsyncAgentError, UsageError

NAME = "bench_memory"
INTERVAL_S, MINUTE_S, SETTLE_S = 10.0, 60.0, 300.0
FLAT = 0.02
"""Growth from which on memory is not flat."""
TABLE_S = 20.0
"""Of each run of the table; the second half counts."""
SHAPES = ((32, 32), (64, 32), (128, 32), (256, 32), (256, 16), (256, 64))
"""Actors and batch columns of the table's runs."""


@dataclass(frozen=True)
class MemoryFlags(Config):
    """Train's flags, and four more."""

    minutes: float = 30.0
    """How long to watch."""
    pid: int = 0
    """Watch this process instead of starting a run."""
    table: bool = False
    """Short runs of several sizes instead, and the line that fits them."""
    samples: str = f"{tempfile.gettempdir()}/asyncagent_memory.jsonl"
    """File of the samples, JSON lines; overwritten."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("minutes", 7 <= self.minutes < 1e6, ">= 7: growth is counted after five")
        self._check("pid", self.pid >= 0, ">= 0")


def configure(*more: str) -> tuple[MemoryFlags, Config]:
    """All flags, and what is trained."""
    flags = parse_env_flags(
        MemoryFlags, [*sys.argv[1:], *more], level_name=Config.level_name,
        prog=f"{NAME}.py", description=str(__doc__),
    )  # fmt: skip
    names = [field.name for field in dataclasses.fields(Config)]
    return flags, Config(**{name: getattr(flags, name) for name in names})


def family(pid: int) -> Iterator[int]:
    """A process, its children, theirs, and so on."""
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:  # the thread has gone
            continue
        for child in children:
            yield from family(int(child))


def kilobytes(path: str) -> dict[str, int]:
    """The lines in kB of a file in /proc; none of a process that has gone or is another user's."""
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return {}
    return {words[0][:-1]: int(words[1]) for words in lines if words[2:] == ["kB"]}


def resident_mb(pids: Iterable[int]) -> float:
    """Megabytes (10**6 bytes) of RAM that the processes have; 0 once they are gone."""
    own, mapped = 0, [0]
    for pid in pids:
        plain, shares = kilobytes(f"/proc/{pid}/status"), kilobytes(f"/proc/{pid}/smaps_rollup")
        for kind in ("Anon", "Shmem"):
            own += shares.get(f"Pss_{kind}", plain.get(f"Rss{kind}", 0))
        mapped.append(plain.get("RssFile", 0))
    return (own + max(mapped)) * 1024 / 1e6


class Sampler:
    """Called with the seconds so far, takes a sample of a family if one is due."""

    def __init__(self, first: int, interval_s: float, tell: Callable[[float, float], None]) -> None:
        """``first``: the head of the family; ourselves: only those below."""
        self.samples: list[tuple[float, float]] = []
        self._first, self._interval_s, self._tell = first, interval_s, tell

    def __call__(self, time_s: float) -> None:
        if not self.samples or time_s >= self.samples[-1][0] + self._interval_s:
            pids = (pid for pid in family(self._first) if pid != os.getpid())
            self.samples.append((time_s, resident_mb(pids)))
            self._tell(*self.samples[-1])

    def mean_mb(self, from_s: float, to_s: float) -> float:
        """Of the samples in [from_s, to_s)."""
        return statistics.fmean(mb for time_s, mb in self.samples if from_s <= time_s < to_s)


def flatness(flags: MemoryFlags, config: Config) -> int:
    """Watch, say the growth; the exit status."""
    seconds, what = MINUTE_S * flags.minutes, f"pid {flags.pid}" if flags.pid else config.level_name
    if flags.pid and not resident_mb([flags.pid]):
        raise UsageError(f"pid={flags.pid} must be a running process")
    try:
        file = open(flags.samples, "w", buffering=1)  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UsageError(f"samples={flags.samples!r}: {error.strerror}") from None
    with file, Meter(what) as meter:

        def tell(time_s: float, mb: float) -> None:
            file.write(json.dumps({"time_s": round(time_s, 1), "resident_mb": round(mb, 1)}) + "\n")
            meter.tell(f"{time_s / 60:.1f} min, {mb:,.1f} MB", min(1.0, time_s / seconds))

        sampler = Sampler(flags.pid or os.getpid(), INTERVAL_S, tell)
        if flags.pid:
            start_s = time.monotonic()
            while resident_mb([flags.pid]) and time.monotonic() < start_s + seconds:
                sampler(time.monotonic() - start_s)
                time.sleep(1)
        else:
            training.run(config, seconds, 0.0, sampler)
    end_s = sampler.samples[-1][0]
    if end_s < SETTLE_S + 2 * MINUTE_S - 2 * INTERVAL_S:
        raise AsyncAgentError(f"it ended after {end_s / 60:.1f} minutes: too early to say")
    before = sampler.mean_mb(SETTLE_S, SETTLE_S + MINUTE_S)
    after = sampler.mean_mb(end_s - MINUTE_S, end_s + 1)
    print(
        f"resident {before:,.1f} MB in the sixth minute, {after:,.1f} MB in the last of "
        f"{end_s / 60:.1f}: growth {after / before - 1:+.2%}, flat is < {FLAT:.0%}; "
        f"samples in {flags.samples}"
    )
    return int(after / before - 1 >= FLAT)


def table() -> int:
    """Short runs, and the line through them; the exit status."""
    found = []
    with Meter("table") as meter:
        for index, (actors, batch) in enumerate(SHAPES):
            _, config = configure(f"--num_actors={actors}", f"--batch_size={batch}")
            sampler = Sampler(os.getpid(), 1.0, lambda time_s, mb: None)
            training.run(config, TABLE_S, 0.0, sampler)
            found.append(sampler.mean_mb(TABLE_S / 2, float("inf")))
            meter.tell(f"{actors} actors, batch {batch}: {found[-1]:,.0f} MB", (index + 1) / 6)
    rows = np.array([(1, actors, batch) for actors, batch in SHAPES], np.float64)
    line = np.linalg.lstsq(rows, np.array(found), rcond=None)[0]
    print("actors  batch  resident MB  line")
    for (actors, batch), measured, fitted in zip(SHAPES, found, rows @ line, strict=True):
        print(f"{actors:6}  {batch:5}  {measured:11,.0f}  {fitted:,.0f}")
    print("{:,.0f} MB + {:.2f} MB per actor + {:.2f} MB per batch column".format(*line))
    return 0


def main() -> int:
    """Parse the flags, measure; the exit status: 2 for bad flags, 1 for growth or a failed run."""
    try:
        flags, config = configure()
        return table() if flags.table else flatness(flags, config)
    except AsyncAgentError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
