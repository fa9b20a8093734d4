"""Processes as /proc shows them: who is whose child, what each holds, what was left behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

MARK = "ASYNCAGENT_ENDURANCE"
"""Environment variable by which the processes of one trial know each other."""
WORKER = "asyncagent.envs.worker"

LEAST_WAITS = 50
"""Times that a worker has waited for something; while it starts it does so a few times."""

_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6


class Seen(NamedTuple):
    """One process."""

    pid: int
    parent: int
    state: str
    """As ps shows it: R, S, D, T (stopped), Z (dead, and nobody has asked for its status)."""
    started: int
    """Clock ticks since the machine booted; with the pid, the name of this very process."""
    command: str

    @property
    def is_worker(self) -> bool:
        return f"-m {WORKER}" in self.command


class Held(NamedTuple):
    """What a process holds."""

    descriptors: int
    memory_mb: float
    """Resident."""


def look(mark: str) -> dict[int, Seen]:
    """The processes that carry the mark, and the dead children that they have not buried."""
    wanted = f"{MARK}={mark}".encode()
    marked: dict[int, Seen] = {}
    dead = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError):
            seen = _read(folder)
            if seen.state == "Z":
                dead.append(seen)
            elif wanted in (folder / "environ").read_bytes().split(b"\0"):
                marked[seen.pid] = seen
    return marked | {seen.pid: seen for seen in dead if seen.parent in marked}


def _read(folder: Path) -> Seen:
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return Seen(int(folder.name), int(fields[1]), fields[0], int(fields[19]), command.strip())


def held(pid: int) -> Held | None:
    """None if the process is gone."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return Held(descriptors, pages * _PAGE_MB)
    return None


def workers_of(pid: int, seen: Mapping[int, Seen]) -> list[Seen]:
    """The worker processes that a learner or host has started, oldest first; no dead ones."""
    found = [one for one in seen.values() if one.parent == pid and one.is_worker]
    return sorted((one for one in found if one.state != "Z"), key=lambda one: one.started)


def is_at_work(worker: Seen) -> bool:
    """Whether a worker has begun to step, and is not stopped."""
    with contextlib.suppress(OSError, IndexError):
        status = Path(f"/proc/{worker.pid}/status").read_text()
        waits = int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
        return worker.state != "T" and waits >= LEAST_WAITS
    return False


def family(pid: int, seen: Mapping[int, Seen]) -> Iterator[Seen]:
    """The process and all its descendants."""
    if pid in seen:
        yield seen[pid]
    for one in seen.values():
        if one.parent == pid:
            yield from family(one.pid, seen)


def strays(seen: Mapping[int, Seen], roots: Collection[int]) -> list[Seen]:
    """Processes that descend from none of ``roots``, and dead ones that nobody has buried."""
    cared_for = {one.pid for root in roots for one in family(root, seen)}
    return [one for one in seen.values() if one.pid not in cared_for or one.state == "Z"]
