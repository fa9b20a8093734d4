#!/usr/bin/env python3
"""asyncagent beside its peers: the same level, net, batch and cores, in turn, in one run.

    python scripts/bench_peers.py --scenario=atari_breakout [--rounds=5] [--seconds=30] [--json]

Contestants, each a fresh process per measurement; a round measures every one of them once:

- sample_factory: release 2.1.1 in an environment of its own, which is made on demand from PyPI in
  .peers; float32, its asynchronous PPO loss with one epoch (its V-trace is broken in that release),
  batches of a multiple of our rows, a net with exactly as many parameters as ours;
- plain: a synchronous V-trace loop over one vector environment, of our own components
  (scripts/peers/plain_vtrace.py);
- ours: asyncagent.loop.train with the preset.

The first two play with the best cell of a sweep, which is printed, and kept in .peers: a short one
where there is none yet, the full one with --sweep.  Frames are those learned from.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from asyncagent.config import resolve
from asyncagent.envs import env_spec
from asyncagent.errors import UsageError
from asyncagent.models import make_net
from asyncagent.placement import cores
from asyncagent.policy import resolve_device, resolve_precision
from asyncagent.structs import EnvSpec
from peers.contestants import (
    CACHE,
    HERE,
    RUN,
    Cell,
    Result,
    Scenario,
    Times,
    cells_of,
    check_parameters,
    check_precisions,
    make_sample_factory,
)

BOUNDS = {
    "atari_breakout": {"sample_factory": 4.0, "plain": 1.05},
    "doom_benchmark": {"sample_factory": 3.0},
    "varying": {"plain": 1.5},
}
"""Scenarios, and the least that asyncagent's rate should be times each peer's."""
SWEEP_TIMES = Times(seconds=10.0, warmup_s=4.0)


def make_scenario(name: str, wait: str) -> Scenario:
    """What ``--scenario=name`` stands for."""
    varying = name == "varying"
    config = resolve("varying_env:VaryingEnv" if varying else name)
    torch.set_num_threads(1)  # as asyncagent.loop does before it chooses the precision
    dtype = resolve_precision(config.precision, resolve_device(config.device))
    return Scenario(
        config,
        ("plain", "ours") if varying else ("sample_factory", "plain", "ours"),
        BOUNDS[name],
        str(dtype).removeprefix("torch."),
        {"VARYING_WAIT": wait} if varying else {},
    )


class Bench:
    """Sweeps and rounds of one scenario."""

    def __init__(self, name: str, scenario: Scenario, flags: argparse.Namespace) -> None:
        self._name = name
        self._scenario = scenario
        self._flags = flags
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        config = scenario.config
        net = make_net(config.net, _spec(scenario), config.use_lstm, config.seed)
        self.parameters = sum(parameter.numel() for parameter in net.parameters())
        self._contestants = [who for who in scenario.contestants if who in flags.contestants]

    def run(self) -> dict[str, Any]:
        """Environments, sweeps, rounds; the figures."""
        CACHE.mkdir(exist_ok=True)
        if "sample_factory" in self._contestants:
            make_sample_factory(self._say)
        cells = {who: self._best_cell(who) for who in self._contestants}
        times = Times(self._flags.seconds, self._flags.warmup_s)
        results: dict[str, list[Result]] = {who: [] for who in self._contestants}
        with self._progress() as progress:
            task = progress.add_task("", total=self._flags.rounds * len(self._contestants))
            for index in range(self._flags.rounds):
                for who in self._contestants:
                    progress.update(task, description=f"{self._name}, round {index + 1}: {who}")
                    results[who].append(self._measure(who, cells[who], times))
                    progress.advance(task)
                check_precisions({who: runs[-1] for who, runs in results.items()})
                rates = (f"{who} {results[who][-1]['frames_per_s']:,}" for who in results)
                self._say(f"round {index + 1}: {', '.join(rates)} frames/s")
        return self._figures(cells, results)

    def _best_cell(self, who: str) -> Cell:
        file = CACHE / f"sweep-{self._name}-{who}.json"
        kind = "full" if self._flags.sweep else "short"
        cells = cells_of(who, self._scenario, self._flags.sweep)
        config = self._scenario.config
        names = (
            "level_name",
            "net",
            "use_lstm",
            "batch_size",
            "unroll_length",
            "num_action_repeats",
        )
        key = {"cores": cores()} | {name: getattr(config, name) for name in names}
        key |= self._scenario.environ | {"precision": self._scenario.precision}
        if len(cells) == 1:
            return cells[0]
        if file.exists() and kind == "short":
            kept = json.loads(file.read_text())
            if kept["key"] == key:
                self._say(f"{who}: {_shown(kept['best'])}, the best of a {kept['kind']} sweep")
                return dict(kept["best"])
        tried: list[tuple[int, Cell]] = []
        with self._progress() as progress:
            task = progress.add_task(f"{self._name}, {kind} sweep: {who}", total=len(cells))
            for cell in cells:
                try:
                    rate = int(self._measure(who, cell, SWEEP_TIMES)["frames_per_s"])
                except UsageError as error:
                    self._say(f"  {_shown(cell)}: {error}")
                else:
                    self._say(f"  {who} {_shown(cell)}: {rate:,} frames/s")
                    tried.append((rate, cell))
                progress.advance(task)
        if not tried:
            raise UsageError(f"{who} ran with none of the sweep's {len(cells)} cells")
        best = max(tried, key=lambda rate_and_cell: rate_and_cell[0])[1]
        kept = {"key": key, "kind": kind, "best": best, "tried": tried}
        file.write_text(json.dumps(kept, indent=1) + "\n")
        return best

    def _measure(self, who: str, cell: Cell, times: Times) -> Result:
        try:
            result = RUN[who](self._scenario, cell, times)
        except RuntimeError as error:
            raise UsageError(f"{who} with {_shown(cell) or 'its defaults'}: {error}") from None
        check_parameters(who, result, self.parameters)
        return result

    def _figures(self, cells: dict[str, Cell], results: dict[str, list[Result]]) -> dict[str, Any]:
        config = self._scenario.config
        contestants = {}
        for who, runs in results.items():
            rates = [run["frames_per_s"] for run in runs]
            contestants[who] = {
                "frames_per_s": rates,
                "median": statistics.median(rates),
                "min": min(rates),
                "max": max(rates),
                "cell": cells[who],
                "precision": runs[0].get("precision", "auto"),
                "policy_lag_mean": runs[-1].get("policy_lag_mean"),
            }
        ratios: dict[str, Any] = {}
        for who in results if "ours" in results else ():
            if who != "ours":
                pairs = zip(results["ours"], results[who], strict=True)
                each = [ours["frames_per_s"] / theirs["frames_per_s"] for ours, theirs in pairs]
                ratios[who] = {
                    "median": round(statistics.median(each), 3),
                    "min": round(min(each), 3),
                    "max": round(max(each), 3),
                    "wanted": self._scenario.bounds.get(who),
                }
        return {
            "scenario": self._name,
            "level_name": config.level_name,
            "net": config.net,
            "use_lstm": config.use_lstm,
            "parameters": self.parameters,
            "batch_size": config.batch_size,
            "unroll_length": config.unroll_length,
            "cores": cores(),
            "contestants": contestants,
            "ratios": ratios,
            **({"environ": self._scenario.environ} if self._scenario.environ else {}),
        }

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )


def _spec(scenario: Scenario) -> EnvSpec:
    with contextlib.chdir(HERE):  # where own environments are looked for
        return env_spec(scenario.config)


def _shown(cell: Cell) -> str:
    return " ".join(f"{name}={value}" for name, value in cell.items())


def table(figures: dict[str, Any]) -> str:
    """The figures of a scenario for people."""
    lines = [
        f"{figures['scenario']}: net {figures['net']}{' + LSTM' * figures['use_lstm']}, "
        f"{figures['parameters']:,} parameters, batch {figures['batch_size']} x "
        f"{figures['unroll_length']}, {figures['cores']} cores"
    ]
    for who, one in figures["contestants"].items():
        lines.append(
            f"  {who:<15} median {one['median']:>8,.0f} frames/s  "
            f"({one['min']:,} to {one['max']:,})  {one['precision']}  {_shown(one['cell'])}"
        )
    for who, ratio in figures["ratios"].items():
        wanted = f", wanted >= {ratio['wanted']}" if ratio["wanted"] else ""
        lines.append(
            f"  ours / {who}: median {ratio['median']:.2f} "
            f"({ratio['min']:.2f} to {ratio['max']:.2f}){wanted}"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", nargs="+", choices=BOUNDS, default=["atari_breakout"])
    parser.add_argument("--contestants", nargs="+", choices=RUN, default=list(RUN))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30.0, help="measured time of each")
    parser.add_argument("--warmup_s", type=float, default=10.0, help="time left out before it")
    parser.add_argument("--sweep", action="store_true", help="the full sweep anew; an hour or more")
    parser.add_argument(
        "--wait", choices=("burn", "sleep"), default="burn", help="varying: how steps take time"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per scenario")
    flags = parser.parse_args()
    if flags.rounds < 1 or flags.seconds <= 0 or flags.warmup_s < 0:
        parser.error("rounds must be >= 1, seconds > 0 and warmup_s >= 0")
    return flags


def main() -> None:
    """Run the scenarios, print their figures."""
    flags = parse()
    try:
        for name in flags.scenario:
            figures = Bench(name, make_scenario(name, flags.wait), flags).run()
            print(json.dumps(figures) if flags.json else table(figures), flush=True)
    except UsageError as error:
        print(f"bench_peers: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
