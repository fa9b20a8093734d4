"""Recorded runs, read back: their configuration, the figures of metrics.jsonl, and their state."""

from __future__ import annotations

import dataclasses
import difflib
import fcntl
import json
import logging
import math
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from asyncagent.config import Config
from asyncagent.errors import UsageError
from asyncagent.files import parse_json
from asyncagent.panel import printable
from asyncagent.records import Points, number, read_metrics

METRICS = "metrics.jsonl"
NOT_LEARNING = frozenset(
    {
        *("logdir", "preset", "override", "tuned", "quiet"),
        *("listen", "secret_key", "allowed_keys", "insecure"),
        *("dataset_path", "level_cache", "level_cache_gb", "stall_timeout_s", "grace_s"),
        *("env_timeout_s", "max_env_failures", "max_skipped_updates"),
        *("checkpoint_interval_s", "keep_checkpoints", "keep_every"),
        *("summary_interval_s", "report_interval_s", "video_interval_frames"),
    }
)
"""Flags that make no difference between runs; what a preset decides has flags of its own."""

State: TypeAlias = Literal["running", "finished", "stopped"]

_log = logging.getLogger(__name__)


class Run(NamedTuple):
    """What a run's folder tells."""

    logdir: Path
    config: dict[str, Any]
    """As recorded; a flag that its version did not have has Config's default."""
    state: State
    last: dict[str, Any]
    """The newest report; empty before the first."""
    best: tuple[float, int]
    """Highest episode_return_mean of MIN_GAMES games or more, and the frames it was reported after.

    (nan, 0) before any."""
    num_reports: int
    num_damaged: int
    """Lines of metrics.jsonl that are no reports, or do not fit those around them."""
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

    Each once, however it is spelt; a warning for a folder inside that cannot be looked into.
    UsageError for a path that is not there, cannot be read or has no run.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        try:
            inside = [path] if _is_run(path) else _runs_inside(path)
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from None
        if not inside:
            raise UsageError(
                f"{path} is not the folder of a run: it has no {METRICS}; give the --logdir of "
                "a training"
            )
        for run in inside:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def read_run(logdir: Path, figures: Sequence[str] = ()) -> Run:
    """Read one run.

    Args:
      figures: names of numbers in a report: ``frames_per_s``, ``stages.loop_busy``,
        ``levels.<level>.episode_return_mean``, or with ``*`` for the level every level's.

    Raises:
      UsageError: config.json or metrics.jsonl is missing or cannot be read.
    """
    config = _read_config(logdir)
    try:
        reader = read_metrics(logdir / METRICS, figures)
    except OSError as error:
        raise UsageError(f"{logdir / METRICS} cannot be read: {error.strerror}") from None
    total = number(config["total_environment_frames"])
    state: State = "stopped"
    if is_held(logdir):
        state = "running"
    elif total is not None and reader.last.get("frames", -1) >= total:
        state = "finished"
    frames, _, best = reader.bests.newest or (0, 0.0, math.nan)
    return Run(
        logdir, config, state, reader.last, (best, int(frames)),
        reader.num_lines - reader.num_damaged, reader.num_damaged,
        {name: series.array() for name, series in reader.series.items() if series.newest},
    )  # fmt: skip


def is_held(logdir: Path) -> bool:
    """Whether a live process of this machine is training there."""
    try:
        # One that is no file may keep whoever opens it waiting.
        descriptor = os.open(logdir / ".lock", os.O_RDONLY | os.O_NONBLOCK)
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


def differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Flags that are not the same in all, in Config's order; without NOT_LEARNING."""
    names = [*_DEFAULTS, *(name for config in configs for name in config if name not in _DEFAULTS)]
    return [
        name
        for name in dict.fromkeys(names)
        if name not in NOT_LEARNING
        and len({json.dumps(config.get(name), sort_keys=True) for config in configs}) > 1
    ]


def set_apart(configs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """For each, what tells it from the others: the level, and its flags from its level's others.

    Levels have presets of their own, whose every difference nobody wants to read.
    """
    level = ["level_name"] if "level_name" in differing(configs) else []
    own = {
        name: differing([config for config in configs if config["level_name"] == name])
        for name in {config["level_name"] for config in configs}
    }
    return [level + own[config["level_name"]] for config in configs]


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
    return UsageError(f"no figure {name!r} in the reports: {printable(hint)}")


def _is_run(folder: Path) -> bool:
    """OSError where one may not look, or the name can be none."""
    try:
        return stat.S_ISREG((folder / METRICS).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _runs_inside(folder: Path) -> list[Path]:
    """Links after what they may lead to."""
    runs = []
    try:
        children = sorted(folder.iterdir(), key=lambda child: (child.is_symlink(), child))
    except (FileNotFoundError, NotADirectoryError):
        return []
    for child in children:
        try:
            if _is_run(child):
                runs.append(child)
        except OSError as error:
            _log.warning("%s is left out: %s", printable(str(child)), error.strerror)
    return runs


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


def _names(report: dict[str, Any], before: str = "") -> Iterator[str]:
    """Of all figures in a report, whether they are numbers now or null."""
    for name, value in report.items():
        if isinstance(value, dict) and before.count(".") < 2:
            yield from _names(value, f"{before}{name}.")
        elif value is None or number(value) is not None:
            yield before + name
