"""``asyncagent test``."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from asyncagent.commands.cli import parse
from asyncagent.errors import UsageError

if TYPE_CHECKING:
    from asyncagent.evaluation import Evaluation, LevelResult
    from asyncagent.structs import Episode

LINE_EVERY_S = 10.0
"""Seconds between lines about the games played, where there is no terminal."""


@dataclass(frozen=True)
class TestFlags:
    """Play fresh episodes with a checkpoint of a run."""

    logdir: str
    """Folder of the training run."""
    checkpoint: str = "newest"
    """newest, best (by mean return), or a file in --logdir."""
    test_num_episodes: int = 10
    """Whole games to play, on each level."""
    greedy: bool = False
    """Take the likeliest action instead of sampling."""
    seed: int | None = None
    """Of environments and sampling; none: one not trained with."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    video: bool = False
    """Film a game of every level, into <logdir>/video.

    An mp4 and a TensorBoard clip."""
    level_name: str | None = None
    """Play these; none: the run's.

    Levels with observations and actions like those of the run's."""
    dataset_path: str | None = None
    """DMLab: folder of the psychlab data set; none: the run's."""
    level_cache: str | None = None
    """DMLab: folder of compiled levels; none: the run's."""
    renderer: Literal["software", "hardware"] | None = None
    """DMLab: how it draws; none: as the run."""


def main(arguments: Sequence[str]) -> int:
    """Parse the flags and play; returns the exit status."""
    flags = parse(
        TestFlags, arguments, prog="asyncagent test",
        description="Play fresh episodes with a checkpoint of a run.",
    )  # fmt: skip
    return run(**dataclasses.asdict(flags))


def run(logdir: str, test_num_episodes: int, **flags: Any) -> int:
    """Play, print a table, write test.json into the run's folder; returns the exit status.

    Args:
      flags: the other fields of TestFlags; what is None takes its default.
    """
    from asyncagent.evaluation import evaluate
    from asyncagent.files import replace_text

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160  # nothing is folded in a file
    given = {name: value for name, value in flags.items() if value is not None}
    with Meter(console) as meter:
        result = evaluate(logdir, test_num_episodes, on_episode=meter.on_episode, **given)
    show(result, console)
    path = Path(logdir) / "test.json"
    try:
        replace_text(path, result.to_json())
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    console.print(f"written to {path}")
    return 0


class Meter(Progress):
    """How many games have ended: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn())
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self._games = self.add_task("playing", total=None)
        self._clock = clock
        self._said_s = clock()

    def on_episode(self, episode: Episode, left: int) -> None:
        """A game has ended, ``left`` are still to play."""
        self.advance(self._games)
        done = int(self.tasks[0].completed)
        self.update(self._games, total=done + left)
        if self.disable and self._clock() >= self._said_s + LINE_EVERY_S:
            self._said_s = self._clock()
            self.console.print(f"{done} of {done + left} games played")


def show(result: Evaluation, console: Console) -> None:
    """The table, a row per level, and what else there is to say."""
    how = "greedy" if result.greedy else "sampled"
    table = Table(
        title=f"after {result.frames:,} frames ({result.checkpoint}), {how} actions, "
        f"seed {result.seed}",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, title_justify="left",
    )  # fmt: skip
    table.add_column("level", overflow="fold")
    for column in ("games", "mean", "std", "min", "max", "frames", "limit", "human"):
        table.add_column(column, justify="right", no_wrap=True)
    for level in result.levels:
        table.add_row(*_row(level))
    console.print(table)
    console.print(
        "frames: mean per game; limit: games that a time limit ended; "
        "human: 0 is random, 100 a human's mean"
    )
    losses = sum(level.env_losses for level in result.levels)
    if losses:
        console.print(f"environments lost and replaced: {losses}; their games were played again")
    if result.benchmark_mode:
        console.print("the run was a benchmark: it acted at random, not by the policy tested here")
    for level in result.levels:
        if level.video is not None:
            console.print(f"film of {level.level_name}: {level.video}")
    if result.dmlab30 is not None:
        no_cap, cap_100 = result.dmlab30
        console.print(
            f"DMLab-30 human-normalised score: {no_cap:.2f}, "
            f"with levels capped at 100: {cap_100:.2f}"
        )


def _row(level: LevelResult) -> list[str]:
    name = level.level_name
    if level.test_level_name != name:
        name += f" (played: {level.test_level_name})"
    human = level.human_normalised
    return [
        name,
        str(len(level.returns)),
        *map(_figure, (level.mean, level.spread, min(level.returns), max(level.returns))),
        f"{np.mean(level.frames):,.0f}",
        f"{np.mean(level.truncated):.0%}",
        "-" if human is None else f"{human:.1f}",
    ]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"
