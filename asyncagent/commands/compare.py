"""``asyncagent compare``."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from asyncagent.commands.cli import parse
from asyncagent.commands.run_paths import gathered
from asyncagent.metrics import MIN_GAMES
from asyncagent.panel import printable

if TYPE_CHECKING:
    from asyncagent.runs import Run

DESCRIPTION = """Compare recorded runs, finished or not, in a table.

asyncagent compare <folder> <folder> ... is short for --logdir; a folder of runs stands for all of
them."""


@dataclass(frozen=True)
class CompareFlags:
    """Which runs, and how to tell."""

    logdir: tuple[str, ...] = ("logdir",)
    """Folders of runs, or of folders of runs."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(arguments: Sequence[str]) -> int:
    """Parse the flags, read the runs, print; returns the exit status."""
    flags = parse(
        CompareFlags, gathered(CompareFlags, arguments), prog="asyncagent compare",
        description=DESCRIPTION,
    )  # fmt: skip
    from asyncagent.runs import find_runs, read_run, set_apart

    figures = ("frames_per_s", "policy_lag_mean")
    runs = [read_run(path, figures) for path in find_runs(flags.logdir)]
    names = set_apart([run.config for run in runs])
    told = [describe(run, differences) for run, differences in zip(runs, names, strict=True)]
    if flags.json:
        print(json.dumps({"runs": told}))
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 200  # nothing is folded in a file
        show(told, console)
    return 0


def describe(run: Run, differences: Sequence[str]) -> dict[str, Any]:
    """What is told of a run; None for what is not known yet.

    Args:
      differences: flags to name.
    """
    from asyncagent.records import number

    best, best_frames = run.best
    return {
        "logdir": str(run.logdir),
        "level_name": run.config["level_name"],
        "state": run.state,
        "frames": run.frames,
        "hours": run.hours,
        "return_last": number(run.last.get("episode_return_mean")),
        "return_best": None if math.isnan(best) else best,
        "return_best_frames": None if math.isnan(best) else best_frames,
        "frames_per_s_median": _median(run, "frames_per_s"),
        "policy_lag_median": _median(run, "policy_lag_mean"),
        "env_losses": number(run.last.get("env_losses")),
        "skipped_updates": number(run.last.get("skipped_updates")),
        "reports": run.num_reports,
        "damaged_lines": run.num_damaged,
        "differs": {name: run.config.get(name) for name in differences},
    }


def show(told: Sequence[dict[str, Any]], console: Console) -> None:
    """The table, a row per run."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in ("run", "level"):
        table.add_column(column, overflow="fold")
    table.add_column("state", no_wrap=True)
    for column in ("frames", "hours", "return", "best", "frames/s", "lag", "lost"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("differs in", overflow="fold")
    for run in told:
        differs = ", ".join(
            f"{name}={value}" for name, value in run["differs"].items() if name != "level_name"
        )
        # A path may hold what rich takes for markup, a level's name what a terminal obeys.
        table.add_row(
            *(Text(printable(run[name])) for name in ("logdir", "level_name", "state")),
            f"{run['frames']:,}",
            f"{run['hours']:.2f}",
            _figure(run["return_last"], 2),
            _figure(run["return_best"], 2),
            _figure(run["frames_per_s_median"], 0),
            _figure(run["policy_lag_median"], 1),
            _figure(run["env_losses"], 0),
            Text(printable(differs) or "-"),
        )
    console.print(table)
    console.print(
        "return: mean of the last 100 whole games; best: the highest such mean, from "
        f"{MIN_GAMES} games on; frames/s, lag: medians over the reports; lost: environments lost "
        "and replaced"
    )
    for run in told:
        if run["damaged_lines"]:
            console.print(
                f"{printable(run['logdir'])}: {run['damaged_lines']:,} lines of its metrics.jsonl "
                f"are no reports, or do not fit the others; read {run['reports']:,}",
                markup=False,
            )


def _median(run: Run, figure: str) -> float | None:
    points = run.figures.get(figure)
    return None if points is None else float(statistics.median(points[:, 2]))


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
