"""Faults that were tried, and what came of them: as text, as Markdown and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from endurance.plan import KINDS, LIMIT_S

HEADER = ("kind", "what happens", "tried", "survived", "median", "slowest", "limit")


class Outcome(NamedTuple):
    """What came of one fault."""

    number: int
    kind: str
    run: str
    at_s: float
    """Since the trial began."""
    recovery_s: float | None
    """Longest pause of frames, or until all was there again; None if that never came."""
    problem: str
    """Why it was not survived; "" if it was."""

    @property
    def survived(self) -> bool:
        return not self.problem


class Row(NamedTuple):
    """All faults of a kind."""

    kind: str
    what: str
    tried: int
    survived: int
    median_s: float | None
    """Of the recoveries, the late ones included; None without any."""
    slowest_s: float | None
    limit_s: float


def rows(outcomes: Sequence[Outcome], patience: float = 1.0) -> list[Row]:
    """A row for each kind that was tried, in the order of KINDS."""
    found = []
    for name, kind in KINDS.items():
        own = [outcome for outcome in outcomes if outcome.kind == name]
        times = [outcome.recovery_s for outcome in own if outcome.recovery_s is not None]
        if own:
            median_s = statistics.median(times) if times else None
            survived = sum(outcome.survived for outcome in own)
            slowest_s, limit_s = max(times, default=None), patience * LIMIT_S[kind.hits]
            found.append(Row(name, kind.what, len(own), survived, median_s, slowest_s, limit_s))
    return found


def _cells(row: Row) -> tuple[str, ...]:
    def seconds(value: float | None) -> str:
        return "never" if value is None else f"{value:.1f} s"

    return (
        *(row.kind, row.what, str(row.tried), str(row.survived)),
        *(seconds(row.median_s), seconds(row.slowest_s), f"{row.limit_s:.0f} s"),
    )


def _all(table: Sequence[Row]) -> tuple[str, ...]:
    tried, survived = sum(row.tried for row in table), sum(row.survived for row in table)
    return (f"{len(table)} kinds", "", str(tried), str(survived), "", "", "")


def as_markdown(table: Sequence[Row]) -> str:
    """A table with a last line for all kinds."""
    lines = [HEADER, ("---", "---", *["---:"] * 5), *map(_cells, table), _all(table)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def as_text(table: Sequence[Row]) -> str:
    """The same for a terminal, without what happens."""
    lines = [(cells[0], *cells[2:]) for cells in (HEADER, *map(_cells, table), _all(table))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        cells[0].ljust(widths[0])
        + "".join(cell.rjust(width + 3) for cell, width in zip(cells[1:], widths[1:], strict=True))
        for cells in lines
    )


def as_json(outcomes: Sequence[Outcome], table: Sequence[Row], **others: Any) -> dict[str, Any]:
    """All of it, for a file."""
    return {
        **others,
        "kinds": [row._asdict() for row in table],
        "faults": [outcome._asdict() for outcome in outcomes],
    }
