"""Watching a checkpoint: windows and films show what environment 0 shows, and end in good order."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest

from asyncagent.__main__ import main
from asyncagent.checkpoint import save_checkpoint
from asyncagent.config import resolve
from asyncagent.envs import env_spec
from asyncagent.errors import UsageError
from asyncagent.models import make_net
from asyncagent.structs import ArraySpec, Discrete, EnvSpec, EnvStep, Episode
from asyncagent.watch import LOOK_S, WINDOW_SIDE, Closed, Movie, Watched, Window, watch

SPEC = EnvSpec(ArraySpec((8, 12, 3), "uint8"), Discrete(2), 4)
ROWS = 11
"""Of a game of TwoSenses: the first, and one after each of its ten steps."""


def write_run(logdir: Path, level_name: str) -> Path:
    """The checkpoint of a run that learned nothing."""
    config = resolve(level_name)
    net = make_net(config.net, env_spec(config), config.use_lstm, config.seed)
    logdir.mkdir(exist_ok=True)
    save_checkpoint(logdir, {"frames": 3000, "config": config.to_json(), "net": net.state_dict()})
    return logdir


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose level shows a picture."""
    return write_run(tmp_path_factory.mktemp("pictures"), "tests.my_envs:TwoSenses")


@pytest.fixture(autouse=True)
def _no_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def pygame(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """pygame, with a screen that nobody sees."""
    monkeypatch.setenv("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    module = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    yield module
    module.quit()


def row(shade: int, lost: bool = False, returns: float | None = None) -> EnvStep:
    """A row of two environments, the first all ``shade``; ``returns`` ends its game."""
    observation = np.zeros((2, 8, 12, 3), np.uint8)
    observation[0] = (shade, 40, 255 - shade)
    never = np.zeros(2, np.bool_)
    episodes = () if returns is None else (Episode("level", returns, 5, 0),)
    zeros = np.zeros(2, np.float32)
    return EnvStep(
        observation, zeros, never, never, never, np.array([lost, False]), episodes
    )  # fmt: skip


def frames_of(path: Path) -> list[npt.NDArray[np.uint8]]:
    """The frames of an mp4."""
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24").astype(np.uint8) for frame in file.decode(video=0)]


class Clock:
    """Time passes where somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, time_s: float) -> None:
        self.slept.append(time_s)
        self.now_s += time_s


def test_window_shows_every_row_when_it_is_due(pygame: Any) -> None:
    """Rows appear magnified and a period apart; what is late is not caught up with."""
    clock = Clock()
    window = Window("level", SPEC, 10.0, clock, clock.sleep)
    shown = []
    for shade, lateness_s in ((10, 0.0), (20, 0.0), (30, 0.75), (40, 0.0)):
        clock.now_s += lateness_s
        window.on_row(row(shade))
        shown.append(clock.now_s)
        surface = pygame.display.get_surface()
        assert min(surface.get_size()) == WINDOW_SIDE
        assert tuple(surface.get_at((7, 470)))[:3] == (shade, 40, 255 - shade)
    assert shown == pytest.approx([100.0, 100.1, 100.85, 100.95])
    assert max(clock.slept) <= LOOK_S
    window.on_row(row(50, lost=True))
    assert tuple(pygame.display.get_surface().get_at((0, 0)))[:3] == (40, 40, 215)
    window.on_row(row(60, returns=7.5))
    assert pygame.display.get_caption()[0] == "level: last return 7.50"
    window.close()
    window.close()
    assert not pygame.display.get_init()


@pytest.mark.parametrize("how", ["QUIT", "K_ESCAPE", "K_q"])
def test_window_can_be_closed(pygame: Any, how: str) -> None:
    """The window's button, Escape and Q end it, also between two rows; other keys do not."""
    clock = Clock()
    window = Window("level", SPEC, 1.0, clock, clock.sleep)
    window.on_row(row(1))
    pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_a))
    window.on_row(row(2))

    def close_meanwhile(time_s: float) -> None:
        clock.sleep(time_s)
        kind = {"key": getattr(pygame, how)} if how != "QUIT" else {}
        event = pygame.event.Event(pygame.KEYDOWN if kind else pygame.QUIT, **kind)
        pygame.event.post(event)

    window._sleep = close_meanwhile
    before_s = clock.now_s
    with pytest.raises(Closed):
        window.on_row(row(3))
    assert clock.now_s - before_s <= 2 * LOOK_S
    window.close()


def test_movie_holds_all_games(tmp_path: Path) -> None:
    """Every row of every game is a frame, but for those of a lost environment."""
    movie = Movie(tmp_path / "video" / "film.mp4", SPEC, Fraction(15))
    assert not movie.begun
    shades = [10, 90, 170, 250]
    movie.on_row(row(shades[0]))
    movie.on_row(row(shades[1], returns=1.0))
    movie.on_row(row(0, lost=True))
    movie.on_row(row(shades[2]))
    movie.on_row(row(shades[3]))
    assert not movie.path.exists()
    movie.close()
    movie.close()
    found = [int(frame[0, 0, 0]) for frame in frames_of(movie.path)]
    assert found == pytest.approx(shades, abs=8)
    assert [path.name for path in movie.path.parent.iterdir()] == ["film.mp4"]


def test_without_a_screen_a_film_is_made(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All games are in one mp4, and each is told with return and length."""
    assert main(["play", f"--logdir={pictures}", "--episodes=2", "--fps=5", "--greedy"]) == 0
    *games, last = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in games] == [
        f"tests.my_envs:TwoSenses, game {number}" for number in (1, 2)
    ]
    assert all(", 10 steps" in line for line in games)
    path = pictures / "video" / "play-tests.my_envs_TwoSenses-3000.mp4"
    assert last == f"film: {path}"
    assert len(frames_of(path)) == 2 * ROWS
    with av.open(str(path)) as file:
        assert file.streams.video[0].average_rate == 5


def test_ctrl_c_keeps_the_film(pictures: Path) -> None:
    """Interrupted, what was played until then is a film that can be played."""
    told = []

    def say(line: str) -> None:
        told.append(line)
        signal.raise_signal(signal.SIGINT)

    seen = watch(pictures, 1000, render="film", say=say)
    assert seen.stopped and len(told) < 1000
    (path,) = seen.films
    assert ROWS <= len(frames_of(path)) < 1000 * ROWS


def test_closing_the_window_ends_the_games(pictures: Path, pygame: Any) -> None:
    """A window that is closed ends play, environments and all; none is left open."""
    told = []

    def say(line: str) -> None:
        told.append(line)
        pygame.event.post(pygame.event.Event(pygame.QUIT))

    seen = watch(pictures, 1000, render="window", fps=1000, say=say)
    assert seen == Watched((), True)
    assert 1 <= len(told) < 1000
    assert not pygame.display.get_init()


def test_a_screen_is_used(pictures: Path, pygame: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a screen is said to be there, auto opens a window and leaves no film."""
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    sizes = []

    def say(line: str) -> None:
        sizes.append(pygame.display.get_window_size())

    assert watch(pictures, 1, fps=1000, say=say) == Watched((), False)
    assert sizes == [(WINDOW_SIDE, WINDOW_SIDE)]


def test_no_screen_for_a_window(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--render without a screen is told in one line, with what works instead."""
    assert main(["play", f"--logdir={pictures}", "--render"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no screen" in line and "--render=film" in line


def test_a_screen_that_is_not_there(
    pictures: Path, pygame: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A display that is named, but cannot be opened, ends play with one error."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "x11")
    monkeypatch.setenv("DISPLAY", ":1234")
    with pytest.raises(UsageError, match="no window can be opened"):
        watch(pictures, 1, render="window", say=lambda line: None)


def test_levels_without_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their games are played and told; a film of them is refused."""
    logdir = write_run(tmp_path, "catch")
    assert main(["play", f"--logdir={logdir}", "--episodes=3"]) == 0
    note, *games = capsys.readouterr().out.splitlines()
    assert "catch shows no picture" in note
    assert [line[: len("catch, game 1: return")] for line in games] == [
        f"catch, game {number}: return" for number in (1, 2, 3)
    ]
    assert main(["play", f"--logdir={logdir}", "--render=film"]) == 2
    assert "catch shows no picture" in capsys.readouterr().err
    assert main(["play", f"--logdir={logdir}", "--render=none"]) == 0
    assert "picture" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--fps=0.5", "fps=0.5 must be in [1, 1000]"),
        ("--fps=nan", "fps=nan must be in [1, 1000]"),
        ("--episodes=0", "episodes=0 must be >= 1"),
        ("--checkpoint=best", "is not there"),
        ("--render=radio", "radio"),
    ],
)
def test_mistakes(
    pictures: Path, capsys: pytest.CaptureFixture[str], flag: str, words: str
) -> None:
    """One line says what is wrong and what would be right."""
    assert main(["play", f"--logdir={pictures}", flag]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_flags_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What play is told reaches whoever plays; --render alone asks for a window."""
    asked: dict[str, Any] = {}

    def instead(logdir: str, num_episodes: int, **flags: Any) -> Watched:
        asked.update(flags, logdir=logdir, num_episodes=num_episodes)
        return Watched((), False)

    monkeypatch.setattr("asyncagent.watch.watch", instead)
    arguments = ["--render", "--greedy", "--seed=3", "--checkpoint=best", "--level_name=catch"]
    assert main(["play", "--logdir=run", *arguments]) == 0
    del asked["say"]
    assert asked == {
        "logdir": "run", "num_episodes": 1, "render": "window", "fps": 0.0, "greedy": True,
        "seed": 3, "checkpoint": "best", "level_name": "catch", "device": "auto",
    }  # fmt: skip
