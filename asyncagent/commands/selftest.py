"""``asyncagent selftest``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from asyncagent import __version__
from asyncagent.commands.cli import parse
from asyncagent.errors import UsageError
from asyncagent.selftest.environments import SUBJECTS, installed, references
from asyncagent.selftest.outcome import Absent
from asyncagent.selftest.registry import Check, chosen
from asyncagent.selftest.runner import Result, run
from asyncagent.signals import tidy_end

DESCRIPTION = """Check that everything computes here what it should; takes half a minute.

V-trace and the optimisers are compared with numbers worked out by hand, the way of every row
through actor, batcher and queue with the rules, bfloat16 and the GPU with float32 on the CPU, what
each installed engine shows for a fixed seed with what it showed elsewhere; an actor host joins a
learner over 127.0.0.1. Exit status: 0 nothing failed, 1 something failed, 2 bad input."""

_STYLES = {
    "passed": "green",
    "failed": "bold red",
    "not installed": "dim",
    "no reference": "yellow",
}
_PIPED_COLUMNS = 120


@dataclass(frozen=True)
class SelftestFlags:
    """Flags of ``asyncagent selftest``."""

    only: str = ""
    """Checks or groups, with commas; none: all.

    For example vtrace,environments."""
    json: bool = False
    """Print one JSON object instead of the table."""
    record: str = ""
    """Write the engines' hashes here instead of comparing them."""

    def __post_init__(self) -> None:
        chosen(self.only)
        if self.record and not Path(self.record).absolute().parent.is_dir():
            raise UsageError(f"record={self.record!r}: there is no such folder")


def main(arguments: Sequence[str]) -> int:
    """Parse the flags, run the checks and print what came of them; returns the exit status."""
    flags = parse(SelftestFlags, arguments, prog="asyncagent selftest", description=DESCRIPTION)
    checks: Sequence[Check] = chosen(flags.only)
    if flags.record:
        checks = _recording(checks, Path(flags.record))
    with tidy_end():
        results = run_shown(checks)
    if flags.json:
        print(json.dumps(summary(results)))
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = max(console.width, _PIPED_COLUMNS)
        show(results, console)
    return int(any(result.state == "failed" for result in results))


def _recording(checks: Sequence[Check], path: Path) -> list[Check]:
    """In place of the environments' checks: what writes their hashes to ``path``.

    UsageError where none of them would.
    """
    if path.exists():
        references(path)  # is it a file of ours?
    portable = [name for name, subject in SUBJECTS.items() if subject.is_portable]
    named = [check for check in checks if check.name in portable]
    if not named:
        names = ", ".join(check.name for check in checks)
        raise UsageError(f"record: there is no hash of {names}: choose {', '.join(portable)}")
    if not any(map(_is_installed, named)):
        names = ", ".join(check.name for check in named)
        raise UsageError(f"record: no package of {names} is installed: there is nothing to write")
    return [
        dataclasses.replace(
            check,
            function="asyncagent.selftest.environments:record_to",
            arguments=(str(path.absolute()), check.name),
        )
        for check in named
    ]


def _is_installed(check: Check) -> bool:
    try:
        installed(SUBJECTS[check.name])
    except Absent:
        return False
    return True


def run_shown(checks: Sequence[Check]) -> list[Result]:
    """The results; on stderr, what runs now, and in a file a line for each."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    done = 0
    with console.status("") as status:

        def begin(check: Check) -> None:
            status.update(f"{done + 1}/{len(checks)} {check.name}")

        def tell(result: Result) -> None:
            nonlocal done
            done += 1
            if not console.is_terminal:
                console.print(f"{done}/{len(checks)} {result.check.name}: {result.state}")

        return run(checks, begin, tell)


def show(results: Sequence[Result], console: Console) -> None:
    """A table; below it, what each failure means and what to do."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("")
    for result in results:
        state = Text(result.state, style=_STYLES[result.state])
        seconds = f"{result.seconds:.1f}"
        table.add_row(result.check.name, state, seconds, Text(result.detail, overflow="fold"))
    console.print(table)
    for result in results:
        if result.state == "failed":
            words = f"{result.check.name}: {result.check.advice}"
            console.print(Text(words, style=_STYLES["failed"]))
    counts = [f"{count} {state}" for state, count in count_states(results).items() if count]
    total_s = sum(result.seconds for result in results)
    console.print(f"{', '.join(counts)}; {total_s:.0f} s", markup=False)


def count_states(results: Sequence[Result]) -> dict[str, int]:
    """How many results of each state, none left out."""
    return {state: sum(result.state == state for result in results) for state in _STYLES}


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Everything, in types that JSON has."""
    return {
        "asyncagent": __version__,
        "counts": count_states(results),
        "checks": [
            {
                "name": result.check.name,
                "group": result.check.group,
                "state": result.state,
                "detail": result.detail,
                "advice": result.check.advice if result.state == "failed" else "",
                "seconds": round(result.seconds, 3),
            }
            for result in results
        ],
    }
