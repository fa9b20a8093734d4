#!/usr/bin/env python3
"""Frames per second of training for a fixed work, as JSON.

    python scripts/bench_train.py --seconds=30 --level_name=atari_breakout --net=shallow

All flags but ``--seconds`` and ``--warmup_s`` are those of ``asyncagent train``.  Trains in a
temporary folder, leaves the first ``--warmup_s`` seconds out, and prints mean, median, minimum and
maximum of the per-second rates of frames learned from, and the share of time in which the
cores had nothing to do (null where they are rationed).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from asyncagent.bench import training
from asyncagent.bench.measure import resolved
from asyncagent.commands.env_flags import parse_env_flags
from asyncagent.config import Config
from asyncagent.errors import AsyncAgentError, UsageError
from asyncagent.placement import cores


def measure(seconds: float, warmup_s: float, flags: list[str]) -> dict[str, Any]:
    """Train for warm-up and seconds; the figures of the seconds after the warm-up."""
    prog, level = Path(__file__).name, Config.level_name
    config = resolved(parse_env_flags(Config, flags, level_name=level, prog=prog, description=""))
    trained = training.run(config, seconds, warmup_s, lambda time_s: None)
    lag, idle = trained.policy_lag_mean, trained.cores_idle
    return {
        "level_name": config.level_name,
        "net": config.net,
        "use_lstm": config.use_lstm,
        "precision": config.precision,
        "num_actors": config.num_actors,
        "batch_size": config.batch_size,
        "unroll_length": config.unroll_length,
        "cores": cores(),
        "seconds": round(trained.seconds, 1),
        "frames_per_s": round(trained.frames_per_s),
        "frames_per_s_median": round(trained.frames_per_s_median),
        "frames_per_s_min": round(trained.frames_per_s_min),
        "frames_per_s_max": round(trained.frames_per_s_max),
        "steps_per_s": round(trained.steps_per_s),
        "cores_idle": None if idle is None else round(idle, 3),
        "policy_lag_mean": None if lag is None else round(lag, 2),
        "policy_lag_max": trained.policy_lag_max,
        "updates": trained.updates,
    }


def main() -> None:
    """Parse the flags, train, print one JSON object on stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="measured time")
    parser.add_argument("--warmup_s", type=float, default=10.0, help="time left out before it")
    arguments, flags = parser.parse_known_args()
    try:
        if arguments.seconds < 3 or arguments.warmup_s < 0:
            raise UsageError("seconds must be >= 3 (a report comes every second), warmup_s >= 0")
        print(json.dumps(measure(arguments.seconds, arguments.warmup_s, flags)))
    except AsyncAgentError as error:
        print(f"bench_train: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    main()
