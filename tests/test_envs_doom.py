"""ViZDoom's levels: the rules on a tape, and what the real engine plays."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import vizdoom

from asyncagent.envs import doom, doom_cfg
from asyncagent.envs.base import Outcome
from asyncagent.envs.doom_rewards import shaping
from asyncagent.errors import UsageError
from asyncagent.structs import ActionArray, ArraySpec, Discrete, MultiDiscrete

ROOT = Path(__file__).resolve().parent.parent
RGB = ArraySpec((72, 128, 3), "uint8")
RENDERING = ("hud", "crosshair", "weapon", "decals", "particles")


@pytest.fixture(autouse=True)
def nothing_is_left(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Every test plays in an empty folder, which is empty afterwards, as everything else is."""
    here, temporary = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("temporary")
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    assert Path.cwd() == here
    assert [*here.iterdir(), *temporary.iterdir()] == []
    assert engines() == []


def engines(parent: int = os.getpid()) -> list[int]:
    """Numbers of the engine processes that ``parent`` has."""
    lists = Path(f"/proc/{parent}/task").glob("*/children")
    children = [word for one in lists for word in one.read_text().split()]
    return [
        int(child)
        for child in children
        if "+viz_instance_id" in Path(f"/proc/{child}/cmdline").read_text()
    ]


def shared_memory_of(process: int) -> list[Path]:
    """Files in /dev/shm that belong to an engine process."""
    words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
    instance = words[words.index("+viz_instance_id") + 1]
    return list(Path("/dev/shm").glob(f"*{instance}*"))


@contextlib.contextmanager
def game(level_name: str, seed: int = 1, action_repeats: int = 4) -> Iterator[doom.DoomEnv]:
    """A game, which is closed afterwards."""
    env = doom.make_env(seed=seed, level_name=level_name, action_repeats=action_repeats)
    assert isinstance(env, doom.DoomEnv)
    try:
        yield env
    finally:
        env.close()


class Step(NamedTuple):
    """What an episode's step came to, and the engine's variables around it."""

    outcome: Outcome
    before: dict[str, float]
    after: dict[str, float]


def play(env: doom.DoomEnv, *actions: Any) -> Iterator[Step]:
    """An episode from its start to its end, or to the end of ``actions`` if there are any."""
    rng = np.random.default_rng(7)
    env.reset()
    for action in actions or (sample(env, rng) for _ in itertools.count()):
        before = dict(env.variables)
        outcome = env.step(np.asarray(action))
        yield Step(outcome, before, dict(env.variables))
        if outcome.terminated or outcome.truncated:
            return


def sample(env: doom.DoomEnv, rng: np.random.Generator) -> ActionArray:
    space = env.spec.actions
    if isinstance(space, MultiDiscrete):
        return rng.integers(0, space.sizes)
    assert isinstance(space, Discrete)
    return np.asarray(rng.integers(space.num_actions))


def last(env: doom.DoomEnv, *actions: Any) -> Step:
    """The last step of ``play``."""
    *_, step = play(env, *actions)
    return step


# The rules, word for word.

BUTTONS = {
    "doom_benchmark": "MOVE_FORWARD MOVE_BACKWARD MOVE_RIGHT MOVE_LEFT TURN_RIGHT TURN_LEFT "
    "ATTACK SPEED",
    "doom_battle": "MOVE_FORWARD MOVE_BACKWARD MOVE_RIGHT MOVE_LEFT ATTACK SPEED "
    "TURN_LEFT_RIGHT_DELTA",
    "doom_battle2": "MOVE_FORWARD MOVE_BACKWARD MOVE_RIGHT MOVE_LEFT ATTACK SPEED "
    "TURN_LEFT_RIGHT_DELTA",
    "doom_basic": "MOVE_LEFT MOVE_RIGHT ATTACK",
    "doom_my_way_home": "TURN_LEFT TURN_RIGHT MOVE_FORWARD MOVE_BACKWARD",
    "doom_deadly_corridor": "MOVE_LEFT MOVE_RIGHT ATTACK MOVE_FORWARD MOVE_BACKWARD TURN_LEFT "
    "TURN_RIGHT",
    "doom_defend_the_center": "TURN_LEFT TURN_RIGHT ATTACK",
    "doom_defend_the_line": "TURN_LEFT TURN_RIGHT ATTACK",
    "doom_health_gathering": "TURN_LEFT TURN_RIGHT MOVE_FORWARD MOVE_BACKWARD",
    "doom_health_gathering_supreme": "TURN_LEFT TURN_RIGHT MOVE_FORWARD MOVE_BACKWARD",
}
BATTLE = "POSITION_X POSITION_Y ANGLE SELECTED_WEAPON SELECTED_WEAPON_AMMO HEALTH USER2"
TUPLE = MultiDiscrete((3, 3, 2, 2, 11))
RULES: dict[str, tuple[Any, ...]] = {
    # actions, variables, skill, timeout, start, living, death, scale, hud and crosshair and weapon
    "doom_benchmark": (Discrete(9), BATTLE, 2, 2100, 1, 0, 0, 1, "yes yes yes"),
    "doom_battle": (TUPLE, BATTLE, 2, 2100, 1, 0, 0, 1, "yes yes yes"),
    "doom_battle2": (TUPLE, BATTLE, 2, 2100, 1, 0, 0, 1, "yes yes yes"),
    "doom_basic": (
        *(Discrete(4), "AMMO2 POSITION_X POSITION_Y ANGLE"),
        *(5, 300, 14, -1, 0, 0.01, "yes no yes"),
    ),
    "doom_my_way_home": (Discrete(5), "AMMO0", 5, 2100, 10, -0.0001, 0, 1, "no no yes"),
    "doom_deadly_corridor": (Discrete(8), "HEALTH", 5, 2100, 1, 0, 100, 0.01, "yes no yes"),
    "doom_defend_the_center": (Discrete(4), "AMMO2 HEALTH", 3, 2100, 10, 0, 1, 1, "yes no yes"),
    "doom_defend_the_line": (Discrete(4), "AMMO2 HEALTH", 3, 0, 10, 0, 1, 1, "yes no yes"),
    "doom_health_gathering": (Discrete(5), "HEALTH", None, 2100, 1, 0.01, 0, 1, "no no no"),
    "doom_health_gathering_supreme": (
        *(Discrete(5), "HEALTH", None, 2100, 1, 0.01, 0, 1, "no no no"),
    ),
}


class Tape:
    """Stands in for a game that is set up, and writes down what it is told."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda value: self.told.__setitem__(name.removeprefix("set_"), value)


@pytest.mark.parametrize("level_name", sorted(RULES))
def test_rules_are_the_ancestors(level_name: str) -> None:
    """The engine is told the ancestor's rules, whatever the package's cfg says."""
    actions, variables, skill, timeout, start, living, death, scale, drawn = RULES[level_name]
    scenario, tape = doom.LEVELS[level_name], Tape()
    doom._configure(vizdoom, tape, scenario)
    assert [one.name for one in tape.told["available_buttons"]] == BUTTONS[level_name].split()
    assert [one.name for one in tape.told["available_game_variables"]] == variables.split()
    assert tape.told.get("doom_skill") == skill
    assert tape.told["episode_timeout"] == timeout
    assert tape.told["episode_start_time"] == start
    assert tape.told["living_reward"] == living
    assert tape.told["death_penalty"] == death
    assert scenario.reward_scale == scale
    assert scenario.health_bonus == ("health_gathering" in level_name)
    rendered = [tape.told[f"render_{what}"] for what in RENDERING]
    assert rendered == [word == "yes" for word in drawn.split()] + [False, False]
    assert doom.spec(level_name, 4).actions == actions


def test_ten_levels() -> None:
    """There are the ten levels, and no other."""
    assert doom.LEVELS.keys() == RULES.keys() == BUTTONS.keys()


@pytest.mark.parametrize("level_name", sorted(RULES))
def test_level_plays(level_name: str) -> None:
    """The engine plays every level, and shows what the spec says."""
    with game(level_name) as env:
        assert env.spec == doom.spec(level_name, 4)
        first = env.reset()
        ones = np.ones(env.spec.actions.array.shape, np.int64)
        frames = [step.outcome.observation for step in play(env, ones, ones, ones)]
    for seen in (first, *frames):
        if level_name in ("doom_battle", "doom_battle2"):
            assert env.spec.observation == {
                "rgb": RGB,
                "measurements": ArraySpec((23,), "float32"),
            }
            assert seen["measurements"].shape == (23,) and seen["measurements"].dtype == np.float32
            seen = seen["rgb"]
        else:
            assert env.spec.observation == RGB
        assert seen.shape == RGB.shape and seen.dtype == np.uint8
        assert len(np.unique(seen)) > 20


# Actions.


def turned(step: Step) -> float:
    """Degrees to the left, in [-180, 180)."""
    return (step.after["ANGLE"] - step.before["ANGLE"] + 180) % 360 - 180


def moved(step: Step) -> tuple[float, float]:
    """Units forward and to the right."""
    angle = np.deg2rad(step.before["ANGLE"])
    x = step.after["POSITION_X"] - step.before["POSITION_X"]
    y = step.after["POSITION_Y"] - step.before["POSITION_Y"]
    forward, right = x * np.cos(angle) + y * np.sin(angle), x * np.sin(angle) - y * np.cos(angle)
    return round(float(forward), 1), round(float(right), 1)


def act(env: doom.DoomEnv, action: Any, times: int = 2) -> Step:
    """The last of so many steps in a new episode, in which nobody moves at first."""
    nothing = (0, 0, 0, 0, 5) if env.spec.actions == TUPLE else 0
    return last(env, *[nothing] * 8, *[action] * times)


def test_discrete_action_presses_one_button() -> None:
    """Action 0 presses nothing, action k the k-th button alone."""
    with game("doom_benchmark") as env:
        steps = [act(env, k, times=9 if k in (0, 7) else 2) for k in range(9)]
    walks = [moved(step) for step in steps]
    assert {walks[k] for k in (0, 5, 6, 7, 8)} == {(0, 0)}
    (ahead, _), (back, _), (_, right), (_, left) = walks[1:5]
    assert min(ahead, -back, right, -left) > 5
    assert {walks[1][1], walks[2][1], walks[3][0], walks[4][0]} == {0}
    turns = [turned(step) for step in steps]
    assert turns[5] < -5 and turns[6] == -turns[5] and not any(turns[:5] + turns[7:])
    rounds = [step.after["SELECTED_WEAPON_AMMO"] for step in steps]
    assert rounds[7] < 20 and {*rounds[:7], rounds[8]} == {20}


def test_tuple_action_presses_several() -> None:
    """Each part of a battle's action presses its own button, all at once."""
    with game("doom_battle") as env:
        still = act(env, (0, 0, 0, 0, 5), times=9)
        assert moved(still) == (0, 0) and turned(still) == 0
        assert still.after["SELECTED_WEAPON_AMMO"] == 20
        assert act(env, (0, 0, 1, 0, 5), times=9).after["SELECTED_WEAPON_AMMO"] < 20
        assert moved(act(env, (1, 0, 0, 0, 5)))[0] > 5 > -5 > moved(act(env, (2, 0, 0, 0, 5)))[0]
        assert moved(act(env, (0, 1, 0, 0, 5)))[1] > 5 > -5 > moved(act(env, (0, 2, 0, 0, 5)))[1]
        ahead, right = moved(act(env, (1, 2, 0, 0, 5)))
        assert ahead > 5 and right < -5
        walk, run = (moved(act(env, (1, 0, 0, k, 5)))[0] for k in (0, 1))
        assert run > 1.5 * walk


@pytest.mark.parametrize("action_repeats", [2, 4])
def test_turns_are_degrees_per_tic(action_repeats: int) -> None:
    """The turn part's 11 choices are -10, -8, ... 10 degrees to the right in every tic."""
    with game("doom_battle", action_repeats=action_repeats) as env:
        turns = [turned(act(env, (0, 0, 0, 0, k), times=8)) for k in range(11)]
    expected = [-action_repeats * degrees for degrees in range(-10, 11, 2)]
    np.testing.assert_allclose(turns, expected, atol=0.1)


# Rewards and ends.


def test_basic_runs_into_its_limit() -> None:
    """A tic costs 0.01 in doom_basic; after 300 tics, 75 steps, it is cut off, not ended."""
    with game("doom_basic") as env:
        steps = list(play(env, *[0] * 100))
    assert len(steps) == 75
    assert sum(step.outcome.reward for step in steps) == pytest.approx(-3.0)
    *before, end = (step.outcome for step in steps)
    assert not any(one.terminated or one.truncated for one in before)
    assert end.truncated and not end.terminated and end.observation is None


def test_basic_ends_by_the_kill() -> None:
    """The kill brings 1.06, a shot costs 0.05, a tic 0.01; and the kill ends the episode."""
    with game("doom_basic") as env:
        episodes = (list(play(env)) for _ in range(30))
        steps = next(episode for episode in episodes if episode[-1].outcome.terminated)
    end = steps[-1].outcome
    assert not end.truncated and end.observation is None
    misses = steps[0].before["AMMO2"] - steps[-1].before["AMMO2"]
    total = sum(step.outcome.reward for step in steps)
    # How many tics and shots the last step of four tics took is not seen from outside.
    possible = [
        0.01 * (106 - 5 * (misses + shots) - 4 * (len(steps) - 1) - tics)
        for tics in (1, 2, 3, 4)
        for shots in (0, 1)
    ]
    assert min(abs(total - one) for one in possible) < 1e-6


@pytest.mark.parametrize(("action_repeats", "num_steps"), [(4, 525), (16, 132)])
def test_limit_is_in_tics(action_repeats: int, num_steps: int) -> None:
    """2,100 tics are the limit, whatever a step is; the last step may be cut short."""
    with game("doom_my_way_home", action_repeats=action_repeats) as env:
        steps = list(play(env, *[0] * 600))
    assert len(steps) == num_steps
    assert sum(step.outcome.reward for step in steps) == pytest.approx(-0.21)
    assert steps[-1].outcome.truncated and not steps[-1].outcome.terminated


def test_death_is_no_truncation() -> None:
    """Who stands still in the deadly corridor dies: about -1, and an end by the rules."""
    with game("doom_deadly_corridor") as env:
        steps = list(play(env, *[0] * 525))
    assert len(steps) < 525
    assert steps[-1].outcome.terminated and not steps[-1].outcome.truncated
    assert steps[-1].outcome.reward == pytest.approx(-1.0, abs=0.2)


def test_health_is_rewarded() -> None:
    """Each tic alive brings 0.01, each step after which health is higher 1 more, death nothing."""
    with game("doom_health_gathering") as env:
        episodes = [list(play(env)) for _ in range(12)]
    found = 0
    for steps in episodes:
        *alive, end = steps
        for step in alive:
            healthier = step.after["HEALTH"] > step.before["HEALTH"]
            assert step.outcome.reward == pytest.approx(0.04 + healthier)
            found += healthier
        assert end.outcome.terminated and 0 < end.outcome.reward <= 0.04 + 1e-9
    assert found > 0


def test_random_play_gathers_little_health() -> None:
    """Random play lasts 385 to 513 tics on average."""
    rng = np.random.default_rng(1)
    with game("doom_health_gathering") as env:
        lengths = [
            sum(4 for _ in play(env, *(sample(env, rng) for _ in range(525)))) for _ in range(40)
        ]
    assert 385 <= np.mean(lengths) <= 513


def spin_and_shoot(env: doom.DoomEnv, *actions: Any) -> list[Step]:
    """Episodes until monsters were killed, each to its end."""
    steps: list[Step] = []
    for _ in range(10):
        steps += play(env, *actions * 300)
        if sum(step.outcome.reward > 0.5 for step in steps) >= 2:
            return steps
    raise AssertionError("no monster was hit")


def test_benchmark_counts_kills() -> None:
    """doom_benchmark's reward is the number of monsters killed in the step."""
    with game("doom_benchmark") as env:
        steps = spin_and_shoot(env, 6, 7)
    for step in steps:
        if not step.outcome.terminated:
            assert step.outcome.reward == step.after["USER2"] - step.before["USER2"]


def test_battle_shapes_its_reward() -> None:
    """A battle's score is the kills; the shaping comes on top, but not in the last step."""
    with game("doom_battle") as env:
        steps = spin_and_shoot(env, (0, 0, 1, 0, 4))
    held, shaped = 0, []
    for step in steps:
        outcome = step.outcome
        if outcome.terminated or outcome.truncated:
            assert outcome.observation is None and outcome.score in (None, outcome.reward)
            held = 0
            continue
        assert outcome.score == step.after["USER2"] - step.before["USER2"]
        same = step.after["SELECTED_WEAPON"] == step.before["SELECTED_WEAPON"]
        held = held + 1 if same and held else 1
        extra = shaping(step.before, step.after, held)
        assert outcome.reward == pytest.approx(outcome.score + extra)
        shaped.append(extra)
        assert outcome.observation["measurements"][2] == np.float32(step.after["HEALTH"] / 30)
        assert outcome.observation["measurements"][4] == np.float32(step.after["USER2"] / 10)
    assert min(shaped) < 0 < max(shaped)


def test_other_levels_score_their_reward() -> None:
    """Where nothing is shaped the score is the reward, the health bonus included."""
    for level_name in ("doom_health_gathering", "doom_benchmark"):
        with game(level_name) as env:
            for step in play(env):
                assert step.outcome.score in (None, step.outcome.reward)


class ScriptedGame:
    """A battle of which every step's end is told: reward, variables, whether dead, whether late."""

    def __init__(self, *ends: tuple[float, dict[str, float], bool, bool]) -> None:
        self._ends = iter(ends)
        self._now: tuple[float, dict[str, float], bool, bool] = (0.0, {}, False, False)

    def new_episode(self) -> None:
        self._now = (0.0, {}, False, False)

    def make_action(self, pressed: list[float], tics: int) -> float:
        self._now = next(self._ends)
        return self._now[0]

    def is_episode_finished(self) -> bool:
        return self._now[2] or self._now[3]

    def is_player_dead(self) -> bool:
        return self._now[2]

    def is_episode_timeout_reached(self) -> bool:
        return self._now[3]

    def get_state(self) -> Any:
        if self.is_episode_finished():
            return None
        start = {"SELECTED_WEAPON": 2.0, "SELECTED_WEAPON_AMMO": 9.0, "HEALTH": 100.0}
        variables = [float((start | self._now[1]).get(name, 0)) for name in BATTLE.split()]
        screen = np.zeros((120, 160, 3), np.uint8)
        return SimpleNamespace(game_variables=np.array(variables), screen_buffer=screen)


@pytest.mark.parametrize(
    ("dead", "late", "terminated"), [(True, False, True), (False, True, False), (True, True, True)]
)
def test_end(dead: bool, late: bool, terminated: bool) -> None:
    """Death on the very tic of the limit is death; the last step's reward is not shaped."""
    last_one = (1.0, {"HEALTH": 0.0}, dead, late)
    env = doom.DoomEnv(ScriptedGame(last_one), doom.LEVELS["doom_battle"], 4)
    env.reset()
    outcome = env.step(np.zeros(5, np.int64))
    assert outcome == Outcome(None, 1.0, terminated, not terminated)


def test_weapon_is_held_within_an_episode() -> None:
    """A weapon pays from the fifth step with it on; another one, or an episode, starts anew."""
    quiet: tuple[float, dict[str, float], bool, bool] = (0.0, {}, False, False)
    changed = (0.0, {"SELECTED_WEAPON": 4.0}, False, False)
    script = [*[quiet] * 6, *[changed] * 6, (0.0, {}, True, False), *[quiet] * 6]
    env = doom.DoomEnv(ScriptedGame(*script), doom.LEVELS["doom_battle"], 4)
    rewards = []
    for number in range(19):
        if number in (0, 13):
            env.reset()
        rewards.append(env.step(np.zeros(5, np.int64)).reward)
    pistol, chaingun = 0.0002, 0.001
    expected = [0.0] * 4 + [pistol] * 2 + [0.0] * 4 + [chaingun] * 2 + [0.0] * 5 + [pistol] * 2
    assert rewards == pytest.approx(expected)


# Seeds.


def history(seed: int) -> list[tuple[bytes, float]]:
    """Frames and rewards of three episodes of 20 steps."""
    with game("doom_benchmark", seed=seed) as env:
        return [
            (step.outcome.observation.tobytes(), step.outcome.reward)
            for _ in range(3)
            for step in play(env, *[1, 5, 7, 2] * 5)
        ]


def test_seed_determines_everything() -> None:
    """Games of one seed are equal from frame to frame; other seeds and later episodes differ."""
    one = history(2**31 - 1)
    assert one == history(2**31 - 1)
    other = history(1)
    assert all(a != b for a, b in zip(one, other, strict=True))
    assert one[:20] != one[20:40] != one[40:]


# The process.


def test_nothing_shared_has_a_name(capfd: pytest.CaptureFixture[str]) -> None:
    """A running game has neither a file in the current folder nor one in /dev/shm."""
    with game("doom_basic") as env:
        (engine,) = engines()
        assert shared_memory_of(engine) == []
        assert list(Path.cwd().iterdir()) == list(Path(tempfile.gettempdir()).iterdir()) == []
        env.reset()
    assert capfd.readouterr() == ("", "")


def test_killed_together_they_leave_nothing() -> None:
    """A process that is killed with its game leaves no file behind."""
    program = """
import sys
from asyncagent.envs import doom
env = doom.make_env(seed=1, level_name="doom_basic", action_repeats=4)
env.reset()
print("plays", flush=True)
while True:
    env.step(0)
    env.reset()
"""
    environment = os.environ | {"TMPDIR": tempfile.gettempdir(), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        start_new_session=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"plays\n"
            (engine,) = engines(process.pid)
            shared = shared_memory_of(engine)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert shared == []


def test_interrupts_are_not_the_games() -> None:
    """Ctrl-C, which every process of the terminal hears, ends no game."""
    with game("doom_basic") as env:
        (engine,) = engines()
        env.reset()
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(engine, number)
        assert len(list(play(env, *[0] * 100))) == 75


def test_dead_game_raises() -> None:
    """Once its process is gone a game raises whenever it is asked, and closes all the same."""
    with game("doom_basic") as env:
        env.reset()
        (engine,) = engines()
        os.kill(engine, signal.SIGKILL)
        for call in (lambda: env.step(0), lambda: env.step(0), env.reset):
            with pytest.raises(Exception, match="ViZDoom"):
                call()


# What cannot be played.


@pytest.mark.parametrize(
    ("level_name", "message"),
    [
        ("doom_basik", "did you mean doom_basic"),
        ("doom_health", "did you mean doom_health_gathering"),
        ("doom_", "doom:<path> takes a cfg"),
        ("doom_zzz", "choose doom_basic, doom_battle, "),
        ("doom:", "there is no file"),
        ("doom:nowhere.cfg", r"there is no file /.*/nowhere\.cfg$"),
        ("doom:/", "there is no file /$"),
        (f"doom:{sys.executable}", "is no text file"),
    ],
)
def test_unknown_level(level_name: str, message: str) -> None:
    """A level or cfg that does not exist is refused in one line, with the nearest names."""
    with pytest.raises(UsageError, match=message) as caught:
        doom.check(level_name)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError):
        doom.make_env(seed=1, level_name=level_name, action_repeats=4)


@pytest.mark.parametrize("level_name", sorted(RULES))
def test_known_level(level_name: str) -> None:
    """The ten levels pass the check, and their recipe names the maker."""
    doom.check(level_name)
    recipe = doom.recipe(level_name, 3)
    assert recipe.maker == "asyncagent.envs.doom:make_env"
    assert recipe.options == {"level_name": level_name, "action_repeats": 3}


def test_another_map_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A battle on a map of the same name is no battle: both md5 sums are named."""
    scenario = doom.LEVELS["doom_battle"]
    package = SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(doom, "import_engine", lambda module, extra: package)
    with pytest.raises(UsageError, match="is missing; in asyncagent's folder: pip install"):
        doom.map_path(scenario)
    path = tmp_path / "vizdoom" / "maps" / "D3_battle.wad"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"another")
    found, expected = "b32d73e56ec99bc5ec8f83871cde708a", "4755d4bb4317488205a7a7af09c8e9a1"
    with pytest.raises(UsageError, match=f"{found}.*{expected}"):
        doom.map_path(scenario)


@pytest.mark.parametrize("package", ["vizdoom", "envpool_assets"])
def test_missing_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package there is one line that says how to get it."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=re.escape("pip install -e '.[doom]'")):
        doom.make_env(seed=1, level_name="doom_battle", action_repeats=4)


def test_spec_of_a_cfg_is_not_known() -> None:
    """What a cfg's actions are only a game of it tells."""
    with pytest.raises(UsageError, match="shows only in a game"):
        doom.spec("doom:basic.cfg", 4)


# The user's own.


def write_cfg(folder: Path, text: str, wad: str = "basic.wad") -> str:
    """A level name for the cfg ``text``, which may name ``own.wad`` beside it."""
    (folder / "own.wad").write_bytes((Path(vizdoom.scenarios_path) / wad).read_bytes())
    (folder / "own.cfg").write_text(text)
    return f"doom:{folder / 'own.cfg'}"


OWN = """
doom_scenario_path = own.wad
living_reward = -2
episode_timeout = 40
screen_resolution = RES_640X480
screen_format = GRAY8
window_visible = true
depth_buffer_enabled = true
audio_buffer_enabled = true
mode = ASYNC_SPECTATOR
available_buttons = { ATTACK MOVE_LEFT }
"""


def test_own_scenario(tmp_path: Path) -> None:
    """A cfg's buttons, rewards and limit hold; its format, mode and further buffers do not."""
    with game(write_cfg(tmp_path, OWN)) as env:
        assert env.spec.actions == Discrete(3) and env.spec.observation == RGB
        assert env.reset().shape == RGB.shape
        assert env.game.get_mode() == vizdoom.Mode.PLAYER
        assert not env.game.is_depth_buffer_enabled() and not env.game.is_audio_buffer_enabled()
        steps = list(play(env, *[0] * 20))
    assert len(steps) == 10 and steps[-1].outcome.truncated
    assert sum(step.outcome.reward for step in steps) == -80


def test_own_path_is_looked_up_at_once(tmp_path: Path) -> None:
    """A relative path means the folder in which the recipe was asked for, ~ the user's home."""
    recipe = doom.recipe("doom:sub/own.cfg", 4)
    assert recipe.options["level_name"] == f"doom:{Path.cwd()}/sub/own.cfg"
    home = doom.recipe("doom:~/own.cfg", 4)
    assert home.options["level_name"] == f"doom:{Path.home()}/own.cfg"


def test_own_wad_by_its_absolute_path(tmp_path: Path) -> None:
    """A cfg may name its map by an absolute path, which ViZDoom itself gets wrong."""
    wad = Path(vizdoom.scenarios_path) / "basic.wad"
    level_name = write_cfg(tmp_path, OWN.replace("own.wad", str(wad)))
    with game(level_name) as env:
        assert len(list(play(env, *[0] * 20))) == 10


def test_buttons_that_take_a_number(tmp_path: Path) -> None:
    """A delta button gives two actions, one per direction."""
    text = OWN.replace("ATTACK MOVE_LEFT", "TURN_LEFT_RIGHT_DELTA ATTACK MOVE_LEFT_RIGHT_DELTA")
    level_name = write_cfg(tmp_path, text)
    with game(level_name) as env:
        assert env.spec.actions == Discrete(6)
        pressed = [env.pressed(np.int64(k)) for k in range(6)]
    assert pressed == [
        *([0, 0, 0], [3.5, 0, 0], [-3.5, 0, 0]),
        *([0, 1, 0], [0, 0, 25], [0, 0, -25]),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ATTACK", "FLY_UP", "fly_up"),
        ("living_reward", "leaving_reward", "leaving_reward"),
        ("= 40", "= long", "long"),
        ("}", "", "Syntax error"),
        ("ATTACK MOVE_LEFT", "", "own.cfg"),
        (OWN, "doom_scenario_path = own.wad", "lists no available_buttons"),
        ("own.wad", "nowhere.wad", r"there is no file .*nowhere\.wad"),
        ("own.wad", "own.cfg", r"own\.cfg is no WAD: it begins with b'\\ndoo'"),
        ("mode", "doom_map = map77\nmode", r"doom_map=map77 is not in .*own\.wad"),
        ("mode", "doom_game_path = doom2.wad\nmode", r"there is no file .*doom2\.wad"),
    ],
)
def test_faulty_cfg(
    tmp_path: Path, old: str, new: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """What ViZDoom would ignore, or wait for in vain, is refused in one line."""
    level_name = write_cfg(tmp_path, OWN.replace(old, new))
    doom.check(level_name)
    with pytest.raises(UsageError, match=message) as caught:
        doom.make_env(seed=1, level_name=level_name, action_repeats=4)
    assert "\n" not in str(caught.value)
    os.write(2, b"as before")
    assert capfd.readouterr().err == "as before"


def test_maps_in_a_zip_are_left_to_the_engine(tmp_path: Path) -> None:
    """In a pk3, a ZIP, maps are not looked for."""
    assert lumps(tmp_path, b"PK\3\4 and so on") is None
    header = struct.pack("<4sII", b"PWAD", 2, 12)
    entries = struct.pack("<II8s", 0, 0, b"map01") + struct.pack("<II8s", 0, 0, b"TEXTMAP")
    assert lumps(tmp_path, header + entries) == {"MAP01", "TEXTMAP"}


def lumps(folder: Path, content: bytes) -> set[str] | None:
    (folder / "some.wad").write_bytes(content)
    return doom_cfg._lumps(str(folder / "some.wad"))


NOT_PLAYED = {"doom", "doom2", "freedoom1", "freedoom2", "cig", "multi_duel"}
"""WADs that are not there, and two for several players, on which ViZDoom crashes alone."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted({path.stem for path in Path(vizdoom.scenarios_path).glob("*.cfg")} - NOT_PLAYED)
)
def test_cfgs_of_the_package(name: str) -> None:
    """ViZDoom's own cfgs for one player are understood and played."""
    with game(f"doom:{vizdoom.scenarios_path}/{name}.cfg") as env:
        assert env.reset().shape == RGB.shape
        assert len(list(play(env, 1, 2, 1))) == 3


# The image.


def test_shrink_takes_the_nearest() -> None:
    """Row i, column j of the small image is row 5i/3, column 5j/4 of the screen, rounded down."""
    screen = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    rows, columns = np.arange(72) * 5 // 3, np.arange(128) * 5 // 4
    small = doom.shrink(screen)
    np.testing.assert_array_equal(small, screen[rows[:, None], columns])
    assert small.flags.c_contiguous and not np.shares_memory(small, screen)
