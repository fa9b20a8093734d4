"""``asyncagent test``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from asyncagent.commands.cli import parse
from asyncagent.errors import UsageError


@dataclass(frozen=True)
class TestFlags:
    """Play fresh episodes with the newest checkpoint of a run."""

    logdir: str
    """Folder of the training run."""
    test_num_episodes: int = 10
    """Whole games to play."""
    greedy: bool = False
    """Take the likeliest action instead of sampling."""
    seed: int | None = None
    """Seed of environments and sampling; default: one the training did not use."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main(arguments: Sequence[str]) -> int:
    """Parse the flags and play; returns the exit status."""
    flags = parse(
        TestFlags, arguments, prog="asyncagent test",
        description="Play fresh episodes with the newest checkpoint of a run.",
    )  # fmt: skip
    return run(flags.logdir, flags.test_num_episodes, flags.greedy, flags.seed, flags.device)


def run(
    logdir: str, test_num_episodes: int, greedy: bool = False, seed: int | None = None,
    device: str = "auto",
) -> int:  # fmt: skip
    """Play, print a table, write test.json into the run's folder; returns the exit status."""
    from asyncagent.evaluation import evaluate

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    console = Console(highlight=False)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("playing", total=test_num_episodes)
        result = evaluate(
            logdir,
            test_num_episodes,
            greedy=greedy,
            seed=seed,
            device=device,
            on_episode=lambda episode: progress.advance(task),
        )
    table = Table(title=f"{len(result.returns)} games after {result.frames:,} frames")
    for column in ("level", "mean return", "std", "min", "max", "mean steps"):
        table.add_column(column, justify="left" if column == "level" else "right")
    table.add_row(
        result.level_name,
        f"{result.mean:.2f}",
        f"{result.spread:.2f}",
        f"{min(result.returns):.2f}",
        f"{max(result.returns):.2f}",
        f"{np.mean(result.steps):.0f}",
    )
    console.print(table)
    path = Path(logdir) / "test.json"
    try:
        path.write_text(result.to_json())
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    console.print(f"written to {path}")
    return 0
