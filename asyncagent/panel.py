"""What a run's terminal shows, computed from reports: a panel of lines, or one line."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.text import Text

from asyncagent.metrics import Report, mean
from asyncagent.stages import Stages

MAX_WIDTH = 100
"""Columns; a wider terminal's other ones stay empty."""
MAX_HEIGHT = 15
MIN_WIDTH = 60
MIN_HEIGHT = 10
"""On a smaller terminal the panel is one line."""
SMOOTHED = 12
"""The time left is by the mean rate of so many reports."""
_LABEL = 10
_SPARKS = "▁▂▃▄▅▆▇█"
_MAX_SPARKS = 30
_ASCII = str.maketrans("█▓▒░━─…▁▂▃▄▅▆▇", "#+-.=-~_..-=+*")

Part = tuple[str, float, str, str]
"""Of a stage's time: its name, share, bar's letter and style."""


class View(NamedTuple):
    """All that a panel shows."""

    level_name: str
    total_frames: int
    frames: int
    """Learned from when the session started."""
    report: Report | None = None
    """The newest."""
    rates: tuple[float, ...] = ()
    """Frames per second of the last reports."""
    returns: tuple[float, ...] = ()
    """Mean returns of the last reports; nan before the first game."""
    warnings: tuple[str, ...] = ()
    """The last ones, each with its time of day."""


class _Row(NamedTuple):
    rank: int
    """Of too many rows those of the highest rank go first."""
    text: Text


def panel(view: View, width: int, height: int) -> list[Text]:
    """The lines of a view on a terminal of so many columns and rows.

    At most MAX_HEIGHT lines, none wider than ``width``; a single line where there is no room.
    """
    width = min(width, MAX_WIDTH)
    if width < MIN_WIDTH or height < MIN_HEIGHT:
        return [_cut(_head(view, width, brief=True), width)]
    rows = [_Row(0, _head(view, width)), *_rows(view, width)]
    limit = min(MAX_HEIGHT, height - 1) - 1  # below the panel a line stays empty
    kept = sorted(range(len(rows)), key=lambda index: rows[index].rank)[:limit]
    return [_cut(rows[index].text, width) for index in sorted(kept)]


def in_ascii(text: str) -> str:
    """For a terminal that knows no other letters."""
    return text.translate(_ASCII).encode("ascii", "replace").decode()


def printable(text: str) -> str:
    """On one line, and nothing that a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _rows(view: View, width: int) -> Iterator[_Row]:
    report = view.report
    room = width - _LABEL
    if report is not None:
        yield _Row(0, _trend(_line("speed", _speed(report)), view.rates, 0.0, width))
        low = min(filter(math.isfinite, view.returns), default=0.0)
        yield _Row(0, _trend(_line("return", _return(report)), view.returns, low, width))
        levels = [
            f"{printable(name)} {_figure(level.episode_return_mean, 2)}"
            for name, level in report.levels.items()
        ]
        if len(levels) > 1:
            for index, line in enumerate(pack(levels, room, 2)):
                yield _Row(4 + index, _line("" if index else "levels", line))
        yield _Row(1, _line("lag", _lag(report)))
        for name, parts in stage_parts(report.stages).items():
            bar = stage_bar(parts, min(20, max(6, room - 45)))
            shares = ", ".join(f"{part} {share:.0%}" for part, share, _, _ in parts)
            yield _Row(2, _line(name, "").append(bar).append(f" {shares}"))
        if machine := _machine(report):
            yield _Row(3, _line("machine", machine))
        if report.hosts:
            yield _Row(2, _line("hosts", _hosts(report, room)))
        advice = textwrap.wrap(printable(report.verdict.advice), room, max_lines=3, placeholder="…")
        for index, line in enumerate(advice):
            yield _Row(1, _line("" if index else "limit", line, style="bold"))
    for index, warning in enumerate(reversed(view.warnings)):
        yield _Row(1 + 4 * index, _line("warning", printable(warning), style="yellow"))


def _line(label: str, text: str, style: str = "") -> Text:
    return Text.assemble((f"{label:<{_LABEL}}", "cyan"), (text, style))


def _trend(line: Text, values: Sequence[float], low: float, width: int) -> Text:
    room = min(_MAX_SPARKS, width - line.cell_len - 2)
    curve = spark(values[-room:], low) if room >= 2 else ""
    return line.append(f"  {curve}", "green") if curve else line


def _cut(line: Text, width: int) -> Text:
    line.truncate(width, overflow="ellipsis")
    return line


def _head(view: View, width: int, brief: bool = False) -> Text:
    report = view.report
    frames = view.frames if report is None else report.frames
    share = min(1.0, max(0.0, frames / view.total_frames))
    if report is None:
        figures = f"{share:.1%}  starting"
    elif brief:
        figures = f"{share:.1%} {describe_briefly(report, view.total_frames, smoothed(view.rates))}"
    else:
        left = _left(report, view.total_frames, smoothed(view.rates))
        figures = f"{share:.1%} of {view.total_frames:,} frames  left {left}"
    line = _cut(Text(printable(view.level_name)), max(_LABEL - 1, width // (6 if brief else 3)))
    line.stylize("bold")
    line.pad_right(max(1, _LABEL - line.cell_len))
    room = min(30, width - line.cell_len - len(figures) - 2)
    if room >= 6:
        done = round(room * share)
        line.append("━" * done, "green").append("─" * (room - done), "dim").append("  ")
    return line.append(figures)


def smoothed(rates: Sequence[float]) -> float:
    """The mean of the last rates; nan if there are none."""
    return mean(list(rates[-SMOOTHED:]))


def spark(values: Sequence[float], low: float) -> str:
    """A letter per value, its height from ``low`` to the largest; a blank for what is no number.

    Empty for fewer than two values.
    """
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    span = max(finite) - low
    return "".join(
        _SPARKS[min(7, max(0, int(8 * (value - low) / span))) if span > 0 else 0]
        if math.isfinite(value)
        else " "
        for value in values
    )


def stage_parts(stages: Stages) -> dict[str, list[Part]]:
    """The known shares of each stage's time, by the stage's name; none of those not known."""
    found: dict[str, list[Part]] = {
        "envs": [
            ("steps", stages.env_steps, "█", "green"),
            ("awaits actions", stages.env_waits_actions, "▒", "yellow"),
            ("learner", stages.env_waits_learner, "░", "dim"),
        ],
        "inference": [
            ("computes", stages.inference_computes, "█", "green"),
            ("copies", stages.inference_copies, "▓", "yellow"),
            ("waits", stages.inference_waits, "░", "dim"),
        ],
        "learner": [
            ("computes", stages.learner_computes, "█", "green"),
            ("copies", stages.learner_copies, "▓", "yellow"),
            ("waits", stages.learner_waits, "░", "dim"),
        ],
    }
    known = {
        name: [part for part in parts if math.isfinite(part[1])] for name, parts in found.items()
    }
    return {name: parts for name, parts in known.items() if parts}


def stage_bar(parts: Sequence[Part], width: int) -> Text:
    """``width`` letters, each part's by its share of the time; blanks for the rest."""
    bar = Text()
    end = 0.0
    for _, share, letter, style in parts:
        end += max(0.0, share)
        bar.append(letter * (min(width, round(end * width)) - len(bar)), style)
    return bar.append(" " * (width - len(bar)))


def pack(entries: Sequence[str], width: int, max_lines: int) -> list[str]:
    """Entries side by side on at most so many lines; what has no room is "and 23 more"."""
    # No entry is shorter than a letter and two blanks.
    for count in range(min(len(entries), max_lines * width // 3 + 1), -1, -1):
        left = len(entries) - count
        lines: list[str] = []
        for entry in [*entries[:count], *([f"and {left} more"] if left else [])]:
            if lines and cell_len(lines[-1]) + 2 + cell_len(entry) <= width:
                lines[-1] += f"  {entry}"
            else:
                lines.append(entry)
        if len(lines) <= max_lines:
            return lines
    return []


def _speed(report: Report) -> str:
    after = _clock(report.time_s)
    return (
        f"{report.frames_per_s:,.0f} frames/s  {report.updates_per_s:.1f} updates/s  after {after}"
    )


def _return(report: Report) -> str:
    games = f"{report.episodes:,} game{'s' * (report.episodes != 1)}"
    scores = (report.dmlab30_no_cap, report.dmlab30_cap_100)
    human = (
        f"  DMLab-30 {scores[0]:.1f}, capped {scores[1]:.1f}" if all(map(_known, scores)) else ""
    )
    return f"{_figure(report.episode_return_mean, 2)} after {games}{human}"


def _lag(report: Report) -> str:
    lost = f"  environments lost {report.env_losses:,}" if report.env_losses else ""
    return (
        f"{_figure(report.policy_lag_mean, 1)} updates, max {report.policy_lag_max}  "
        f"queue {report.queue_columns}  entropy {_figure(report.entropy, 2)}"
        f"{_skipped(report)}{lost}"
    )


def _machine(report: Report) -> str:
    stages = report.stages
    parts = [
        (f"cores {stages.cores_busy:.0%} busy", stages.cores_busy),
        (f"event loop {stages.loop_busy:.0%} busy", stages.loop_busy),
        (f"loop lag {report.loop_lag_ms:.1f} ms", report.loop_lag_ms),
    ]
    return ", ".join(text for text, value in parts if _known(value))


def _hosts(report: Report, room: int) -> str:
    hosts = report.hosts
    waits = report.stages.hosts_wait
    actors = sum(host.actors for host in hosts.values())
    text = f"{len(hosts)} with {actors:,} actors"
    text += f", await the learner {waits:.0%}" if _known(waits) else ""
    each = [
        f"{printable(name)} {host.frames_per_s:,.0f}/s lag {_figure(host.policy_lag_mean, 1)}"
        for name, host in hosts.items()
    ]
    return "  ".join([text, *pack(each, room - len(text) - 2, 1)])


def describe(report: Report, total_frames: int, frames_per_s: float) -> str:
    """The figures of a plain line: frames, rate, return, lag, entropy, time left."""
    hosts = ""
    if report.hosts:
        actors = sum(host.actors for host in report.hosts.values())
        hosts = f"  hosts {len(report.hosts)} with {actors} actors"
    return (
        f"{report.frames:,} frames  {report.frames_per_s:,.0f} frames/s  "
        f"return {_figure(report.episode_return_mean, 2)}  lag {_figure(report.policy_lag_mean, 1)}"
        f"  entropy {_figure(report.entropy, 2)}{_skipped(report)}{hosts}"
        f"  left {_left(report, total_frames, frames_per_s)}"
    )


def describe_briefly(report: Report, total_frames: int, frames_per_s: float) -> str:
    """The figures of the line on a small terminal, which with a bar should fit 80 columns."""
    return (
        f"{report.frames / 1e6:.2f}M {report.frames_per_s:,.0f}/s "
        f"return {_figure(report.episode_return_mean, 2)} "
        f"left {_left(report, total_frames, frames_per_s)} "
        f"lag {_figure(report.policy_lag_mean, 1)}{_skipped(report)}"
        f"{f'  hosts {len(report.hosts)}' if report.hosts else ''}"
    )


def _skipped(report: Report) -> str:
    return f"  skipped {report.skipped_updates:,} updates" if report.skipped_updates else ""


def _known(value: float) -> bool:
    return math.isfinite(value)


def _figure(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _left(report: Report, total_frames: int, frames_per_s: float) -> str:
    if not frames_per_s > 0:
        return "-"
    return _clock(max(total_frames - report.frames, 0) / frames_per_s)


def _clock(time_s: float) -> str:
    seconds = int(time_s)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
