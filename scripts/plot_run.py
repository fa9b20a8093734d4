#!/usr/bin/env python3
"""Learning curve of a run as a picture.

    python scripts/plot_run.py --logdir=logdir/pong --out=pong.png

Mean return (or length) of the last 100 whole games over frames, from metrics.jsonl; minutes below.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LABELS = {
    "episode_return_mean": "mean return, last 100 games",
    "episode_frames_mean": "mean frames per game, last 100 games",
}


def main() -> None:
    """Read the reports, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logdir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, required=True, help="picture to write (png, svg)")
    parser.add_argument(
        "--field", default="episode_return_mean", choices=LABELS, help="what to draw"
    )
    flags = parser.parse_args()
    try:
        lines = (flags.logdir / "metrics.jsonl").read_text().splitlines()
        level = json.loads((flags.logdir / "config.json").read_text())["level_name"]
        reports = [r for r in map(json.loads, lines) if r[flags.field] is not None]
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{flags.logdir} is not the folder of a run: {error}")
    if not reports:
        parser.error(f"{flags.logdir}: no game has ended yet")
    frames = [r["frames"] / 1e6 for r in reports]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(frames, [r[flags.field] for r in reports])
    axes.set(xlabel="frames learned from (millions)", ylabel=LABELS[flags.field])
    axes.set_title(level)
    axes.grid(alpha=0.3)
    minutes = axes.secondary_xaxis(-0.2)
    picked = [reports[round(i * (len(reports) - 1) / 6)] for i in range(7)]
    minutes.set_xticks([r["frames"] / 1e6 for r in picked])
    minutes.set_xticklabels([f"{r['time_s'] / 60:.0f}" for r in picked])
    minutes.set_xlabel("minutes of training")
    try:
        figure.savefig(flags.out, dpi=110)
    except (OSError, ValueError) as error:
        parser.error(f"{flags.out} cannot be written: {error}")


if __name__ == "__main__":
    main()
