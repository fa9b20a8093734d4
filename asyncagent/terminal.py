"""A run's progress on the terminal: one live line, or plain lines in a file."""

from __future__ import annotations

import math
import os
from collections import deque
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from asyncagent.metrics import Report, mean


class _Text(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["figures"], no_wrap=True, overflow="ellipsis")


class _Console(Console):
    """Goes quiet, instead of ending the program, when nobody reads its output any more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class Terminal:
    """A live line where stdout is a terminal, plain lines elsewhere."""

    def __init__(self, level_name: str, total_frames: int, frames: int) -> None:
        self._total = total_frames
        self._console = _Console(highlight=False)
        self._live = self._console.is_terminal
        self._fps: deque[float] = deque(maxlen=12)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TextColumn("{task.percentage:>5.1f}%"),
            _Text(),
            console=self._console,
            refresh_per_second=2,
            disable=not self._live,
        )
        self._task = self._progress.add_task(
            level_name, total=total_frames, completed=frames, figures="starting"
        )

    def __enter__(self) -> Terminal:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self._progress.stop()

    def say(self, message: str) -> None:
        """Print a message of its own line above the live line."""
        self._console.print(message, soft_wrap=True)

    def show(self, report: Report) -> None:
        """Show a report."""
        self._fps.append(report.frames_per_s)
        frames_per_s = mean(list(self._fps))
        if self._live:
            figures = describe_briefly(report, self._total, frames_per_s)
            self._progress.update(self._task, completed=report.frames, figures=figures)
        else:
            share = 100 * report.frames / self._total
            figures = describe(report, self._total, frames_per_s)
            self._console.print(f"{share:5.1f}%  {figures}", soft_wrap=True)


def describe(report: Report, total_frames: int, frames_per_s: float) -> str:
    """The figures of a plain line: frames, rate, return, lag, entropy, time left."""
    return (
        f"{report.frames:,} frames  {report.frames_per_s:,.0f} frames/s  "
        f"return {_figure(report.episode_return_mean, 2)}  lag {_figure(report.policy_lag_mean, 1)}"
        f"  entropy {_figure(report.entropy, 2)}{_skipped(report)}{_hosts(report)}"
        f"  left {_left(report, total_frames, frames_per_s)}"
    )


def describe_briefly(report: Report, total_frames: int, frames_per_s: float) -> str:
    """The figures of the live line, which with its bar should fit 80 columns."""
    return (
        f"{report.frames / 1e6:.2f}M {report.frames_per_s:,.0f}/s "
        f"return {_figure(report.episode_return_mean, 2)} lag {_figure(report.policy_lag_mean, 1)} "
        f"{_skipped(report).lstrip()}{' ' if report.skipped_updates else ''}"
        f"{f'hosts {len(report.hosts)} ' if report.hosts else ''}"
        f"{_left(report, total_frames, frames_per_s)} left"
    )


def _skipped(report: Report) -> str:
    return f"  skipped {report.skipped_updates:,} updates" if report.skipped_updates else ""


def _hosts(report: Report) -> str:
    if not report.hosts:
        return ""
    actors = sum(host.actors for host in report.hosts.values())
    return f"  hosts {len(report.hosts)} with {actors} actors"


def _figure(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _left(report: Report, total_frames: int, frames_per_s: float) -> str:
    if not frames_per_s > 0:
        return "-"
    seconds = int(max(total_frames - report.frames, 0) / frames_per_s)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
