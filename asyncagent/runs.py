"""Recorded runs, read back: their configuration, the figures of metrics.jsonl, and their state.

A file may be as long as a run of weeks makes it, and damaged anywhere: it is read line by line,
what is no report is passed over and counted, and of each figure at most ``MAX_POINTS`` values are
kept.
"""

from __future__ import annotations

import dataclasses
import difflib
import fcntl
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from asyncagent.config import Config
from asyncagent.errors import UsageError
from asyncagent.files import parse_json

METRICS = "metrics.jsonl"
MAX_LINE_BYTES = 1 << 20
"""A longer line is no report."""
MAX_POINTS = 10_000
"""Values kept of one figure of one run, at equal distances."""
MAX_FIGURES = 100
"""Of one run: a pattern such as levels.*.episodes may stand for so many."""
NOT_LEARNING = frozenset(
    {
        *("logdir", "override", "tuned", "listen", "secret_key", "allowed_keys", "insecure"),
        *("dataset_path", "level_cache", "level_cache_gb", "stall_timeout_s", "grace_s"),
        *("checkpoint_interval_s", "keep_checkpoints", "keep_every"),
        *("summary_interval_s", "report_interval_s"),
    }
)
"""Flags that make no difference between runs."""

State: TypeAlias = Literal["running", "finished", "stopped"]
Points: TypeAlias = npt.NDArray[np.float64]
"""float64 [n, 3]: frames, hours of training and value; frames never fall."""


class Run(NamedTuple):
    """What a run's folder tells."""

    logdir: Path
    config: dict[str, Any]
    """As recorded; a flag that its version did not have has Config's default."""
    state: State
    last: dict[str, Any]
    """The newest report; empty before the first."""
    best: tuple[float, int]
    """Highest episode_return_mean and the frames it was reported after; (nan, 0) before any."""
    num_reports: int
    num_damaged: int
    """Lines of metrics.jsonl that are no reports, or belong before the line above them."""
    figures: dict[str, Points]
    """Those asked for and found, by name."""

    @property
    def frames(self) -> int:
        """Learned from."""
        return int(self.last.get("frames", 0))

    @property
    def hours(self) -> float:
        """Of training, all sessions together."""
        return float(self.last.get("time_s", 0.0)) / 3600


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """The folders of runs among ``paths``; of a folder that is none, the runs right inside it.

    UsageError for a path that is not there or has no run.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        inside = [path]
        if not (path / METRICS).is_file():
            inside = sorted(child.parent for child in path.glob(f"*/{METRICS}"))
        if not inside:
            raise UsageError(
                f"{path} is not the folder of a run: it has no {METRICS}; give the --logdir of "
                "a training"
            )
        found.update(dict.fromkeys(inside))
    return list(found)


def read_run(logdir: Path, figures: Sequence[str] = ()) -> Run:
    """Read one run.

    Args:
      figures: names of numbers in a report: ``frames_per_s``, ``stages.loop_busy``,
        ``levels.<level>.episode_return_mean``, or with ``*`` for the level every level's.

    Raises:
      UsageError: config.json or metrics.jsonl is missing or cannot be read.
    """
    config = _read_config(logdir)
    reader = _Reader(figures)
    try:
        with (logdir / METRICS).open("rb") as file:
            for line in _lines(file):
                reader.take(line)
    except OSError as error:
        raise UsageError(f"{logdir / METRICS} cannot be read: {error.strerror}") from None
    total = number(config["total_environment_frames"])
    state: State = "stopped"
    if is_held(logdir):
        state = "running"
    elif total is not None and reader.last.get("frames", -1) >= total:
        state = "finished"
    return Run(
        logdir, config, state, reader.last, reader.best, reader.num_reports, reader.num_damaged,
        {name: points.array() for name, points in reader.points.items()},
    )  # fmt: skip


def is_held(logdir: Path) -> bool:
    """Whether a live process of this machine is training there."""
    try:
        descriptor = os.open(logdir / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        # Held for no longer than the two calls take: a training that starts just then is refused.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def number(value: object) -> float | None:
    """A finite float; None of anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Flags that are not the same in all, in Config's order; without NOT_LEARNING."""
    names = [*_DEFAULTS, *(name for config in configs for name in config if name not in _DEFAULTS)]
    return [
        name
        for name in dict.fromkeys(names)
        if name not in NOT_LEARNING
        and len({json.dumps(config.get(name), sort_keys=True) for config in configs}) > 1
    ]


def by_configuration(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in their seed alone are together, in the order given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        apart = NOT_LEARNING | {"seed"}
        same = {name: value for name, value in run.config.items() if name not in apart}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    return list(groups.values())


def unknown_figure(name: str, runs: Sequence[Run]) -> UsageError:
    """What to raise where no report has a number of that name."""
    known = sorted({figure for run in runs for figure in _names(run.last)})
    if not known:
        return UsageError(f"{', '.join(str(run.logdir) for run in runs)}: no report yet")
    if name in known:
        where = runs[0].logdir if len(runs) == 1 else "these runs"
        return UsageError(f"{name} has no number in any report of {where} yet")
    # What is written after the last dot counts, too: return_mean for levels.catch.return_mean.
    near = difflib.get_close_matches(name, known, 3, 0.5)
    near = near or difflib.get_close_matches(name.rpartition(".")[2], known, 3, 0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(known)}"
    return UsageError(f"no figure {name!r} in the reports: {hint}")


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config)}


def _read_config(logdir: Path) -> dict[str, Any]:
    path = logdir / "config.json"
    try:
        config = parse_json(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}; give the --logdir of a training run"
        ) from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("level_name"), str):
        raise UsageError(f"{path} is not the configuration of a run: it has no level_name")
    return _DEFAULTS | config


def _lines(file: Any) -> Iterator[bytes]:
    """Lines, of which none is longer than MAX_LINE_BYTES; of a longer one only the beginning."""
    while line := file.readline(MAX_LINE_BYTES):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
            pass
        yield line


class _Points:
    """Values of an endless stream at equal distances, and the newest."""

    def __init__(self) -> None:
        self._kept: list[tuple[float, float, float]] = []
        self._newest = (0.0, 0.0, 0.0)
        self._every = 1
        self._count = 0

    def add(self, frames: float, hours: float, value: float) -> None:
        self._newest = (frames, hours, value)
        if self._count % self._every == 0:
            self._kept.append(self._newest)
            if len(self._kept) == MAX_POINTS:
                del self._kept[1::2]
                self._every *= 2
        self._count += 1

    def array(self) -> Points:
        last = [] if self._kept[-1] == self._newest else [self._newest]
        return np.array([*self._kept, *last], np.float64)


class _Reader:
    """Takes in the lines of one metrics.jsonl."""

    def __init__(self, figures: Sequence[str]) -> None:
        self._figures = figures
        self.last: dict[str, Any] = {}
        self.best = (math.nan, 0)
        self.num_reports = 0
        self.num_damaged = 0
        self.points: dict[str, _Points] = {}

    def take(self, line: bytes) -> None:
        try:
            report = parse_json(line.decode())
            frames, time_s = number(report["frames"]), number(report["time_s"])
        except (ValueError, KeyError, TypeError):
            frames = time_s = None
        if frames is None or time_s is None or frames < self.last.get("frames", 0):
            self.num_damaged += 1
            return
        self.last = report
        self.num_reports += 1
        score = number(report.get("episode_return_mean"))
        if score is not None and not score <= self.best[0]:
            self.best = (score, int(frames))
        for name, value in _pick(report, self._figures):
            if name not in self.points:
                if len(self.points) == MAX_FIGURES:
                    raise UsageError(
                        f"more than {MAX_FIGURES} figures are named so: name one, without *"
                    )
                self.points[name] = _Points()
            self.points[name].add(frames, time_s / 3600, value)


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


def _names(report: dict[str, Any], before: str = "") -> Iterator[str]:
    """Of all figures in a report, whether they are numbers now or null."""
    for name, value in report.items():
        if isinstance(value, dict) and before.count(".") < 2:
            yield from _names(value, f"{before}{name}.")
        elif value is None or number(value) is not None:
            yield before + name
