"""``asyncagent play``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from asyncagent.commands.cli import parse
from asyncagent.errors import UsageError

DESCRIPTION = """Watch a checkpoint of a run play: in a window where there is a screen, else in an
mp4 in <logdir>/video.

Closing the window, Escape, Q or Ctrl-C ends it. --render is short for --render=window."""

MAX_FPS = 1000


@dataclass(frozen=True)
class PlayFlags:
    """Who plays what, and how it is shown."""

    logdir: str
    """Folder of the training run."""
    checkpoint: str = "newest"
    """newest, best (by mean return), or a file in --logdir."""
    episodes: int = 1
    """Whole games to play, on each level."""
    render: Literal["auto", "window", "film", "none"] = "auto"
    """How; auto: a window where there is a screen.

    film: an mp4, also auto's choice without a screen; none: returns alone."""
    fps: float = 0.0
    """Agent steps per second, in [1, 1000]; 0: the game's own speed."""
    greedy: bool = False
    """Take the likeliest action instead of sampling."""
    seed: int | None = None
    """Of environments and sampling; none: one not trained with."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    level_name: str | None = None
    """Play these; none: the run's.

    Levels with observations and actions like those of the run's."""


def main(arguments: Sequence[str]) -> int:
    """Parse the flags and play; returns the exit status."""
    flags = parse(PlayFlags, _spelt_out(arguments), prog="asyncagent play", description=DESCRIPTION)
    if flags.fps and not 1 <= flags.fps <= MAX_FPS:
        raise UsageError(f"fps={flags.fps:g} must be in [1, {MAX_FPS}], or 0")
    if flags.episodes < 1:
        raise UsageError(f"episodes={flags.episodes} must be >= 1")
    from asyncagent.watch import watch

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    more: dict[str, Any] = {} if flags.level_name is None else {"level_name": flags.level_name}
    seen = watch(
        flags.logdir,
        flags.episodes,
        render=flags.render,
        fps=flags.fps,
        say=lambda line: print(line, flush=True),
        checkpoint=flags.checkpoint,
        greedy=flags.greedy,
        seed=flags.seed,
        device=flags.device,
        **more,
    )
    if seen.stopped:
        print("stopped")
    for path in seen.films:
        print(f"film: {path}")
    return 0


def _spelt_out(arguments: Sequence[str]) -> list[str]:
    """--render may stand alone."""
    spelt = []
    for place, argument in enumerate(arguments):
        follower = [*arguments, "--"][place + 1]
        if argument == "--render" and follower.startswith("-"):
            argument = "--render=window"
        spelt.append(argument)
    return spelt
