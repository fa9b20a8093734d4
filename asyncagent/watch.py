"""Somebody looks on while a checkpoint plays: in a window at the game's speed, or in a film."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from asyncagent.envs.base import import_engine
from asyncagent.errors import UsageError
from asyncagent.evaluation import evaluate
from asyncagent.structs import EnvSpec, EnvStep, Episode
from asyncagent.video import Camera, Film, Picture, frames_per_s

Render: TypeAlias = Literal["auto", "window", "film", "none"]

WINDOW_SIDE = 480
"""Frames whose shorter side has fewer pixels are magnified by a whole number."""
LOOK_S = 0.02
"""Longest that a window leaves its events alone."""


class Watched(NamedTuple):
    """What was seen."""

    films: tuple[Path, ...]
    """In the order of the levels; those that were begun."""
    stopped: bool
    """The window was closed, or Ctrl-C pressed, before all games had ended."""


def watch(
    logdir: str | Path,
    num_episodes: int,
    *,
    render: Render = "auto",
    fps: float = 0.0,
    say: Callable[[str], None] = print,
    **flags: Any,
) -> Watched:
    """Play ``num_episodes`` whole games per level, one after another, for somebody to see.

    Args:
      render: ``window`` opens one, ``film`` writes an mp4 per level into ``<logdir>/video``;
        ``auto`` chooses by whether there is a screen, and shows nothing of levels without picture.
      fps: agent steps per second; 0: as many as the game makes by itself.
      say: told every game's return and length, in a line.
      flags: further arguments of ``evaluate``.

    Raises:
      UsageError: there is no screen for a window, nothing to see, or a package is missing.
      Others as ``evaluate``.
    """
    how = _chosen(render)
    films: list[Movie] = []
    num_games = 0

    def camera(level_name: str, frames: int, spec: EnvSpec) -> Camera | None:
        if how == "none":
            return None
        try:
            Picture(spec)
        except UsageError as error:
            if render in ("window", "film"):
                raise UsageError(f"{level_name} shows no picture: {error}") from None
            say(f"{level_name} shows no picture: {error}")
            return None
        rate = Fraction(fps).limit_denominator(1000) if fps else None
        rate = rate or frames_per_s(level_name, spec.action_repeats)
        if how == "window":
            return Window(level_name, spec, float(rate))
        name = re.sub(r"[^\w.-]+", "_", level_name)[-100:]
        path = Path(logdir) / "video" / f"play-{name}-{frames}.mp4"
        films.append(Movie(path, spec, rate))
        return films[-1]

    def on_episode(episode: Episode, left: int) -> None:
        nonlocal num_games
        num_games += 1
        limit = ", ended by a time limit" if episode.truncated else ""
        say(
            f"{episode.level_name}, game {num_games}: return {episode.episode_return:,.2f}, "
            f"{episode.steps:,} steps{limit}"
        )

    stopped = False
    try:
        evaluate(logdir, num_episodes, camera=camera, on_episode=on_episode, **flags)
    except (Closed, KeyboardInterrupt):
        stopped = True
    return Watched(tuple(film.path for film in films if film.begun), stopped)


def has_screen() -> bool:
    """Whether X11 or Wayland is there, as far as the environment says."""
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def _chosen(render: Render) -> Render:
    """``render`` without ``auto``; UsageError for a window where there is no screen."""
    if render == "auto":
        return "window" if has_screen() else "film"
    if render == "window" and not has_screen() and not os.environ.get("SDL_VIDEODRIVER"):
        raise UsageError(
            "there is no screen (neither DISPLAY nor WAYLAND_DISPLAY is set): --render=film writes "
            "an mp4 instead"
        )
    return render


class Closed(Exception):
    """The window was closed by who looks on."""


class Window:
    """Shows environment 0 in a window, a row at a time, no faster than wanted.

    Every call but the first from one thread, as SDL demands; it opens with the first row.
    """

    done = False

    def __init__(
        self, level_name: str, spec: EnvSpec, fps: float,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        """UsageError if there is no picture, or pygame-ce is missing."""
        self._picture = Picture(spec)
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        self._pygame = import_engine("pygame", "play")
        self._title = level_name
        self._period_s = 1 / fps
        self._clock = clock
        self._sleep = sleep
        self._due_s = -float("inf")
        self._screen: Any = None

    def on_row(self, row: EnvStep) -> None:
        """Show the row once it is due; Closed once the window is, or Escape or Q was pressed."""
        if row.lost[0]:
            return  # the replacement's first row is next
        frame = self._picture(row.observation, 0)
        height, width, _ = frame.shape
        if self._screen is None:
            self._open(height, width)
        self._wait()
        image = self._pygame.image.frombuffer(frame.tobytes(), (width, height), "RGB")
        size = self._screen.get_size()
        self._screen.blit(self._pygame.transform.scale(image, size), (0, 0))
        self._pygame.display.flip()
        for episode in row.episodes:
            if episode.env_index == 0:
                self._caption(f"{self._title}: last return {episode.episode_return:,.2f}")

    def close(self) -> None:
        """Close the window; harmless when repeated."""
        if self._screen is not None:
            self._screen = None
            self._pygame.display.quit()

    def _open(self, height: int, width: int) -> None:
        scale = -(-WINDOW_SIDE // min(height, width))
        try:
            self._pygame.display.init()
            self._screen = self._pygame.display.set_mode((scale * width, scale * height))
        except self._pygame.error as error:
            raise UsageError(
                f"no window can be opened ({error}): --render=film writes an mp4 instead"
            ) from None
        self._caption(self._title)

    def _caption(self, text: str) -> None:
        self._pygame.display.set_caption(text)

    def _wait(self) -> None:
        # What is late is shown at once, and nothing after it is hurried.
        self._due_s = max(self._due_s + self._period_s, self._clock())
        while True:
            self._look()
            left_s = self._due_s - self._clock()
            if left_s <= 0:
                return
            self._sleep(min(left_s, LOOK_S))

    def _look(self) -> None:
        keys = (self._pygame.K_ESCAPE, self._pygame.K_q)
        for event in self._pygame.event.get():
            pressed = event.type == self._pygame.KEYDOWN and event.key in keys
            if pressed or event.type == self._pygame.QUIT:
                raise Closed


class Movie:
    """Films all games of environment 0 into one file, up to where it is closed."""

    done = False

    def __init__(self, path: Path, spec: EnvSpec, rate: Fraction) -> None:
        """UsageError if there is no picture, the folder cannot be made, or PyAV is missing."""
        self._picture = Picture(spec)
        self._av = import_engine("av", "play")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{path.parent} cannot be made: {error.strerror}") from None
        self.path = path
        self.begun = False
        """There is something in it."""
        self._beside = path.with_suffix(".tmp")
        self._rate = rate
        self._film: Film | None = None

    def on_row(self, row: EnvStep) -> None:
        """Add the row's frame."""
        if row.lost[0]:
            return
        frame = self._picture(row.observation, 0)
        if self._film is None:
            self._film = Film(self._av, self._beside, self._rate, frame.shape)
        self._film.add(frame)
        self.begun = True

    def close(self) -> None:
        """Complete the file; harmless when repeated."""
        if self._film is not None:
            film, self._film = self._film, None
            film.close()
            self._beside.replace(self.path)
