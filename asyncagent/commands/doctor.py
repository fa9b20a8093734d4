"""``asyncagent doctor``."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from asyncagent.commands.cli import parse
from asyncagent.config import Config
from asyncagent.doctor import Account, diagnose, mean_lag_ms, mean_stages
from asyncagent.errors import UsageError
from asyncagent.files import parse_json
from asyncagent.stages import Stages

if TYPE_CHECKING:
    from rich.console import Console

DESCRIPTION = """Say what limits a run, by which figures one sees it, and what to change.

Reads what a running or finished run has reported in its folder: metrics.jsonl, config.json."""


@dataclass(frozen=True)
class DoctorFlags:
    """Which run, and which part of it."""

    logdir: str
    """Folder of the run."""
    last_s: float = 300.0
    """Judge the last so many seconds of training; 0: all of it."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        if not (self.last_s >= 0 and math.isfinite(self.last_s)):
            raise UsageError(f"last_s={self.last_s} must be >= 0 and finite")


class Line(NamedTuple):
    """What a report says of the run's speed."""

    time_s: float
    """Seconds of training until then."""
    seconds: float
    """Since the report before."""
    stages: Stages
    loop_lag_ms: float
    frames_per_s: float
    hosts: dict[str, tuple[float, float]]
    """By name: shares of stepping, waiting."""


def main(arguments: Sequence[str]) -> int:
    """Parse the flags, read the run's reports and print the account; returns the exit status."""
    flags = parse(DoctorFlags, arguments, prog="asyncagent doctor", description=DESCRIPTION)
    logdir = Path(flags.logdir)
    lines = read_lines(logdir, flags.last_s)
    config = _read_config(logdir)
    stages = mean_stages((line.seconds, line.stages) for line in lines)
    lag_ms = mean_lag_ms((line.seconds, line.loop_lag_ms) for line in lines)
    account = diagnose(stages, config, lag_ms)
    if flags.json:
        print(json.dumps(_as_json(account, lines, stages, lag_ms)))
    else:
        age_s = max(0.0, time.time() - (logdir / "metrics.jsonl").stat().st_mtime)
        _show(account, lines, lag_ms, f"{config.level_name} in {logdir}", age_s)
    return 0


def read_lines(logdir: Path, last_s: float) -> list[Line]:
    """Reports of the last so many seconds (0: all), those of a run's beginning apart; at least one.

    Lines that are damaged, or cut off, are left out. UsageError, one line, if none is left.
    """
    path = logdir / "metrics.jsonl"
    lines: deque[Line] = deque()
    before_s, seen, old = 0.0, 0, 0
    try:
        if not logdir.is_dir():
            raise UsageError(f"logdir={str(logdir)!r} is no folder: name that of a run")
        with path.open("rb") as file:
            for text in file:
                seen += 1
                values = _values(text)
                if values is None:
                    continue
                if not isinstance(values.get("stages"), dict):
                    old += 1
                    before_s = values["time_s"]
                    continue
                line = _line(values, before_s)
                before_s = line.time_s
                lines.append(line)
                while last_s and len(lines) > 1 and lines[0].time_s <= line.time_s - last_s:
                    lines.popleft()
    except FileNotFoundError:
        raise UsageError(
            f"{path} is not there: no run has reported in this folder; name that of a run"
        ) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    if not seen:
        raise UsageError(f"{path} is empty: the run has yet to report")
    if not lines and old:
        raise UsageError(
            f"{path} says nothing of stages: the run was made by an older asyncagent; resume it "
            "with this one, and ask again"
        )
    if not lines:
        raise UsageError(f"{path} holds no report of a run: none of its {seen} lines is one")
    if lines[0].time_s == lines[0].seconds:  # the beginning is not like the rest
        while len(lines) > 1 and not lines[0].frames_per_s > 0:
            lines.popleft()
        if len(lines) > 1:
            lines.popleft()
    return list(lines)


def _values(text: bytes) -> dict[str, Any] | None:
    """A report with a time; None for anything else."""
    try:
        values = parse_json(text.decode())
    except ValueError:
        return None
    if not isinstance(values, dict) or not math.isfinite(_number(values.get("time_s"))):
        return None
    return values


def _line(values: dict[str, Any], before_s: float) -> Line:
    time_s = _number(values["time_s"])
    hosts = values.get("hosts")
    return Line(
        time_s,
        max(0.0, time_s - before_s),
        Stages(*(_number(values["stages"].get(field)) for field in Stages._fields)),
        _number(values.get("loop_lag_ms")),
        _number(values.get("frames_per_s")),
        {
            name: (_number(host.get("env_steps")), _number(host.get("waits")))
            for name, host in (hosts.items() if isinstance(hosts, dict) else ())
            if isinstance(host, dict)
        },
    )


def _number(value: Any) -> float:
    """nan for what is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else math.nan


def _read_config(logdir: Path) -> Config:
    path = logdir / "config.json"
    try:
        return Config.from_json(path.read_text("utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(f"{path} cannot be read ({why}): every run writes one") from None


def _as_json(
    account: Account, lines: list[Line], stages: Stages, lag_ms: float
) -> dict[str, object]:  # fmt: skip
    shares = {name: share if share == share else None for name, share in stages._asdict().items()}
    return {
        **account.verdict._asdict(),
        "try": [one._asdict() for one in account.tries],
        "no_help": account.no_help,
        "stages": shares,
        "loop_lag_ms": lag_ms if lag_ms == lag_ms else None,
        "reports": len(lines),
        "seconds": round(sum(line.seconds for line in lines), 3),
    }


def _show(account: Account, lines: list[Line], lag_ms: float, title: str, age_s: float) -> None:
    from rich.console import Console

    from asyncagent.panel import in_ascii, printable

    console = Console(highlight=False, markup=False, emoji=False)
    with console.capture() as shown:
        _print(console, account, lines, lag_ms, printable(title), age_s)
    text = shown.get()
    print(text if console.encoding.startswith("utf") else in_ascii(text), end="")


def _print(
    console: Console, account: Account, lines: list[Line], lag_ms: float, title: str, age_s: float
) -> None:  # fmt: skip
    from rich.table import Table
    from rich.text import Text

    from asyncagent.panel import printable

    seconds = sum(line.seconds for line in lines)
    speed = sum(line.seconds * line.frames_per_s for line in lines) / (seconds or math.nan)
    figures = [f"{seconds:,.0f} s of training", f"the last report {age_s:,.0f} s ago"]
    if math.isfinite(speed):
        figures.insert(1, f"{speed:,.0f} frames/s")
    console.print(f"{title}: {', '.join(figures)}\n", soft_wrap=True)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    before = ""
    for stage, doing, share in account.evidence:
        name = stage if stage != before else ""
        bar = "█" * round(20 * min(1.0, share))
        table.add_row(name, doing, Text(f"{100 * share:.0f}%", justify="right"), bar)
        before = stage
    if math.isfinite(lag_ms):
        table.add_row("event loop", "late by", Text(f"{lag_ms:.1f} ms", justify="right"), "")
    for name, (steps, waits) in list(lines[-1].hosts.items())[:20]:
        if math.isfinite(steps + waits):
            told = f"steps {100 * steps:.0f}%, waits {100 * waits:.0f}%"
            table.add_row("host", Text(printable(name)), "", told)
    console.print(table)
    console.print()
    console.print(account.verdict.advice or "too little is known yet: ask again in a minute")
    if account.tries:
        console.print("\nto try:")
        tries = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        for one in account.tries:
            tries.add_row(Text(one.what, overflow="fold"), Text(one.why))
        console.print(tries)
    if account.no_help:
        console.print(f"\nwill not help: {account.no_help}")
