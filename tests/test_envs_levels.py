"""Level names, specs, seeds and what is imported when."""

from __future__ import annotations

import subprocess
import sys

import ale_py
import envpool
import pytest
from ale_py import roms

from asyncagent.config import Config
from asyncagent.envs import (
    atari,
    check_level,
    env_spec,
    family_of,
    level_names,
    levels_of,
    make_group,
)
from asyncagent.envs.base import env_seeds
from asyncagent.errors import UsageError
from asyncagent.structs import ArraySpec, Discrete, EnvSpec

NOT_FOR_ONE_PLAYER = {"combat", "joust", "maze_craze", "warlords"}
"""ale-py lists them but does not load them."""


def config(level_name: str, **flags: object) -> Config:
    return Config(level_name=level_name, **flags)  # type: ignore[arg-type]


def test_games_are_envpools_and_ales() -> None:
    """Every game of envpool and every game that ale-py loads has its level, and no other."""
    pattern = {"".join(w.capitalize() for w in g.split("_")) for g in atari.MINIMAL_ACTIONS}
    of_envpool = {
        name.removesuffix("-v5")
        for name in envpool.list_all_envs()
        if envpool.registration.registry.specs[name][0] == "envpool.atari"
    }
    assert pattern == of_envpool
    assert set(atari.MINIMAL_ACTIONS) == set(roms.get_all_rom_ids()) - NOT_FOR_ONE_PLAYER
    names = level_names()
    assert len(names) == len(set(names))
    assert len([name for name in names if name.startswith("atari_")]) == len(of_envpool)


ODD_GAMES = ("backgammon", "freeway", "lost_luggage", "ms_pacman", "pong", "skiing", "surround")


@pytest.mark.parametrize(
    "games",
    [ODD_GAMES, pytest.param(tuple(atari.MINIMAL_ACTIONS), marks=pytest.mark.slow, id="all")],
)
def test_action_tables_are_the_emulators(games: tuple[str, ...]) -> None:
    """Action counts and the opening action's index are what the emulator says."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    for game in games:
        emulator = ale_py.ALEInterface()
        emulator.loadROM(str(roms.get_rom_path(game)))
        minimal, full = emulator.getMinimalActionSet(), emulator.getLegalActionSet()
        assert len(minimal) == atari.MINIMAL_ACTIONS[game], game
        assert len(full) == atari.atari_spec(game, "machado2018", 4).actions.num_logits, game
        fire = ale_py.Action.FIRE if ale_py.Action.FIRE in minimal else ale_py.Action.NOOP
        assert minimal[atari.opening_action(game, "impala2018")] == fire, game
        assert full[atari.opening_action(game, "machado2018")] == ale_py.Action.NOOP, game


@pytest.mark.parametrize(
    "level_name",
    [
        *("atari_space_invaders", "atari_up_n_down", "atari_qbert", "atari_tic_tac_toe_3d"),
        *("atari_spaceinvaders", "atari_mspacman", "atari_montezuma"),
        *("catch", "cartpole", "memory"),
        *("doom_benchmark", "doom_battle2", "doom_my_way_home"),
        *("dmlab30", "explore_goal_locations_small", "contributed/dmlab30/rooms_watermaze"),
        *("psychlab_visual_search", "tests/empty_room_test", "dmlab:whatever"),
        *("gym:CartPole-v1", "gym:ALE/Pong-v5", "my_package.module:MyEnv", "catch,memory"),
    ],
)
def test_level_can_be_played(level_name: str) -> None:
    """Our names and the ancestor's spellings pass."""
    check_level(level_name)


@pytest.mark.parametrize(
    ("level_name", "says"),
    [
        ("atari_brekout", "did you mean atari_breakout?"),
        ("atari_q_bert", "did you mean atari_qbert"),
        ("Breakout-v5", "did you mean atari_breakout"),
        ("PongNoFrameskip-v4", "did you mean atari_pong"),
        ("space_invaders", "atari_space_invaders"),
        ("cart_pole", "did you mean cartpole?"),
        ("zzz", "choose cartpole, catch, memory, atari_<game>, doom_<scenario>, dmlab:<level>"),
        ("", "gym:<id> or your own module:callable"),
        ("atari_", "atari_<game>"),
        ("doom_bencmark", "doom_benchmark"),
        ("catch,atari_brekout", "atari_breakout"),
        ("dmlab_30", "did you mean dmlab30?"),
    ],
)
def test_other_levels_are_refused_in_one_line(level_name: str, says: str) -> None:
    """The message repeats the name, is one line, and says what would do or what is missing."""
    with pytest.raises(UsageError) as caught:
        check_level(level_name)
    message = str(caught.value)
    assert says in message and repr(level_name.split(",")[-1]) in message and "\n" not in message


def test_specs() -> None:
    """Observation, number of actions and repeats per level and protocol."""
    frames = ArraySpec((4, 84, 84), "uint8")
    assert env_spec(config("atari_breakout")) == EnvSpec(frames, Discrete(4), 4)
    assert env_spec(config("atari_mspacman", num_action_repeats=2)) == EnvSpec(
        frames, Discrete(9), 2
    )
    assert env_spec(config("atari_pong", atari_protocol="machado2018")).actions.num_logits == 18
    assert env_spec(config("atari_skiing", atari_protocol="machado2018")).actions.num_logits == 9
    catch = EnvSpec(ArraySpec((10, 5), "float32"), Discrete(3), 1)
    assert env_spec(config("catch", num_action_repeats=1)) == catch


def test_levels_that_are_learnt_together_must_be_alike() -> None:
    """A list's levels have one spec; where they differ, one line says in what."""
    both = config("atari_pong,atari_qbert")
    assert levels_of(both.level_name) == ("atari_pong", "atari_qbert")
    assert env_spec(both) == env_spec(config("atari_pong"))
    with pytest.raises(UsageError) as caught:
        env_spec(config("atari_pong,atari_breakout"))
    message = str(caught.value)
    assert "atari_pong and atari_breakout cannot be learnt together: their actions" in message
    assert "\n" not in message


def test_dmlab30_is_thirty_levels() -> None:
    """In the suite's order, each once."""
    levels = levels_of("dmlab30")
    assert len(set(levels)) == 30
    assert levels[0] == "rooms_collect_good_objects_train"


def test_no_frames_to_repeat() -> None:
    """Action repeats other than 1 are refused where a step is a frame."""
    with pytest.raises(UsageError, match="num_action_repeats=4 must be 1: catch has no frames"):
        env_spec(config("catch"))


@pytest.mark.parametrize(
    ("flags", "module", "says"),
    [
        ({"level_name": "atari_pong"}, "envpool", "pip install -e '.[atari]'"),
        (
            {"level_name": "atari_pong", "atari_backend": "ale"},
            "ale_py.vector_env",
            "pip install -e '.[ale]'",
        ),
        (
            {"level_name": "catch", "num_action_repeats": 1},
            "envpool",
            "pip install -e '.[atari]'",
        ),
    ],
)
def test_missing_package(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, object], module: str, says: str
) -> None:
    """Where the engine's package is missing, one line says how to get it."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError) as caught:
        make_group(
            Config(**flags),  # type: ignore[arg-type]
            level_name=str(flags.get("level_name", "atari_breakout")),
            num_envs=1,
            first_env_index=0,
            seed=1,
        )
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_env_seeds() -> None:
    """Seeds depend on the run's seed and the index alone, and neighbouring runs share none."""
    assert env_seeds(1, 0, 8) == env_seeds(1, 0, 4) + env_seeds(1, 4, 4)
    assert len({*env_seeds(1, 0, 100), *env_seeds(2, 0, 100), *env_seeds(3, 0, 100)}) == 300
    assert all(0 <= seed < 2**31 for seed in env_seeds(2**31 - 1, 1000, 100))


IMPORTS = """
import sys
from asyncagent.config import Config
from asyncagent.envs import check_level, env_spec, make_group
from asyncagent.errors import UsageError
check_level("atari_pong")
env_spec(Config())
try:
    check_level("atari_ping")
except UsageError as error:
    assert "atari_pong" in str(error)
memory = Config(level_name="memory", num_action_repeats=1)
make_group(memory, level_name="memory", num_envs=1, first_env_index=0, seed=1)
engines = {"envpool", "ale_py", "gymnasium", "cv2"}
assert not engines & set(sys.modules), engines & set(sys.modules)
breakout = "atari_breakout"
make_group(Config(), level_name=breakout, num_envs=1, first_env_index=0, seed=1)
assert "envpool" in sys.modules and "ale_py" not in sys.modules
make_group(Config(atari_backend="ale"), level_name=breakout, num_envs=1, first_env_index=0, seed=1)
assert "ale_py" in sys.modules
assert "torch" not in sys.modules
"""


def test_nothing_heavy_is_imported_early() -> None:
    """Checking names and specs imports no engine, a group its own engine only, nothing torch."""
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, timeout=120)


@pytest.mark.parametrize("level_name", ["rooms_env:Env", "atari_mine:Env", "doom_mine:make"])
def test_own_modules_may_have_any_name(level_name: str) -> None:
    """What has the form module:callable is the user's, whatever the module is called."""
    check_level(level_name)
    assert family_of(level_name) == "gym"
