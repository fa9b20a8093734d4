"""What a run leaves for its curves, written and read back: metrics.jsonl.

A file may be as long as a run of weeks makes it, and damaged anywhere: it is read line by line,
what is no report is passed over and counted, and of each figure at most ``MAX_POINTS`` values are
kept.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from asyncagent.errors import UsageError
from asyncagent.files import GrowingFile, parse_json, write_beside
from asyncagent.metrics import MIN_GAMES, Report

MAX_LINE_BYTES = 1 << 20
"""A longer line is no report."""
MAX_POINTS = 10_000
"""Values kept of one figure of one run, at equal distances."""
MAX_FIGURES = 100
"""Of one run: a pattern such as levels.*.episodes may stand for so many."""
LARGEST = 1e100
"""No run measures more; squares and differences of what is less are still numbers."""

Points: TypeAlias = npt.NDArray[np.float64]
"""float64 [n, 3]: frames, hours of training and value; neither frames nor hours ever fall."""


class MetricsFile:
    """metrics.jsonl: one JSON object per report, written line by line."""

    def __init__(self, path: Path, resume_frames: int, resume_s: float) -> None:
        """Keeps the lines up to where the run is resumed; later ones belong to work that was lost.

        Args:
          resume_s: seconds of training; of what was lost, too, lines may have few frames.
        """
        self._path = path
        self._frames = resume_frames
        self._time_s = round(resume_s, 3)  # as reports have it
        self._file = GrowingFile(path, prepare=self._trim)
        self._file.append(b"")

    def write(self, report: Report) -> None:
        """Append one report; a warning, and another try with the next, where that fails."""
        self._frames = max(self._frames, report.frames)
        self._time_s = max(self._time_s, report.time_s)
        self._file.append((report.to_json() + "\n").encode())

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        self._file.close()

    def _trim(self) -> None:
        if not self._path.exists():
            return
        size = good = 0
        with self._path.open("rb") as file:
            for line in file:
                if not self._stays(line):
                    size += len(line)
                    continue
                if size > good:
                    break  # something to drop stands before something to keep
                good = size = size + len(line)
            else:
                os.truncate(self._path, good)  # needs no space
                return
            file.seek(0)
            write_beside(self._path, (line for line in file if self._stays(line)))

    def _stays(self, text: bytes) -> bool:
        line = _line(text)  # none where it was cut off by a crash, or damaged
        if line is None or not text.endswith(b"\n"):
            return False
        return line.frames <= self._frames and line.time_s <= self._time_s


class MetricsReader:
    """Takes in the lines of one metrics.jsonl; call ``end`` after the last.

    Where frames or time fall, the run was resumed from there, and what was later is void, or else
    a line is damaged. So the newest is held back until the next one has come: a line alone that is
    too far ahead is then left out. One that falls back behind several is believed once another
    follows it.
    """

    def __init__(self, figures: Sequence[str]) -> None:
        self._figures = figures
        self._taken: _Line | None = None
        self._held: _Line | None = None
        self._fallen: _Line | None = None
        self.last: dict[str, Any] = {}
        self.bests = _Series()
        """Each is higher than the one before."""
        self.num_lines = 0
        self.num_damaged = 0
        self.series: dict[str, _Series] = {}

    def take(self, text: bytes) -> None:
        """One line."""
        self.num_lines += 1
        line = _line(text)
        if line is None:
            self.num_damaged += 1
        elif line.follows(self._held):
            self._accept_held()
            self._held = line
        elif self._fallen is None or not line.follows(self._fallen):
            self._drop_fallen()
            self._fallen = line
        else:
            self._believe_fallen()
            self._held = line

    def end(self) -> None:
        """After the last line."""
        if self._fallen is not None and self._fallen.follows(self._taken):
            self._believe_fallen()
        else:
            self._accept_held()

    def _accept_held(self) -> None:
        self._drop_fallen()
        if self._held is not None:
            self._accept(self._held)

    def _believe_fallen(self) -> None:
        assert self._fallen is not None
        if self._fallen.follows(self._taken):
            self.num_damaged += 1  # what is held was too far ahead, alone
        else:
            for series in (self.bests, *self.series.values()):
                series.back_to(self._fallen.frames, self._fallen.time_s / 3600)
        self._accept(self._fallen)
        self._fallen = None

    def _drop_fallen(self) -> None:
        if self._fallen is not None:
            self.num_damaged += 1
            self._fallen = None

    def _accept(self, line: _Line) -> None:
        self._taken, self.last = line, line.report
        score, games = (number(line.report.get(s)) for s in ("episode_return_mean", "episodes"))
        best = -math.inf if self.bests.newest is None else self.bests.newest[2]
        if score is not None and games is not None and games >= MIN_GAMES and score > best:
            self.bests.add(line.frames, line.time_s / 3600, score)
        for name, value in _pick(line.report, self._figures):
            if name not in self.series:
                if len(self.series) == MAX_FIGURES:
                    raise UsageError(
                        f"more than {MAX_FIGURES} figures are named so: name one, without *"
                    )
                self.series[name] = _Series()
            self.series[name].add(line.frames, line.time_s / 3600, value)


def read_metrics(path: Path, figures: Sequence[str]) -> MetricsReader:
    """Read a metrics.jsonl.

    Args:
      figures: see ``runs.read_run``.

    Raises:
      OSError: it cannot be read.
      UsageError: ``figures`` stand for more than MAX_FIGURES.
    """
    reader = MetricsReader(figures)
    with path.open("rb") as file:
        for text in _lines(file):
            reader.take(text)
    reader.end()
    return reader


def number(value: object) -> float | None:
    """A float that is finite, and no larger than LARGEST; None of anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if abs(value) <= LARGEST else None


class _Series:
    """Values of an endless stream at equal distances, and the newest."""

    def __init__(self) -> None:
        self.newest: tuple[float, float, float] | None = None
        """Frames, hours and value."""
        self._kept: list[tuple[float, float, float]] = []
        self._every = 1
        self._count = 0

    def add(self, frames: float, hours: float, value: float) -> None:
        self.newest = (frames, hours, value)
        if self._count % self._every == 0:
            self._kept.append(self.newest)
            if len(self._kept) == MAX_POINTS:
                del self._kept[1::2]
                self._every *= 2
        self._count += 1

    def back_to(self, frames: float, hours: float) -> None:
        """Forget what is later than so many frames, or so many hours."""
        while self._kept and not (self._kept[-1][0] <= frames and self._kept[-1][1] <= hours):
            self._kept.pop()
        self.newest = self._kept[-1] if self._kept else None

    def array(self) -> Points:
        """Call where there is a newest."""
        last = [] if self._kept[-1:] == [self.newest] else [self.newest]
        return np.array([*self._kept, *last], np.float64)


class _Line(NamedTuple):
    """A report, as it is found in the file."""

    frames: float
    time_s: float
    report: dict[str, Any]

    def follows(self, other: _Line | None) -> bool:
        """Whether neither frames nor time fall from there to here; always from None."""
        return other is None or (self.frames >= other.frames and self.time_s >= other.time_s)


def _line(text: bytes) -> _Line | None:
    """None for what is no report."""
    try:
        report = parse_json(text.decode())
        frames, time_s = number(report["frames"]), number(report["time_s"])
    except (ValueError, KeyError, TypeError):
        return None
    if frames is None or time_s is None or frames < 0 or time_s < 0:
        return None
    return _Line(frames, time_s, report)


def _lines(file: Any) -> Iterator[bytes]:
    """Lines, of which none is longer than MAX_LINE_BYTES; of a longer one only the beginning."""
    while line := file.readline(MAX_LINE_BYTES):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
            pass
        yield line


def _pick(report: dict[str, Any], figures: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Names and numbers of the figures that this report has."""
    for figure in figures:
        group, _, rest = figure.partition(".")
        parent, _, field = rest.rpartition(".")
        inside: Any = report.get(group)
        found: list[tuple[str, Any]] = []
        if not rest:
            found = [(figure, inside)]
        elif isinstance(inside, dict) and parent == "*":
            found = [
                (f"{group}.{name}.{field}", part.get(field))
                for name, part in inside.items()
                if isinstance(part, dict)
            ]
        elif isinstance(inside, dict):
            holder = inside.get(parent) if parent else inside
            found = [(figure, holder.get(field) if isinstance(holder, dict) else None)]
        for name, value in found:
            whole = number(value)
            if whole is not None:
                yield name, whole
