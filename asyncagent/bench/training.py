"""What a real run gives: ``asyncagent train`` in a process of its own, and what it reported."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from asyncagent.bench.children import environment, last_words
from asyncagent.config import Config
from asyncagent.cpu_times import IdleClock
from asyncagent.envs.scratch import temporary_folder
from asyncagent.errors import AsyncAgentError, UsageError

COMMAND = (sys.executable, "-P", "-m", "asyncagent.bench.leash", "asyncagent", "train")
USAGE_ERROR = 2
"""Exit status of a command that was asked for what cannot be done."""
SILENCE_S = 300.0
"""Longest without a report."""
ENDING_S = 60.0
"""Longest that the run may take to end once it is asked to."""
POLL_S = 0.1


class TrainingFailed(AsyncAgentError):
    """The run ended by itself or made no reports; the message has its last words."""


class Training(NamedTuple):
    """Figures of the seconds after the warm-up."""

    seconds: float
    """Between the first and the last report that count."""
    frames_per_s: float
    """Learned from, as the run reports them: of steps whose action went somewhere."""
    steps_per_s: float
    """Learned from, those at the ends of episodes included: they cost as much."""
    frames_per_s_median: float
    """Of the reports, one per second."""
    frames_per_s_min: float
    frames_per_s_max: float
    policy_lag_mean: float | None
    """Updates between acting and learning; None if no report knew."""
    policy_lag_max: int
    cores_idle: float | None
    """Share of the time of the cores we may use in which they had nothing to do; None: unknown."""
    updates: int


def run(config: Config, seconds: float, warmup_s: float, tell: Callable[[float], None]) -> Training:
    """Train for ``warmup_s``, then for ``seconds``, in a temporary folder.

    Args:
      tell: ``tell(seconds of training so far)``, with every report.

    Raises:
      UsageError: the run refused what was asked for, or ``seconds`` were too few for two reports.
      TrainingFailed: see there.
    """
    with (
        temporary_folder() as folder,
        tempfile.TemporaryFile() as output,
    ):
        config = dataclasses.replace(
            config, logdir=str(folder), total_environment_frames=10**12, report_interval_s=1.0
        )
        # What a run has recorded, the command takes over flag by flag.
        (folder / "config.json").write_text(config.to_json())
        process = subprocess.Popen(
            [*COMMAND, f"--logdir={folder}"],
            stdin=subprocess.PIPE,  # the leash: it closes with us
            stdout=output,
            stderr=output,
            env=environment(),
            process_group=0,  # Ctrl-C is the parent's
        )
        try:
            watch = _Watch(process, folder / "metrics.jsonl", tell)
            first = watch.until(warmup_s)
            idle = IdleClock()
            last = watch.until(warmup_s + seconds)
            cores_idle = idle.share()
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDING_S)
        except _Ended as ended:
            words = last_words(output)
            if process.wait() == USAGE_ERROR:
                raise UsageError(words[-1].removeprefix("asyncagent train: ")) from None
            raise TrainingFailed(f"the run {ended}; its last words: {' / '.join(words)}") from None
        finally:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
    if first == last:
        raise UsageError(
            f"seconds={seconds:g} is too short: one report of the run spanned them all; give more"
        )
    return figures(config, watch.reports[first : last + 1], cores_idle)


class _Ended(Exception):
    """How the run ended, or did not begin."""


class _Watch:
    """Reads the reports of a run that goes on."""

    def __init__(
        self, process: subprocess.Popen[bytes], path: Path, tell: Callable[[float], None]
    ) -> None:
        self.reports: list[dict[str, Any]] = []
        self._process = process
        self._path = path
        self._tell = tell

    def until(self, time_s: float) -> int:
        """Wait for the first report after so many seconds of training; its index."""
        due_s = time.monotonic() + SILENCE_S
        while not self.reports or self.reports[-1]["time_s"] < time_s:
            if self._process.poll() is not None:
                raise _Ended(f"ended by itself, with status {self._process.returncode}")
            if time.monotonic() > due_s:
                self._process.kill()
                raise _Ended(f"made no report for {SILENCE_S:g} s")
            time.sleep(POLL_S)
            if self._read():
                due_s = time.monotonic() + SILENCE_S
                self._tell(self.reports[-1]["time_s"])
        return next(i for i, report in enumerate(self.reports) if report["time_s"] >= time_s)

    def _read(self) -> bool:
        """Whether there are new reports."""
        text = self._path.read_text() if self._path.exists() else ""
        complete = text[: text.rfind("\n") + 1].splitlines()
        before = len(self.reports)
        self.reports += [json.loads(line) for line in complete[before:]]
        return len(self.reports) > before


def figures(config: Config, reports: list[dict[str, Any]], cores_idle: float | None) -> Training:
    """Of the time between the first and the last of ``reports``, as metrics.jsonl has them.

    They are two at least.
    """
    first, last = reports[0], reports[-1]
    seconds = last["time_s"] - first["time_s"]
    rates = [report["frames_per_s"] for report in reports[1:]]
    lags = [r["policy_lag_mean"] for r in reports[1:] if r["policy_lag_mean"] is not None]
    updates = last["updates"] - first["updates"]
    steps = updates / config.epochs_per_batch * config.batch_size * config.unroll_length
    return Training(
        seconds=seconds,
        frames_per_s=(last["frames"] - first["frames"]) / seconds,
        steps_per_s=steps / seconds,
        frames_per_s_median=statistics.median(rates),
        frames_per_s_min=min(rates),
        frames_per_s_max=max(rates),
        policy_lag_mean=statistics.fmean(lags) if lags else None,
        policy_lag_max=max(report["policy_lag_max"] for report in reports[1:]),
        cores_idle=cores_idle,
        updates=updates,
    )
