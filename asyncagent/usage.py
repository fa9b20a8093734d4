"""What a run takes of its machine, as Linux counts it: the program's own share, its workers'.

Processor time is ``cpu_times``'s.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PAGE_GIB = os.sysconf("SC_PAGE_SIZE") / 2**30


class Usage(NamedTuple):
    """Of the program and of its worker processes; nan: not known."""

    memory_gib: float = math.nan
    """Resident, what it shares with its workers included."""
    workers_memory_gib: float = math.nan
    """Resident and shared with nobody, of all workers together."""
    threads: int = 0
    """The program's own."""
    descriptors: int = 0
    """The program's own: open files, sockets and pipes."""
    workers: int = 0
    """Processes that the program started, and those that these started."""


def read_usage(proc: Path = Path("/proc")) -> Usage:
    """What this process uses now; where nothing can be read, nothing is known.

    ``proc`` is where processes are listed, this one as ``self``.
    """
    me = proc / "self"
    try:
        resident, _ = _memory_gib(me)
        private, workers = 0.0, 0
        for child in _descendants(proc, me):
            # Whatever happens to a worker meanwhile concerns its own figures only.
            with contextlib.suppress(OSError, ValueError, IndexError):
                private += _memory_gib(child)[1]
                workers += 1
        threads, descriptors = (len(os.listdir(me / name)) for name in ("task", "fd"))
    except (OSError, ValueError, IndexError):
        return Usage()
    return Usage(resident, private, threads, descriptors, workers)


def _descendants(proc: Path, process: Path) -> Iterator[Path]:
    for task in (process / "task").iterdir():
        children: list[str] = []
        with contextlib.suppress(OSError):  # the thread has ended
            children = (task / "children").read_text().split()
        for child in children:
            yield proc / child
            with contextlib.suppress(OSError):
                yield from _descendants(proc, proc / child)


def _memory_gib(process: Path) -> tuple[float, float]:
    """(resident, resident and shared with nobody)."""
    _, resident, shared, *_ = map(int, (process / "statm").read_text().split())
    return resident * _PAGE_GIB, (resident - shared) * _PAGE_GIB
