"""What a run takes of its machine, as Linux counts it: the program's own share, its workers'."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_GIB = os.sysconf("SC_PAGE_SIZE") / 2**30


class Usage(NamedTuple):
    """Of the program and of its worker processes; nan: not known."""

    memory_gib: float = math.nan
    """Resident, what it shares with its workers included."""
    workers_memory_gib: float = math.nan
    """Resident and shared with nobody, of all workers together."""
    cores: float = math.nan
    """Cores' worth of time used, since the reading before."""
    workers_cores: float = math.nan
    """The same, of all workers together."""
    threads: int = 0
    """The program's own."""
    descriptors: int = 0
    """The program's own: open files, sockets and pipes."""
    workers: int = 0
    """Processes that the program started, and those that these started."""


class UsageMeter:
    """Reads the use of this process and its descendants. Belongs to one thread."""

    def __init__(
        self, proc: Path = Path("/proc"), clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``proc`` is where processes are listed, this one as ``self``."""
        self._proc = proc
        self._clock = clock
        self._last: tuple[float, float, float] | None = None

    def read(self) -> Usage:
        """What is used now; where nothing can be read, nothing is known."""
        try:
            return self._read()
        except (OSError, ValueError, IndexError):
            return Usage()

    def _read(self) -> Usage:
        me = self._proc / "self"
        resident, _ = _memory_gib(me)
        own_s, dead_s = _cpu_s(me)
        private = live_s = 0.0
        workers = 0
        for child in self._descendants(me):
            # Whatever happens to a worker meanwhile concerns its own figures only.
            with contextlib.suppress(OSError, ValueError, IndexError):
                private += _memory_gib(child)[1]
                live_s += sum(_cpu_s(child))
                workers += 1
        now = (self._clock(), own_s, dead_s + live_s)
        before, self._last = self._last, now
        cores = workers_cores = math.nan
        if before is not None and now[0] > before[0]:
            elapsed_s = now[0] - before[0]
            cores = (now[1] - before[1]) / elapsed_s
            # A worker that nobody has waited for yet is in neither count.
            workers_cores = max(0.0, now[2] - before[2]) / elapsed_s
        threads, descriptors = (len(os.listdir(me / name)) for name in ("task", "fd"))
        return Usage(resident, private, cores, workers_cores, threads, descriptors, workers)

    def _descendants(self, process: Path) -> Iterator[Path]:
        for task in (process / "task").iterdir():
            children: list[str] = []
            with contextlib.suppress(OSError):  # the thread has ended
                children = (task / "children").read_text().split()
            for child in children:
                yield self._proc / child
                with contextlib.suppress(OSError):
                    yield from self._descendants(self._proc / child)


def _memory_gib(process: Path) -> tuple[float, float]:
    """(resident, resident and shared with nobody)."""
    _, resident, shared, *_ = map(int, (process / "statm").read_text().split())
    return resident * _PAGE_GIB, (resident - shared) * _PAGE_GIB


def _cpu_s(process: Path) -> tuple[float, float]:
    """CPU seconds of a process, and of its children that have ended."""
    # The name before the last bracket may hold anything.
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    user, system, dead_user, dead_system = map(int, fields[11:15])
    return (user + system) / _TICKS_PER_S, (dead_user + dead_system) / _TICKS_PER_S
