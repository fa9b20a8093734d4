"""A run's TensorBoard: which figure stands under which tag.

Sections: ``score``, ``speed``, ``learning``, ``system``, ``hosts`` and one per level.  The
ancestor's tags (``<level>/episode_return``, ``<level>/episode_frames``, ``total_loss``,
``learning_rate``, ``action``, ``dmlab30/...``) are written under its names.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from asyncagent import summaries
from asyncagent.config import Config
from asyncagent.files import GrowingFile
from asyncagent.metrics import LearnerStatistics, Report
from asyncagent.structs import Episode
from asyncagent.usage import read_usage

TAGS = {
    "score/episode_return_mean": "episode_return_mean",
    "score/episode_frames_mean": "episode_frames_mean",
    "score/episodes": "episodes",
    "speed/frames_per_s": "frames_per_s",
    "speed/acted_frames_per_s": "acted_frames_per_s",
    "speed/updates_per_s": "updates_per_s",
    "speed/inference_batch": "inference_batch_mean",
    "speed/queue_columns": "queue_columns",
    "learning/policy_lag_mean": "policy_lag_mean",
    "learning/policy_lag_max": "policy_lag_max",
    "learning/total_loss": "total_loss",
    "learning/policy_gradient_loss": "policy_gradient_loss",
    "learning/baseline_loss": "baseline_loss",
    "learning/entropy_loss": "entropy_loss",
    "learning/entropy": "entropy",
    "learning/grad_norm": "grad_norm",
    "learning/learning_rate": "learning_rate",
    "learning/skipped_updates": "skipped_updates",
    "learning/rho_mean": "rho_mean",
    "system/loop_lag_ms": "loop_lag_ms",
    "system/env_losses": "env_losses",
    "learning_rate": "learning_rate",
    "total_loss": "total_loss",
    "dmlab30/training_no_cap": "dmlab30_no_cap",
    "dmlab30/training_cap_100": "dmlab30_cap_100",
}
"""By tag: a field of Report."""


@dataclass(frozen=True)
class Counts:
    """What histograms between two summaries are made of; 0: nothing was counted."""

    actions: Any = 0
    """int64 [A]: how often each action was learned from."""
    policy_lags: Any = 0
    """int64 [n]: rows learned from, by updates between acting and learning."""
    batch_sizes: Any = 0
    """int64 [n]: element k counts inference batches of 2**k to 2**(k+1) - 1 rows."""

    def plus(self, figures: LearnerStatistics, batch_sizes: Iterable[int]) -> Counts:
        """These, and those of another interval."""
        return Counts(
            self.actions + figures.action_counts,
            self.policy_lags + figures.policy_lag_counts,
            self.batch_sizes + np.array(tuple(batch_sizes)),
        )


class TensorBoard:
    """An event file in the run's folder; x is frames. Belongs to one thread, once it is made."""

    def __init__(self, logdir: Path, config: Config, resume_frames: int) -> None:
        """TensorBoard hides what an interrupted session logged beyond ``resume_frames``."""
        self._action_repeats = config.num_action_repeats
        self._advice = ""
        # Microseconds: TensorBoard reads a run's files in the order of their names.
        seconds, microseconds = divmod(time.time_ns() // 1000, 10**6)
        name = f"events.out.tfevents.{seconds:010}.{microseconds:06}.{socket.gethostname()}"
        version = Event(wall_time=time.time(), file_version="brain.Event:2")
        start = Event(
            wall_time=time.time(),
            step=resume_frames + 1 if resume_frames else 0,
            session_log=SessionLog(status=SessionLog.START),
        )
        about = [summaries.flags_table(config), summaries.layout()]
        about += summaries.hyperparameters(config)
        head = summaries.record(version) + summaries.record(start)
        self._file = GrowingFile(logdir / name, head + summaries.event(resume_frames, about))
        self._file.append(b"")

    def write(self, report: Report, episodes: list[Episode], counts: Counts) -> None:
        """Write a report, the games that ended, and what was counted since the last.

        A warning, and another try with the next, where that fails.
        """
        points = [*self._figures(report), *self._system(report), *_levels(report)]
        points += _hosts(report)
        values = [summaries.scalar(tag, value) for tag, value in points if math.isfinite(value)]
        for episode in episodes:
            level = episode.level_name
            frames = episode.steps * self._action_repeats
            values.append(summaries.scalar(f"{level}/episode_return", episode.episode_return))
            values.append(summaries.scalar(f"{level}/episode_frames", frames))
        values += _histograms(episodes, counts)
        if report.verdict.advice != self._advice:
            self._advice = report.verdict.advice
            values.append(summaries.text("system/limit", self._advice or "not known"))
        self._file.append(summaries.event(report.frames, values))

    def add(self, value: Any, frames: int) -> None:
        """Write one more value (see ``summaries``), as of so many frames."""
        self._file.append(summaries.event(frames, [value]))

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        self._file.close()

    def _figures(self, report: Report) -> list[tuple[str, float]]:
        return [(tag, getattr(report, field)) for tag, field in TAGS.items()]

    def _system(self, report: Report) -> list[tuple[str, float]]:
        usage = read_usage()._asdict().items()
        stages = report.stages._asdict().items()
        points = [(f"system/{field}", value) for field, value in usage]
        return points + [(f"system/stages/{field}", value) for field, value in stages]


def _levels(report: Report) -> list[tuple[str, float]]:
    points: list[tuple[str, float]] = []
    for level, figures in report.levels.items():
        points.append((f"{level}/queue_columns", figures.queue_columns))
        points.append((f"{level}/episode_return_mean", figures.episode_return_mean))
    return points


def _hosts(report: Report) -> list[tuple[str, float]]:
    if not (report.hosts or report.hosts_refused or report.messages_rejected):
        return []
    points: list[tuple[str, float]] = [
        ("hosts/refused", report.hosts_refused),
        ("hosts/messages_rejected", report.messages_rejected),
    ]
    for name, host in report.hosts.items():
        points += [(f"hosts/{name}/{field}", value) for field, value in host._asdict().items()]
    return points


def _histograms(episodes: list[Episode], counts: Counts) -> list[Any]:
    values = []
    for tag, kind, taken in (
        ("action", summaries.counts, counts.actions),
        ("learning/policy_lag", summaries.counts, counts.policy_lags),
        ("speed/inference_batch_rows", summaries.powers, counts.batch_sizes),
    ):
        if np.any(taken):
            values.append(kind(tag, taken))
    returns = [e.episode_return for e in episodes if math.isfinite(e.episode_return)]
    if returns:
        values.append(summaries.numbers("score/episode_return", returns))
    return values
