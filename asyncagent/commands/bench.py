"""``asyncagent bench``."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from asyncagent.commands.env_flags import parse_env_flags
from asyncagent.config import Config
from asyncagent.signals import tidy_end

DESCRIPTION = """Measure how fast this machine trains, and how fast it could.

Environments, inference and learner are measured one by one, each on all cores at once and at the
best of several settings. The bound is what perfect packing of the three would give. Then a real
run of --seconds shows what training gives; efficiency is their ratio. The same work done plainly
is measured beside it, as a reference. Takes about two minutes. The other flags are train's."""


@dataclass(frozen=True)
class BenchFlags(Config):
    """Train's flags, and five more."""

    seconds: float = 30.0
    """Seconds of training that are measured."""
    warmup_s: float = 15.0
    """Seconds of training before them."""
    rounds: int = 1
    """Measure so often, and take medians.

    Components and training in turn."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            "seconds", 3 <= self.seconds < float("inf"), ">= 3: a report comes every second"
        )
        self._check("warmup_s", 0 <= self.warmup_s < math.inf, ">= 0")
        self._check("rounds", self.rounds >= 1, ">= 1")


def main(arguments: Sequence[str]) -> int:
    """Parse the flags, measure and print; returns the exit status."""
    flags = parse_env_flags(
        BenchFlags, arguments, level_name=Config.level_name,
        prog="asyncagent bench", description=DESCRIPTION,
    )  # fmt: skip
    names = [field.name for field in dataclasses.fields(Config)]
    from asyncagent.bench.measure import Bench, resolved

    config = resolved(Config(**{name: getattr(flags, name) for name in names}))
    with tidy_end(), Meter(config.level_name) as meter:
        bench = Bench(config, flags.seconds, flags.warmup_s, flags.rounds, meter.tell)
        result = bench.run()
    if flags.json:
        print(json.dumps(result))
    else:
        show(result, Console(highlight=False, markup=False))
    return 0


class Meter(Progress):
    """How far it is, on stderr: a bar on a terminal, elsewhere a line for each thing found."""

    def __init__(self, title: str) -> None:
        console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
        )
        super().__init__(
            *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
        )
        self._bar = self.add_task(title, total=1.0)

    def tell(self, what: str, share: float) -> None:
        """What was found just now, and how much of all is done, in [0, 1]."""
        self.update(self._bar, completed=share, description=what)
        if self.disable:
            self.console.print(f"{share:4.0%} {what}")


def show(result: dict[str, Any], console: Console) -> None:
    """The sweeps, the components, and what comes of them."""
    unit = "core" if result["device"] == "cpu" else "GPU"
    lstm = " + LSTM" if result["use_lstm"] else ""
    console.print(
        f"{result['level_name']}, net {result['net']}{lstm}, {result['precision']} on "
        f"{result['device']}, {result['cores']} cores"
    )
    for kind, swept in result["sweeps"].items():
        for name, points in swept.items():
            console.print(f"{kind} {name}: {', '.join(map(_point, points))}", soft_wrap=True)
    rates = _table("steps per second", "ours", "reference", "ours / reference")
    plain = result.get("reference", {})
    per = {"env": "core", "inference": unit, "learner": unit}
    keys = ("env_steps_per_core_s", "inference_rows_per_core_s", "learner_rows_per_core_s")
    for (name, of), key in zip(per.items(), keys, strict=True):
        _row(rates, f"{name}, per {of}-second", result[key], plain.get(name))
    if result["transfer_steps_per_s"] is not None:
        _row(rates, "transfer to the GPU", result["transfer_steps_per_s"], None)
    _row(
        rates, "bound of all together", result["bound_steps_per_s"],
        result["reference_bound_steps_per_s"],
    )  # fmt: skip
    console.print(rates)
    lag, idle = result["policy_lag_mean"], result["cores_idle"]
    console.print(
        f"training: {result['steps_per_s']:,.0f} steps/s, {result['frames_per_s']:,.0f} frames/s; "
        f"policy lag {'unknown' if lag is None else f'{lag:.1f} updates'}, "
        f"cores idle {'unknown' if idle is None else f'{idle:.1%}'}",
        soft_wrap=True,
    )
    console.print(f"efficiency: {result['efficiency']:.3f} of the bound", soft_wrap=True)
    if result["steps_per_reference_bound"] is not None:
        ratio = result["steps_per_reference_bound"]
        console.print(f"and {ratio:.2f} times the reference's bound")


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if table.columns else "left", no_wrap=True)
    return table


def _row(table: Table, name: str, ours: float, plain: float | None) -> None:
    rest = ("-", "-") if plain is None else (f"{plain:,.0f}", f"{ours / plain:.2f}")
    table.add_row(name, f"{ours:,.0f}", *rest)


def _point(point: dict[str, float]) -> str:
    setting = " ".join(f"{key} {value}" for key, value in point.items() if key != "rate")
    return f"{setting} {point['rate']:,.0f}"
