"""What a run leaves for its curves: metrics.jsonl and TensorBoard's event files."""

from __future__ import annotations

import io
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from asyncagent.files import GrowingFile, parse_json, write_beside
from asyncagent.metrics import Report
from asyncagent.structs import Episode


class MetricsFile:
    """metrics.jsonl: one JSON object per report, written line by line."""

    def __init__(self, path: Path, resume_frames: int) -> None:
        """Keeps the lines up to ``resume_frames``; later ones belong to work that was lost."""
        self._path = path
        self._frames = resume_frames
        self._file = GrowingFile(path, prepare=self._trim)
        self._file.append(b"")

    def write(self, report: Report) -> None:
        """Append one report; a warning, and another try with the next, where that fails."""
        self._frames = max(self._frames, report.frames)
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

    def _stays(self, line: bytes) -> bool:
        try:
            frames = parse_json(line.decode())["frames"]
            return line.endswith(b"\n") and 0 <= frames <= self._frames
        except (ValueError, KeyError, TypeError):
            return False  # cut off by a crash, or damaged


_SECTIONS = {
    "frames_per_s": "speed/frames_per_s",
    "acted_frames_per_s": "speed/acted_frames_per_s",
    "updates_per_s": "speed/updates_per_s",
    "inference_batch_mean": "speed/inference_batch",
    "queue_columns": "speed/queue_columns",
    "policy_lag_mean": "learning/policy_lag_mean",
    "policy_lag_max": "learning/policy_lag_max",
    "policy_gradient_loss": "learning/policy_gradient_loss",
    "baseline_loss": "learning/baseline_loss",
    "entropy_loss": "learning/entropy_loss",
    "entropy": "learning/entropy",
    "grad_norm": "learning/grad_norm",
    "skipped_updates": "learning/skipped_updates",
    "rho_mean": "learning/rho_mean",
    "learning_rate": "learning_rate",
    "total_loss": "total_loss",
    "dmlab30_no_cap": "dmlab30/training_no_cap",
    "dmlab30_cap_100": "dmlab30/training_cap_100",
}


class TensorBoard:
    """An event file in the run's folder; the ancestor's tags keep their names; x is frames."""

    def __init__(self, logdir: Path, action_repeats: int, resume_frames: int) -> None:
        """TensorBoard hides what an interrupted session logged beyond ``resume_frames``."""
        self._action_repeats = action_repeats
        # Microseconds: TensorBoard reads a run's files in the order of their names.
        seconds, microseconds = divmod(time.time_ns() // 1000, 10**6)
        name = f"events.out.tfevents.{seconds:010}.{microseconds:06}.{socket.gethostname()}"
        version = Event(wall_time=time.time(), file_version="brain.Event:2")
        self._file = GrowingFile(logdir / name, _record(version))
        start = SessionLog(status=SessionLog.START)
        first = resume_frames + 1 if resume_frames else 0
        self._file.append(_record(Event(wall_time=time.time(), step=first, session_log=start)))

    def write(
        self, report: Report, episodes: list[Episode], action_counts: np.ndarray | int
    ) -> None:
        """Write a report, the games that ended, and how often each action was taken.

        A warning, and another try with the next, where that fails.
        """
        values = [_scalar(tag, value) for tag, value in self._figures(report)]
        for episode in episodes:
            level = episode.level_name
            frames = episode.steps * self._action_repeats
            values.append(_scalar(f"{level}/episode_return", episode.episode_return))
            values.append(_scalar(f"{level}/episode_frames", frames))
        if isinstance(action_counts, np.ndarray) and action_counts.sum():
            values.append(Summary.Value(tag="action", histo=_histogram(action_counts)))
        event = Event(wall_time=time.time(), step=report.frames, summary=Summary(value=values))
        self._file.append(_record(event))

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        self._file.close()

    def _figures(self, report: Report) -> list[tuple[str, float]]:
        """Tags and values of a report."""
        found = [
            (tag, getattr(report, name))
            for name, tag in _SECTIONS.items()
            if math.isfinite(getattr(report, name))
        ]
        found += [
            (f"{level}/queue_columns", figures.queue_columns)
            for level, figures in report.levels.items()
        ]
        if report.hosts or report.hosts_refused or report.messages_rejected:
            found.append(("hosts/refused", report.hosts_refused))
            found.append(("hosts/messages_rejected", report.messages_rejected))
        for name, host in report.hosts.items():
            found += [(f"hosts/{name}/{field}", value) for field, value in host._asdict().items()]
        return found


def _scalar(tag: str, value: float) -> Any:
    return Summary.Value(tag=tag, simple_value=value)


def _histogram(counts: np.ndarray) -> Any:
    values = np.arange(len(counts))
    return HistogramProto(
        min=0,
        max=len(counts) - 1,
        num=int(counts.sum()),
        sum=float((values * counts).sum()),
        sum_squares=float((values**2 * counts).sum()),
        bucket_limit=(values + 0.5).tolist(),
        bucket=counts.tolist(),
    )


def _record(event: Any) -> bytes:
    """As it stands in an event file."""
    record = io.BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    return record.getvalue()
