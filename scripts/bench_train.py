#!/usr/bin/env python3
"""Frames per second of training for a fixed work, as JSON.

    python scripts/bench_train.py --seconds=30 --level_name=atari_breakout --net=shallow

All flags but ``--seconds`` and ``--warmup_s`` are those of ``asyncagent train``.  Trains in a
temporary folder, leaves the first ``--warmup_s`` seconds out, and prints mean, median, minimum and
maximum of the per-second rates of frames learned from, and the share of time in which the
machine's cores had nothing to do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from asyncagent.commands.train import configure
from asyncagent.errors import UsageError
from asyncagent.placement import cores


def measure(seconds: float, warmup_s: float, flags: list[str], logdir: Path) -> dict[str, object]:
    """Train for warm-up and seconds; the figures of the seconds after the warm-up."""
    from asyncagent.loop import train

    config = configure(
        [
            *flags,
            f"--logdir={logdir}",
            "--total_environment_frames=1000000000000",
            "--report_interval_s=1",
        ]
    )
    duration_s = warmup_s + seconds
    # SIGINT to ourselves ends the run as a person would.
    timer = threading.Timer(duration_s, os.kill, (os.getpid(), 2))
    timer.daemon = True
    timer.start()
    idle: list[float] = []
    for when_s in (warmup_s, duration_s - 0.5):
        threading.Timer(when_s, lambda: idle.append(idle_core_s())).start()
    train(config)
    reports = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    counted = [r for r in reports if warmup_s <= r["time_s"] <= duration_s]
    if len(counted) < 2:
        raise SystemExit("bench_train: too few reports; give more --seconds")
    first, last = counted[0], counted[-1]
    rates = [r["frames_per_s"] for r in counted[1:]]
    mean = (last["frames"] - first["frames"]) / (last["time_s"] - first["time_s"])
    return {
        "level_name": config.level_name,
        "net": config.net,
        "use_lstm": config.use_lstm,
        "num_actors": config.num_actors,
        "batch_size": config.batch_size,
        "unroll_length": config.unroll_length,
        "cores": cores(),
        "seconds": round(last["time_s"] - first["time_s"], 1),
        "frames_per_s": round(mean),
        "frames_per_s_median": round(statistics.median(rates)),
        "frames_per_s_min": round(min(rates)),
        "frames_per_s_max": round(max(rates)),
        "cores_idle": round((idle[1] - idle[0]) / (seconds - 0.5) / cores(), 3),
        "policy_lag_mean": round(statistics.fmean(r["policy_lag_mean"] for r in counted), 2),
        "updates": last["updates"] - first["updates"],
    }


def idle_core_s() -> float:
    """Seconds that all cores of the machine together have idled since it was started."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Parse the flags, train, print one JSON object on stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="measured time")
    parser.add_argument("--warmup_s", type=float, default=10.0, help="time left out before it")
    arguments, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="bench_train_") as folder:
        # The run talks on stdout; the figures alone belong there.
        stdout = os.dup(1)
        os.dup2(2, 1)
        try:
            result = measure(arguments.seconds, arguments.warmup_s, flags, Path(folder))
        except UsageError as error:
            print(f"bench_train: {error}", file=sys.stderr)
            sys.exit(2)
        sys.stdout.flush()
        os.dup2(stdout, 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
