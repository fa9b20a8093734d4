"""Is every frame counted once? What metrics.jsonl says, compared with what can be.

A session is one process of a learner, from its start to its end.  ``frames`` and ``updates`` are
those of the reports, all sessions of the run together.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple


class Line(NamedTuple):
    """What is of interest in a line of metrics.jsonl."""

    frames: int
    updates: int
    hosts: frozenset[str]
    """Actor hosts that acted since the line before."""
    episode_return_mean: float | None


class Column(NamedTuple):
    """Steps of one environment that were learned from together, in one column of a batch."""

    number: int
    """Of the environment: no other one of the trial has it."""
    first: int
    """The first of the steps."""
    steps: int


def read_line(text: str) -> Line | None:
    """None for what a crash or a full disk left of a line."""
    try:
        report = json.loads(text)
        hosts = report["hosts"].items()
        # A host that came back stands beside itself for a while, as name#2.
        acted = {name.partition("#")[0] for name, host in hosts if host["frames_per_s"] > 0}
        returned = report["episode_return_mean"]
        return Line(int(report["frames"]), int(report["updates"]), frozenset(acted), returned)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


class Tail:
    """What is appended to a file that may be replaced by another one of that name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._offset = 0

    def read(self) -> list[str]:
        """Whole lines that were not read before; of another file, all."""
        try:
            with self._path.open("rb") as file:
                status = self._path.stat()
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                whole = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._offset += len(whole[0]) + len(whole[1])
        return whole[0].decode(errors="replace").split("\n") if whole[1] else []

    def skip(self) -> None:
        """Never mind what is in the file now."""
        with contextlib.suppress(FileNotFoundError):
            status = self._path.stat()
            self._inode, self._offset = status.st_ino, status.st_size


class Session:
    """The reports of one process of a learner, in order."""

    def __init__(self, resumed: int, frames_per_update: int) -> None:
        """``resumed``: frames of the checkpoint that it began with, 0 without one."""
        self.resumed = resumed
        self.lines: list[Line] = []
        self._frames_per_update = frames_per_update

    @property
    def frames(self) -> int:
        """Of the last report."""
        return self.lines[-1].frames if self.lines else self.resumed

    def add(self, line: Line) -> str:
        """One more report; what is wrong with it, or ""."""
        before = self.lines[-1] if self.lines else None
        self.lines.append(line)
        if before is None:
            return (
                ""
                if line.frames >= self.resumed
                else (f"{line.frames} frames, although it resumed with {self.resumed}")
            )
        frames, updates = line.frames - before.frames, line.updates - before.updates
        if frames < 0 or updates < 0:
            return f"from {before.frames} back to {line.frames} frames, in {updates} updates"
        if frames > updates * self._frames_per_update:
            return (
                f"{frames} frames in {updates} updates, of which each has {self._frames_per_update}"
            )
        return ""


def compare(session: Session, steps: Sequence[int]) -> str:
    """Whether every report has exactly the frames of the steps that were learned from until then.

    Args:
      steps: in each update of the session, as the net has seen them.

    Returns what is wrong, or "".
    """
    if not session.lines:
        return ""
    frames = [session.resumed, *(session.resumed + sum_ for sum_ in accumulate(steps))]
    first = session.lines[0]
    # The number of updates that the session began with is not told.
    begins = [first.updates - n for n, found in enumerate(frames) if found == first.frames]
    wrong = f"{first.frames} frames in the first report after {session.resumed}"
    for begin in begins:
        for line in session.lines:
            index = line.updates - begin
            if not 0 <= index < len(frames) or frames[index] != line.frames:
                seen = frames[index] if 0 <= index < len(frames) else "fewer"
                wrong = f"{line.frames} frames in {index} updates, in which the net has seen {seen}"
                break
        else:
            return ""
    return f"{wrong}: not what was learned from"


def learned_twice(columns: Iterable[Column]) -> list[str]:
    """Steps that were learned from more than once, however the sessions came to them."""
    by_number: dict[int, list[Column]] = {}
    for column in columns:
        by_number.setdefault(column.number, []).append(column)
    return [
        f"environment {before.number}: step {after.first} was learned from twice"
        for own in by_number.values()
        for before, after in pairwise(sorted(own))
        if after.first < before.first + before.steps
    ]
