"""Processor time of a run: its threads by name, its worker processes, the machine's cores.

Read out of /proc, whose figures are hundredths of a second.  What cannot be read counts as none.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from asyncagent.placement import core_time, cpu_limit

SCAN_S = 10.0
"""Which processes are ours is looked up anew every so many seconds."""
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class CpuTimes(NamedTuple):
    """Cores used since the reading before: seconds of processor time per second."""

    run: float
    """This process, and all that it has started."""
    threads: dict[str, float]
    """Python's threads of this process, by name; those of one name together."""
    taken: float
    """By other programs, of the cores we may use; nan: not known, as where cores are rationed."""
    num_cores: float
    """That this process may use; of a container's limit the fraction counts."""


class CpuClock:
    """Reads what ``CpuTimes`` has. Belongs to one thread at a time."""

    def __init__(
        self, proc: Path = Path("/proc"), clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._proc = proc
        self._clock = clock
        self._read_s = clock()
        self._scanned_s = -math.inf
        self._pids: set[int] = {os.getpid()}
        self._run_s = 0.0
        self._threads_s: dict[int, float] = {}
        self._machine_s = self._read_machine()
        self._scan()
        self._read_threads()

    def read(self) -> CpuTimes:
        """Since the last call, or the beginning."""
        now_s = self._clock()
        elapsed_s = max(now_s - self._read_s, 1e-9)
        self._read_s = now_s
        # What has ended and been waited for counts as its parent's: the sum stays what it was.
        run_s = max(self._run_s, self._sum())  # less, where no file may be opened just now
        used_s = run_s - self._run_s
        self._run_s = run_s
        machine_s = self._read_machine()
        taken_s = max(machine_s - self._machine_s - used_s, 0.0)  # in this order nan stays nan
        self._machine_s = machine_s
        threads = {name: s / elapsed_s for name, s in self._read_threads().items()}
        if now_s - self._scanned_s > SCAN_S:
            self._scan()
        return CpuTimes(used_s / elapsed_s, threads, taken_s / elapsed_s, core_time())

    def _scan(self) -> None:
        """Who descends from this process."""
        self._scanned_s = self._clock()
        parents = {}
        try:
            entries = os.listdir(self._proc)
        except OSError:  # no file may be opened just now, perhaps: those that are known
            entries = []
        for name in entries:
            if name.isdigit() and (fields := _stat(self._proc / name)):
                parents[int(name)] = int(fields[1])
        if not parents:
            return
        ours = self._pids = {os.getpid()}
        while new := {pid for pid, parent in parents.items() if parent in ours} - ours:
            ours |= new
        self._run_s = self._sum()

    def _sum(self) -> float:
        """Their processor time, and that of their children which have ended."""
        return sum(_seconds(_stat(self._proc / str(pid))[11:15]) for pid in self._pids)

    def _read_threads(self) -> dict[str, float]:
        """Seconds since the last call; by name."""
        seconds: dict[int, float] = {}
        used: dict[str, float] = {}
        for thread in threading.enumerate():
            tid = thread.native_id
            if tid is not None:
                before_s = self._threads_s.get(tid, 0.0)
                now_s = _seconds(_stat(self._proc / "self" / "task" / str(tid))[11:13])
                seconds[tid] = max(before_s, now_s)
                more = seconds[tid] - before_s
                used[thread.name] = used.get(thread.name, 0.0) + more
        self._threads_s = seconds
        return used

    def _read_machine(self) -> float:
        """Seconds that the cores we may use have worked, for whomever; nan: not known."""
        lines = _core_lines(self._proc)
        if lines is None:
            return math.nan
        return sum(_seconds([*fields[0:3], *fields[5:8]]) for fields in lines)


class IdleClock:
    """How much of their time the cores that this process may use have nothing to do."""

    def __init__(
        self, proc: Path = Path("/proc"), clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._proc = proc
        self._clock = clock
        self._made_s = clock()
        self._idle_s = self._read()

    def share(self) -> float | None:
        """Since it was made, in [0, 1] but for rounding; None: not known, as with ``taken``."""
        elapsed_s = max(self._clock() - self._made_s, 1e-9)
        idle_s = self._read()
        if idle_s is None or self._idle_s is None:
            return None
        return (idle_s - self._idle_s) / elapsed_s

    def _read(self) -> float | None:
        """Seconds of the mean core."""
        lines = _core_lines(self._proc)
        return sum(_seconds(fields[3:5]) for fields in lines) / len(lines) if lines else None


def _core_lines(proc: Path) -> list[list[str]] | None:
    """Ticks of each core we may use; None where cores are rationed, or nothing can be read.

    User, nice, system, idle, waiting for disks, interrupts, soft ones, stolen, and others.
    """
    if cpu_limit() is not None:
        return None
    allowed = {f"cpu{index}" for index in os.sched_getaffinity(0)}
    try:
        lines = [line.split() for line in (proc / "stat").read_text().splitlines()]
    except OSError:
        return None
    return [fields for name, *fields in filter(None, lines) if name in allowed]


def _stat(folder: Path) -> list[str]:
    """Fields of a process's or thread's stat after its name, state first; none if it is gone."""
    try:
        # A name is whatever its owner calls it: half a letter, perhaps.
        return (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _seconds(ticks: Iterable[str]) -> float:
    return sum(map(int, ticks)) * _TICK_S
