#!/usr/bin/env python3
"""Our components beside the same work done plainly, on all cores, in turn.

    python scripts/bench_reference.py --level_name=atari_breakout [--net=deep --use_lstm] [--json]

Each side measures at the best setting of its own sweep, made once at the start; then every round
measures ours, the reference, ours, the reference, component by component, and takes the ratio.
The reference (asyncagent/bench/reference.py): stock torch modules with as many parameters, bfloat16
autocast over float32 weights, a whole batch at once, bare environments.  Rates are steps per
core-second (GPU-second, where that is the device).
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

from rich.console import Console

from asyncagent.bench.job import Parameters
from asyncagent.bench.measure import make_gauges, resolved
from asyncagent.bench.reference import supports
from asyncagent.bench.sweep import Point, best
from asyncagent.commands.env_flags import parse_env_flags
from asyncagent.config import Config
from asyncagent.errors import AsyncAgentError, UsageError

COMPONENTS = ("inference", "learner", "env")
EXPECTED = {"inference": 1.3, "learner": 1.3, "env": 0.97}
"""What ours should at least be times the reference."""


def main() -> None:
    """Sweep, measure in turn, print."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="All other flags are those of asyncagent train."
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--components", nargs="+", choices=COMPONENTS, default=COMPONENTS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags, rest = parser.parse_known_args()
    try:
        if flags.rounds < 1 or not 0 < flags.seconds < float("inf"):
            raise UsageError("rounds and seconds must be above 0")
        prog = Path(__file__).name
        level = Config.level_name
        config = parse_env_flags(Config, rest, level_name=level, prog=prog, description="")
        config = resolved(config)
        if not supports(config):
            raise UsageError(f"no reference for net={config.net} of level_name={config.level_name}")
        result = measure(config, flags.rounds, flags.seconds, flags.components)
    except AsyncAgentError as error:
        print(f"bench_reference: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    if flags.json:
        print(json.dumps(result))
        return
    lstm = " + LSTM" if config.use_lstm else ""
    print(f"{config.level_name}, net {config.net}{lstm}, {config.precision} on {result['device']}")
    for name in flags.components:
        print_component(name, result[name])


def measure(config: Config, rounds: int, seconds: float, components: list[str]) -> dict[str, Any]:
    """The figures of each component; progress goes to stderr."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    result: dict[str, Any] = {
        "level_name": config.level_name,
        "net": config.net,
        "use_lstm": config.use_lstm,
        "precision": config.precision,
        "device": config.learner_device,
        "rounds": rounds,
    }
    with contextlib.ExitStack() as stack:
        gauges = make_gauges(["ours", "reference"], config, stack)
        for name in components:
            chosen: dict[str, Parameters] = {}
            for kind, gauge in gauges.items():

                def tell(point: Point, of: str = f"{kind} {name}") -> None:
                    console.print(f"{of} {point.parameters}: {point.rate:,.0f}")

                chosen[kind] = best(gauge.sweep(name, seconds, tell)).parameters
            pairs = []
            for index in range(rounds):
                rates = [gauge.rate(name, chosen[kind], seconds) for kind, gauge in gauges.items()]
                pairs.append(rates)
                ratio = rates[0] / rates[1]
                console.print(
                    f"round {index + 1}: {name} {rates[0]:,.0f} {rates[1]:,.0f} {ratio:.3f}"
                )
            result[name] = {"settings": chosen} | figures(pairs)
    return result


def figures(pairs: list[list[float]]) -> dict[str, Any]:
    """Median and spread of (ours, reference) pairs and of their ratios."""
    ours, plain = zip(*pairs, strict=True)
    ratios = [a / b for a, b in pairs]
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in {"ours": ours, "reference": plain, "ratio": ratios}.items()
    }


def print_component(name: str, figure: dict[str, Any]) -> None:
    """Three lines."""
    print(f"{name}: expected ratio at least {EXPECTED[name]}")
    for kind in ("ours", "reference", "ratio"):
        digits = 3 if kind == "ratio" else 0
        low, middle, high = (f"{figure[kind][key]:,.{digits}f}" for key in ("min", "median", "max"))
        setting = figure["settings"].get(kind, "")
        print(f"  {kind:10s} {middle:>9s}   spread {low} to {high}   {setting}")


if __name__ == "__main__":
    main()
