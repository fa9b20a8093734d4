"""What programs hold more and more of, and what they leave behind."""

from __future__ import annotations

import contextlib
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from endurance.processes import Held, Seen

SAMPLES = 3
"""What was held at first and at last is the median of so many samples."""
SETTLE_S = 20.0
"""A program that is younger still takes what it needs."""
LEAST_S = 60.0
"""Growth within a shorter time says nothing."""
DESCRIPTORS = 8
MEMORY, SLACK_MB = 1.2, 48.0
"""Memory may grow by so much: allocators keep what was once needed."""
STRAY_S = 20.0
"""A process that belongs to nobody may be there for so long: guards wait for three seconds."""


CACHES = ("asyncagent-", "torchinductor_")
"""What these names begin with is one folder for all runs of a user."""


class Sample(NamedTuple):
    """What a process held when."""

    at_s: float
    held: Held


class Growth(NamedTuple):
    """How a process that lived for long enough grew."""

    name: str
    seconds: float
    descriptors: int
    memory_mb: float
    leaks: bool


def growth(name: str, samples: Sequence[Sample]) -> Growth | None:
    """From the first samples after it settled to the last; None where there are too few."""
    settled = [one for one in samples if one.at_s - samples[0].at_s >= SETTLE_S]
    if len(settled) < 2 * SAMPLES or settled[-1].at_s - settled[0].at_s < LEAST_S:
        return None
    first, last = settled[:SAMPLES], settled[-SAMPLES:]

    def median(some: Sequence[Sample]) -> Held:
        return Held(*map(statistics.median_low, zip(*(one.held for one in some), strict=True)))

    before, after = median(first), median(last)
    descriptors = after.descriptors - before.descriptors
    memory_mb = after.memory_mb - before.memory_mb
    leaks = descriptors > DESCRIPTORS or after.memory_mb > before.memory_mb * MEMORY + SLACK_MB
    return Growth(name, settled[-1].at_s - settled[0].at_s, descriptors, memory_mb, leaks)


class Watch:
    """Samples programs, and knows for how long a process has belonged to nobody."""

    def __init__(self) -> None:
        self.samples: dict[tuple[str, int], list[Sample]] = {}
        """By name and pid."""
        self._strays: dict[tuple[int, int], float] = {}

    def sample(self, now_s: float, name: str, pid: int, held: Held | None) -> None:
        """One more."""
        if held is not None:
            self.samples.setdefault((name, pid), []).append(Sample(now_s, held))

    def stray(self, now_s: float, strays: Collection[Seen]) -> list[Seen]:
        """Those of the strays that have been there for too long; each is told of once."""
        there = {(one.pid, one.started): one for one in strays}
        since = {key: self._strays.get(key, now_s) for key in there}
        found = [one for key, one in there.items() if 0 <= since[key] <= now_s - STRAY_S]
        told = {(one.pid, one.started) for one in found}
        self._strays = {key: float("inf") if key in told else at_s for key, at_s in since.items()}
        return found

    def growths(self) -> list[Growth]:
        """Of all programs that lived for long enough."""
        found = (growth(f"{name} ({pid})", some) for (name, pid), some in self.samples.items())
        return [one for one in found if one is not None]


def files_in(folders: Mapping[str, Path]) -> dict[str, set[str]]:
    """Names of what is in folders, by the folders' names, but for the users' caches."""
    return {
        name: {path.name for path in folder.iterdir() if not _is_nobodys(path)}
        for name, folder in folders.items()
    }


def _is_nobodys(path: Path) -> bool:
    """A cache, or the file with which Python's tempfile tries whether a folder can be written to:
    a process killed at that moment leaves it."""
    if path.name.startswith(CACHES):
        return True
    with contextlib.suppress(OSError):
        is_trial = re.fullmatch("[a-z0-9_]{8}", path.name) and path.stat().st_size <= 4
        return bool(is_trial) and path.is_file() and path.read_bytes() in (b"", b"blat")
    return False


def left_behind(before: Mapping[str, set[str]], after: Mapping[str, set[str]]) -> list[str]:
    """What is there that was not."""
    return [
        f"{name}: {', '.join(sorted(after[name] - before[name])[:5])}"
        for name in after
        if after[name] - before[name]
    ]
