#!/usr/bin/env python3
"""Frames/s of training for numbers of actors times batch sizes: more of them never collapse it.

    python scripts/bench_actors.py --json=actors.json
    python scripts/bench_actors.py --num_actors 64 256 --batch_size 8 32 --level_name=atari_pong

Each cell is a training run of its own.  All other flags are those of ``asyncagent train``;
--num_actors are split into groups as there.  Cells come in a shuffled order, the same every time,
so that a machine whose speed drifts shows no trend, and the fastest is measured once more.
What is learned from is counted in whole batches, and actors end their unrolls together: a cell
takes longer than --seconds where that is not enough for --rounds of its unrolls and updates.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich import box
from rich.console import Console
from rich.table import Table

from asyncagent.bench import training
from asyncagent.bench.measure import resolved
from asyncagent.bench.tune import Trial
from asyncagent.commands.bench import Meter
from asyncagent.commands.env_flags import parse_env_flags
from asyncagent.commands.tune import describe
from asyncagent.config import MAX_ACTORS_PER_COLUMN, Config
from asyncagent.errors import AsyncAgentError, UsageError
from asyncagent.files import replace_text
from asyncagent.placement import cores

NAME = "bench_actors"
GRID = {"num_actors": (8, 16, 32, 64, 128, 256, 512, 1024), "batch_size": (8, 16, 32, 64, 128, 256)}
FIRST_STEPS_PER_CORE_S = 1500.0
"""Guessed, until a cell has been measured."""


class Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse() -> tuple[argparse.Namespace, list[Config]]:
    """The flags, and every cell in the order of measurement; UsageError."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    for name, default in GRID.items():
        spelt = (f"--{name}", f"--{name.replace('_', '-')}")
        parser.add_argument(*spelt, nargs="+", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each cell, at least (8)")
    parser.add_argument("--warmup_s", type=float, default=6.0, help="left out before them (6)")
    parser.add_argument("--rounds", type=float, default=8.0, help="(8) 0: --seconds, no more")
    parser.add_argument("--enough", type=int, default=64, help="actors that fill the cores (64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rewritten after each cell")
    given, flags = parser.parse_known_args()
    if not 3 <= given.seconds < 1e6:
        raise UsageError(f"seconds={given.seconds:g} must be >= 3: a report comes every second")
    for name in ("warmup_s", "rounds"):
        if not 0 <= getattr(given, name) < 1e6:
            raise UsageError(f"{name}={getattr(given, name):g} must be >= 0")
    if given.json is not None and not given.json.absolute().parent.is_dir():
        raise UsageError(f"json={str(given.json)!r}: there is no folder {given.json.parent}")

    def cell(actors: int, batch: int) -> Config:
        own = (f"--num_actors={actors}", f"--batch_size={batch}")
        return parse_env_flags(
            Config, [*flags, *own], level_name=Config.level_name, prog=NAME, description=""
        )

    shapes = [(a, b) for a in sorted({*given.num_actors}) for b in sorted({*given.batch_size})]
    flags.append(f"--precision={resolved(cell(*shapes[0])).precision}")  # one for all cells
    cells = [cell(*shape) for shape in shapes]
    random.Random(1).shuffle(cells)
    return given, cells


def measure(config: Config, given: argparse.Namespace, steps_per_s: float) -> Trial:
    """Train; ``steps_per_s`` says about how long a round of the cell takes."""
    flags = {name: getattr(config, name) for name in ("num_actors", "num_groups", "batch_size")}
    round_s = max(config.num_actors, config.batch_size) * config.unroll_length / steps_per_s
    seconds = max(given.seconds, given.rounds * round_s)
    warmup_s = max(given.warmup_s, min(1.0, given.rounds) * round_s)
    try:
        return Trial(flags, training.run(config, seconds, warmup_s, lambda time_s: None))
    except AsyncAgentError as error:
        return Trial(flags, None, str(error))


def measure_all(given: argparse.Namespace, cells: list[Config], meter: Meter) -> list[Trial]:
    """A trial of each cell, and another of the fastest."""
    trials: list[Trial] = []
    for index in range(len(cells) + 1):
        best = max(range(len(trials)), key=lambda i: frames_per_s(trials[i]), default=0)
        config = cells[index if index < len(cells) else best]
        known = trials[best].steps_per_s if trials else 0.0
        trials.append(measure(config, given, known or FIRST_STEPS_PER_CORE_S * cores()))
        meter.tell(describe(trials[-1]), (index + 1) / (len(cells) + 1))
        if given.json is not None:
            names = ("level_name", "net", "use_lstm", "precision", "unroll_length")
            figures = {name: getattr(config, name) for name in names} | {"cores": cores()}
            told = [
                t.flags | (t.training._asdict() if t.training else {"failure": t.failure})
                for t in trials
            ]
            figures |= {"cells": told[: len(cells)], "best_again": told[len(cells) :]}
            replace_text(given.json, json.dumps(figures, indent=1) + "\n")
    return trials


def show(trials: list[Trial], again: Trial, least: int, console: Console) -> None:
    """All cells, and the slowest of those with enough actors to fill the cores."""
    table = Table(box=box.SIMPLE)
    for name in ("actors", "groups", "batch", "frames/s", "of best", "lag", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("")
    fastest = max(map(frames_per_s, trials)) or 1.0
    for trial in sorted(trials, key=lambda trial: tuple(trial.flags.values())):
        actors, _, batch = shape = trial.flags.values()
        figures = ["failed", "", "", ""]
        if trial.training is not None:
            rate, lag = trial.training.frames_per_s, trial.training.policy_lag_mean
            figures = [
                f"{rate:,.0f}",
                f"{rate / fastest:.2f}",
                "?" if lag is None else f"{lag:.1f}",
            ]
            figures.append(f"{trial.training.seconds:.0f}")
        table.add_row(*map(str, shape), *figures, "*" * (actors > MAX_ACTORS_PER_COLUMN * batch))
    console.print(table)
    console.print(f"* more than {MAX_ACTORS_PER_COLUMN} actors per batch column: train warns")
    for trial in trials:
        if trial.failure:
            console.print(describe(trial).strip())
    drift = frames_per_s(again) / fastest
    console.print(f"the best once more: {drift:.2f} of before, {describe(again).strip()}")
    enough = [trial for trial in trials if trial.training and trial.flags["num_actors"] >= least]
    if enough:
        worst = min(enough, key=frames_per_s)
        console.print(
            f"worst of {len(enough)} cells with at least {least} actors: "
            f"{frames_per_s(worst) / fastest:.2f} of the best, {describe(worst).strip()}"
        )


def frames_per_s(trial: Trial) -> float:
    """0 if it failed."""
    return trial.training.frames_per_s if trial.training else 0.0


def main() -> int:
    """Measure and print; returns the exit status: 2 for bad flags, 1 where a cell failed."""
    try:
        given, cells = parse()
    except AsyncAgentError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    try:
        with Meter("cells") as meter:
            *trials, again = measure_all(given, cells, meter)
    except KeyboardInterrupt:
        return 130
    show(trials, again, given.enough, Console(highlight=False, soft_wrap=True, markup=False))
    return int(any(trial.training is None for trial in (*trials, again)))


if __name__ == "__main__":
    sys.exit(main())
