"""Gymnasium's environments and the user's own, as ``Env``s."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from asyncagent.envs.base import Env, Outcome, import_engine
from asyncagent.envs.gym import GymEnv, check, make_env, recipe
from asyncagent.envs.gym_spaces import actions, observations
from asyncagent.envs.instructions import SPEC as SENTENCE
from asyncagent.envs.instructions import tokenise
from asyncagent.envs.subproc import WorkerGroup, probe_spec
from asyncagent.errors import UsageError
from asyncagent.structs import (
    ActionArray,
    ActionSpace,
    ArraySpec,
    Box,
    Discrete,
    MultiDiscrete,
    map_nest,
)
from tests import my_envs

MINE = "tests.my_envs:"


def make(level_name: str, seed: int = 1, action_repeats: int = 1) -> Env:
    return make_env(seed=seed, level_name=level_name, action_repeats=action_repeats)


def sample(space: ActionSpace, rng: np.random.Generator) -> ActionArray:
    if isinstance(space, Box):
        return rng.normal(0, 2, space.num_dims).astype(np.float32)
    sizes = space.num_actions if isinstance(space, Discrete) else np.array(space.sizes)
    return np.asarray(rng.integers(0, sizes), np.int64)


def play(env: Env, steps: int, seed: int = 0) -> Iterator[tuple[dict[str, Any], float]]:
    """Observations as dicts, and rewards, of random play over episodes."""
    rng = np.random.default_rng(seed)
    ended = True
    for _ in range(steps):
        if ended:
            seen, reward, ended = env.reset(), 0.0, False
        else:
            seen, reward, terminated, truncated, _ = env.step(sample(env.spec.actions, rng))
            assert not (terminated and truncated)
            ended = terminated or truncated
        yield seen if isinstance(seen, dict) else {"": seen}, reward


class Scripted(gymnasium.Env[Any, Any]):
    """Answers ``step`` from a list, and writes down what it was asked."""

    def __init__(
        self,
        answers: list[Any],
        observation_space: spaces.Space[Any] | None = None,
        action_space: spaces.Space[Any] | None = None,
        opening: Any = 0.0,
    ) -> None:
        self.answers = answers
        self.opening = opening
        self.tape: list[Any] = []
        one = spaces.Box(-9.0, 9.0, ())
        self.observation_space = one if observation_space is None else observation_space
        self.action_space = spaces.Discrete(3, start=4) if action_space is None else action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.tape.append(("reset", seed))
        return self.opening, {}

    def step(self, action: Any) -> Any:
        self.tape.append(("step", action))
        return self.answers.pop(0)

    def close(self) -> None:
        self.tape.append("close")


ENVIRONMENTS = [
    ("gym:CartPole-v1", {"": ((4,), "float32")}, Discrete(2)),
    ("gym:Pendulum-v1", {"": ((3,), "float32")}, Box(1)),
    ("gym:MountainCarContinuous-v0", {"": ((2,), "float32")}, Box(1)),
    ("gym:Taxi-v4", {"": ((500,), "float32")}, Discrete(6)),
    ("gym:FrozenLake-v1", {"": ((16,), "float32")}, Discrete(4)),
    (
        "gym:Blackjack-v1",
        {"0": ((32,), "float32"), "1": ((11,), "float32"), "2": ((2,), "float32")},
        Discrete(2),
    ),
    ("gym:ALE/Breakout-v5", {"": ((210, 160, 3), "uint8")}, Discrete(4)),
    ("gym:BreakoutNoFrameskip-v4", {"": ((210, 160, 3), "uint8")}, Discrete(4)),
    (MINE + "Switches", {"": ((9,), "float32")}, MultiDiscrete((3, 2, 4))),
    (
        MINE + "TwoSenses",
        {"order": ((2,), "float32"), "picture": ((16, 16, 1), "uint8")},
        Discrete(3),
    ),
]


@pytest.mark.parametrize("level, arrays, action_space", ENVIRONMENTS)
def test_environments_show_what_their_spec_says(
    level: str, arrays: dict[str, tuple[tuple[int, ...], str]], action_space: ActionSpace
) -> None:
    """Random play over several episodes brings finite arrays of the shapes and dtypes in spec."""
    env = make(level)
    assert env.spec.actions == action_space
    spec = env.spec.observation if isinstance(env.spec.observation, dict) else None
    assert {
        key: (leaf.shape, leaf.dtype) for key, leaf in (spec or {"": env.spec.observation}).items()
    } == arrays
    assert (spec is None) == (list(arrays) == [""])
    for seen, reward in play(env, 300):
        assert {key: (array.shape, str(array.dtype)) for key, array in seen.items()} == arrays
        assert all(np.isfinite(array).all() for array in seen.values())
        assert type(reward) is float and np.isfinite(reward)
    env.close()


@pytest.mark.parametrize("level", ["gym:CartPole-v1", MINE + "TwoSenses"])
def test_seed_determines_all_episodes(level: str) -> None:
    """Equal seeds give equal runs over episode ends; other seeds, and later episodes, differ."""
    runs = [
        [np.concatenate([array.ravel() for array in seen.values()]) for seen, _ in play(env, 100)]
        for env in (make(level, seed=5), make(level, seed=5), make(level, seed=6))
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (np.array(runs[0]) != np.array(runs[2])).any()
    env = make(level, seed=5)
    openings = [env.reset() for _ in range(8)]
    assert (
        len(
            {
                json.dumps(opening, default=lambda array: array.tolist())
                for opening in (
                    opening if isinstance(opening, dict) else {"": opening} for opening in openings
                )
            }
        )
        > 4
    )


def test_only_the_first_reset_is_seeded() -> None:
    """The environment hears of the seed once, of actions in its own numbers, and of the end."""
    scripted = Scripted([(1.0, 0.5, True, False, {}), (2.0, 0, False, False, {})])
    env = GymEnv(scripted, seed=7, action_repeats=1)
    env.reset()
    assert env.step(np.array(2)).terminated
    env.reset()
    env.step(np.array(0))
    env.close()
    assert scripted.tape == [
        ("reset", 7),
        ("step", 6),
        ("reset", None),
        ("step", 4),
        "close",
    ]


def test_repeats_sum_rewards() -> None:
    """An action is repeated, rewards are summed, the last observation is shown."""
    answers: list[Any] = [(float(i), 10.0**i, False, False, {}) for i in range(6)]
    env = GymEnv(Scripted(answers), seed=0, action_repeats=3)
    env.reset()
    assert env.spec.action_repeats == 3
    outcomes = [env.step(np.array(0)) for _ in range(2)]
    assert [outcome.reward for outcome in outcomes] == [111.0, 111000.0]
    assert [outcome.observation.tolist() for outcome in outcomes] == [[2.0], [5.0]]


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_repeats_stop_at_an_end(end: str) -> None:
    """Within repeats nothing is stepped beyond an episode's end, whose observation is shown."""
    flags = (end == "terminated", end == "truncated")
    scripted = Scripted([(1.0, 1.0, False, False, {}), (2.0, 1.0, *flags, {})])
    env = GymEnv(scripted, seed=0, action_repeats=4)
    env.reset()
    outcome = env.step(np.array(0))
    assert outcome.reward == 2.0 and outcome.observation.tolist() == [2.0]
    assert (outcome.terminated, outcome.truncated) == flags
    assert len(scripted.tape) == 3


def test_terminated_and_truncated_at_once_is_terminated() -> None:
    """An end by the rules in the very step of the time limit is no truncation."""
    env = GymEnv(Scripted([(0.0, 0.0, np.True_, np.True_, {})]), seed=0, action_repeats=1)
    env.reset()
    outcome = env.step(np.array(0))
    assert outcome.terminated is True and outcome.truncated is False


def test_time_limit_is_a_truncation() -> None:
    """Pendulum's 200 steps end truncated, with an observation of their own."""
    env = make("gym:Pendulum-v1", action_repeats=3)
    before = env.reset()
    for step in range(67):
        outcome = env.step(np.zeros(1, np.float32))
        assert (outcome.observation != before).any()
        before = outcome.observation
        assert outcome.truncated == (step == 66) and not outcome.terminated


LOW, HIGH = np.array([[0.1, -np.inf, -np.inf, 2], [0.7, 1, np.inf, np.inf]], np.float32)
ACTION_SPACES: list[tuple[spaces.Space[Any], ActionSpace]] = [
    (spaces.Discrete(5), Discrete(5)),
    (spaces.Discrete(3, start=-1), Discrete(3)),
    (spaces.MultiDiscrete([3, 2]), MultiDiscrete((3, 2))),
    (spaces.MultiDiscrete([3, 2], dtype=np.uint8), MultiDiscrete((3, 2))),
    (spaces.MultiDiscrete(np.array([[3, 2], [4, 5]])), MultiDiscrete((3, 2, 4, 5))),
    (spaces.MultiDiscrete([3, 2], start=[1, -7]), MultiDiscrete((3, 2))),
    (spaces.MultiBinary(3), MultiDiscrete((2, 2, 2))),
    (spaces.MultiBinary([2, 2]), MultiDiscrete((2, 2, 2, 2))),
    (spaces.Tuple([spaces.Discrete(3), spaces.Discrete(2, start=1)]), MultiDiscrete((3, 2))),
    (
        spaces.Dict(b=spaces.MultiBinary(2), a=spaces.Tuple([spaces.Discrete(4)])),
        MultiDiscrete((2, 2, 4)),
    ),
    (spaces.Box(-2.0, 2.0, (2, 3)), Box(6)),
    (spaces.Box(-2.0, 6.0, (), np.float64), Box(1)),
    (spaces.Box(LOW, HIGH), Box(4, bounded=False)),
]


@pytest.mark.parametrize("space, expected", ACTION_SPACES, ids=str)
def test_actions_fit_their_space(space: spaces.Space[Any], expected: ActionSpace) -> None:
    """Whatever a policy chooses lies in the environment's own space, in its own types."""
    ours, to_env = actions(space)
    assert ours == expected
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert space.contains(to_env(sample(ours, rng)))


def test_every_choice_is_reachable() -> None:
    """Each action of a policy is another action of the environment, and none is left out."""
    space = spaces.Tuple([spaces.Discrete(3, start=2), spaces.MultiBinary(2)])
    ours, to_env = actions(space)
    numbers = [np.array(index, np.int64) for index in np.ndindex(3, 2, 2)]
    assert ours == MultiDiscrete((3, 2, 2))
    assert all(isinstance(to_env(one), tuple) for one in numbers)
    assert [(int(a), b.tolist()) for a, b in map(to_env, numbers)] == [
        (2 + index[0], list(index[1:])) for index in np.ndindex(3, 2, 2)
    ]


def test_box_actions_are_scaled_and_clipped() -> None:
    """-1 and 1 are finite bounds; half-open and open dimensions are as they are; all is clipped."""
    inf = np.inf
    low, high = np.array([[0, -inf, 2, -inf], [10, 1, inf, inf]], np.float32)
    space = spaces.Box(low, high)
    _, to_env = actions(space)
    for mine, own in (
        ([-1, -5, 2, -5], [0, -5, 2, -5]),
        ([1, 5, 5, 5], [10, 1, 5, 5]),
        ([0.5, 0, 0, 0], [7.5, 0, 2, 0]),
        ([-3, 1, -2, 9], [0, 1, 2, 9]),
        ([3, 0, 3, 0], [10, 0, 3, 0]),
    ):
        action = to_env(np.array(mine, np.float32))
        assert action.dtype == np.float32
        np.testing.assert_allclose(action, own)


def test_actions_are_the_environments_to_keep() -> None:
    """An environment that writes to its action spoils neither the policy's nor its repetition."""
    for space in (
        spaces.Box(-1.0, 1.0, (2,)),
        spaces.Box(-np.inf, np.inf, (2,)),
        spaces.MultiDiscrete([2, 2]),
    ):
        ours, to_env = actions(space)
        action = sample(ours, np.random.default_rng(0))
        before = action.copy()
        to_env(action)[...] = 1
        np.testing.assert_array_equal(action, before)


OBSERVATIONS: list[tuple[spaces.Space[Any], Any, Any]] = [
    (spaces.Discrete(3, start=5), 6, [0, 1, 0]),
    (spaces.Discrete(2), True, [0, 1]),
    (spaces.MultiDiscrete([2, 3], start=[0, 1]), np.array([1, 3]), [0, 1, 0, 0, 1]),
    (spaces.MultiDiscrete([2, 3], dtype=np.uint8), np.array([0, 2], np.uint8), [1, 0, 0, 0, 1]),
    (spaces.MultiBinary(3), np.array([1, 0, 1], np.int8), [1, 0, 1]),
    (spaces.Box(0, 9, (2,), np.int64), np.array([3, 9]), [3, 9]),
    (spaces.Box(0, 1, (1, 2, 1), np.float64), np.full((1, 2, 1), 0.25), [[[0.25], [0.25]]]),
    (spaces.Box(-1.0, 1.0, ()), 0.5, [0.5]),
    (spaces.Box(0, 255, (2,), np.uint8), np.array([3, 255], np.uint8), [3, 255]),
    (spaces.Box(0, 7, (1, 2, 1), np.uint8), np.full((1, 2, 1), 7, np.uint8), [[[7], [7]]]),
]


@pytest.mark.parametrize("space, seen, expected", OBSERVATIONS, ids=str)
def test_observations_become_float32(space: spaces.Space[Any], seen: Any, expected: Any) -> None:
    """Whatever is no picture becomes the float32 array worked out by hand."""
    spec, from_env = observations(space)
    wanted = np.array(expected, np.float32)
    assert spec == ArraySpec(wanted.shape, "float32")
    array = from_env(seen)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize("shape", [(4, 6, 3), (3, 4, 6)])
def test_pictures_keep_their_layout(shape: tuple[int, ...]) -> None:
    """A picture of bytes is shown as it is, channels first or last."""
    spec, from_env = observations(spaces.Box(0, 255, shape, np.uint8))
    picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert spec == ArraySpec(shape, "uint8")
    np.testing.assert_array_equal(from_env(picture), picture)


def test_grey_pictures_get_a_channel() -> None:
    """A picture [H, W] becomes [1, H, W]."""
    spec, from_env = observations(spaces.Box(0, 255, (4, 6), np.uint8))
    picture = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert spec == ArraySpec((1, 4, 6), "uint8")
    np.testing.assert_array_equal(from_env(picture), picture[np.newaxis])


def test_nested_observations_are_flattened() -> None:
    """Dicts and tuples inside each other become one dict with keys joined by a slash."""
    space = spaces.Dict(
        eye=spaces.Box(0, 255, (8, 8, 3), np.uint8),
        body=spaces.Dict(legs=spaces.Tuple([spaces.Discrete(2), spaces.Box(-1.0, 1.0, (3,))])),
        order=spaces.Text(80),
    )
    spec, from_env = observations(space)
    assert spec == {
        "body/legs/0": ArraySpec((2,), "float32"),
        "body/legs/1": ArraySpec((3,), "float32"),
        "eye": ArraySpec((8, 8, 3), "uint8"),
        "order": SENTENCE,
    }
    eye = np.ones((8, 8, 3), np.uint8)
    legs = (1, np.array([0.1, 0.2, 0.3]))
    arrays = from_env({"order": "go there", "eye": eye, "body": {"legs": legs}})
    assert arrays.keys() == spec.keys()
    np.testing.assert_array_equal(arrays["body/legs/0"], [0, 1])
    np.testing.assert_array_equal(arrays["body/legs/1"], np.array(legs[1], np.float32))
    np.testing.assert_array_equal(arrays["eye"], eye)
    np.testing.assert_array_equal(arrays["order"], tokenise("go there"))


UNSUPPORTED = [
    (
        spaces.Discrete(2),
        spaces.Box(0, 9, (2,), np.int32),
        r"action space Box\(0, 9, \(2,\), int32\)",
    ),
    (
        spaces.Discrete(2),
        spaces.Tuple([spaces.Discrete(2), spaces.Box(0.0, 1.0, (1,))]),
        "action space Box",
    ),
    (spaces.Discrete(2), spaces.Text(4), "action space Text"),
    (spaces.Discrete(2), spaces.Tuple([]), "action space Tuple"),
    (spaces.Sequence(spaces.Discrete(2)), spaces.Discrete(2), "observation space Sequence"),
    (
        spaces.Dict(a=spaces.Tuple([spaces.Graph(spaces.Box(0, 1, (2,)), None)])),
        spaces.Discrete(2),
        "observation space 'a/0' Graph",
    ),
    (spaces.Box(0, 255, (4, 8, 8, 3), np.uint8), spaces.Discrete(2), "observation space Box"),
    (spaces.Dict({}), spaces.Discrete(2), "observation space Dict"),
    (
        spaces.Dict({"a/b": spaces.Discrete(2), "a": spaces.Dict(b=spaces.Discrete(2))}),
        spaces.Discrete(2),
        "'a/b'",
    ),
]


@pytest.mark.parametrize("seen, acted, message", UNSUPPORTED, ids=str)
def test_unsupported_spaces_are_named(
    seen: spaces.Space[Any], acted: spaces.Space[Any], message: str
) -> None:
    """A space that has no form here is a usage error of one line that says which and where."""
    with pytest.raises(UsageError, match=message) as caught:
        GymEnv(Scripted([], seen, acted), seed=0, action_repeats=1)
    assert "\n" not in str(caught.value)


BROKEN_ANSWERS: list[tuple[Any, str]] = [
    ((0.0, np.nan, False, False, {}), "reward must be a finite number, not .*nan"),
    ((0.0, np.inf, False, False, {}), "reward"),
    ((0.0, 1e39, False, False, {}), "reward"),
    ((0.0, None, False, False, {}), "reward must be a finite number, not None"),
    ((0.0, np.zeros(2), False, False, {}), "reward"),
    ((np.nan, 0.0, False, False, {}), "observation: .*finite"),
    ((None, 0.0, False, False, {}), "observation"),
    (("word", 0.0, False, False, {}), "observation: ValueError"),
    ((0.0, 0.0, False, {}), "step must return .*, not tuple of 4"),
    (None, "step must return .*, not NoneType"),
]


@pytest.mark.parametrize("answer, message", BROKEN_ANSWERS, ids=str)
def test_broken_answers_raise(answer: Any, message: str) -> None:
    """What is no finite reward, no array of its space or no answer at all loses the environment."""
    env = GymEnv(Scripted([answer]), seed=0, action_repeats=1)
    env.reset()
    with pytest.raises(ValueError, match=message):
        env.step(np.array(0))


@pytest.mark.parametrize(
    "space, seen",
    [
        (spaces.Discrete(3), 3),
        (spaces.Discrete(3, start=1), 0),
        (spaces.Discrete(3), 1.0),
        (spaces.MultiDiscrete([3, 3]), np.array([1])),
        (spaces.Box(0, 255, (4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.float32)),
        (spaces.Dict(a=spaces.Discrete(2)), {"b": 1}),
        (spaces.Tuple([spaces.Discrete(2)]), ()),
        (spaces.Text(4), 5),
    ],
    ids=str,
)
def test_observations_outside_their_space_raise(space: spaces.Space[Any], seen: Any) -> None:
    """No observation is bent to fit: numbers out of range and other kinds are errors."""
    env = GymEnv(Scripted([], space, opening=seen), seed=0, action_repeats=1)
    with pytest.raises(ValueError, match="observation"):
        env.reset()


def test_old_style_reset_raises() -> None:
    """An environment whose reset returns no info, as in the old gym, is told so."""

    class Old(Scripted):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            return np.zeros(())

    with pytest.raises(ValueError, match=r"reset must return \(observation, info\), not ndarray"):
        GymEnv(Old([]), seed=0, action_repeats=1).reset()


def test_own_env_is_taken_as_it_is() -> None:
    """A callable may give asyncagent's own Env, if its action repeats are those asked for."""
    assert isinstance(make(MINE + "Own", action_repeats=2), my_envs.Own)
    with pytest.raises(UsageError, match="give --num_action_repeats=2, not 4"):
        make(MINE + "Own", action_repeats=4)


def test_callable_gets_the_seed_it_asks_for() -> None:
    """A callable with a parameter named seed is called with it."""
    env = make(MINE + "Seeded", seed=11)
    assert isinstance(env, GymEnv)
    assert env._env.made_with == 11


@pytest.mark.parametrize(
    "level, message",
    [
        ("gym:", "lacks the id"),
        ("gym:CartPol-v1", r"did you mean gym:CartPole-v1"),
        ("gym:cartpole-v1", r"did you mean gym:CartPole-v1"),
        ("gym:tests.my_envs:Cartpole-v1", r"did you mean gym:tests.my_envs:CartPole-v1"),
        ("gym:CartPole-v99", r"`v0`, `v1`"),
        ("gym:ale/pong-v5", r"did you mean gym:ALE/Pong-v5"),
        ("gym:Qzxqzxqzxqzx-v0", r"gym:<module>:<id> if"),
        ("gym:not an id", "Malformed"),
        ("gym:no_such_module:A-v0", "No module named 'no_such_module'"),
        ("gym:LunarLander-v2", "use `LunarLander-v3`"),
        ("my_env:", "must be module:callable"),
        ("my env:A", "must be module:callable"),
        ("no_such_module:A", "cannot be imported from /.*: ModuleNotFoundError"),
        (MINE + "Nobody", "has no attribute 'Nobody'"),
        (MINE + "NUMBER", "NUMBER is no callable but int"),
        (MINE + "Raises", r"calling it raised KeyError: 'no such\\nfile' \(my_envs.py:\d+\)"),
        (MINE + "leaves", r"calling it raised SystemExit: 3 \(my_envs.py:\d+\)"),
        (MINE + "nothing", "calling it raised TypeError: .*'size'"),
        (MINE + "other", "gave .* neither a gymnasium.Env nor"),
        (MINE + "Endless", r"observation space 'log' Sequence\(.*\) is not supported: only Box"),
    ],
)
def test_bad_levels_are_one_line(level: str, message: str) -> None:
    """Whatever keeps an environment from being made is one line that begins with the level."""
    with pytest.raises(UsageError, match=message) as caught:
        make(level)
    assert str(caught.value).startswith(f"level_name={level!r}")
    assert "\n" not in str(caught.value)


def test_missing_dependency_names_its_pip_command() -> None:
    """An environment whose engine is not installed says what gymnasium says: what to install."""
    for package, level in (("Box2D", "gym:LunarLander-v3"), ("mujoco", "gym:HalfCheetah-v5")):
        if importlib.util.find_spec(package) is None:
            with pytest.raises(UsageError, match=r"pip install .*gymnasium\["):
                make(level)


def test_missing_gymnasium_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gymnasium, or Atari without ale-py, the message is the command that installs it."""
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[ale\]'"):
        make("gym:ALE/Pong-v5")
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[gym\]'"):
        make("gym:CartPole-v1")


def test_modules_of_the_current_folder_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's module and an id it registers are imported from where the command is given."""
    (tmp_path / "boats.py").write_text(
        "import gymnasium\nfrom gymnasium.envs.classic_control import CartPoleEnv as Boat\n"
        "gymnasium.register('Boat-v3', Boat, max_episode_steps=7)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    for level in ("boats:Boat", "gym:boats:Boat-v3"):
        assert make(level).spec.observation == ArraySpec((4,), "float32")


@pytest.mark.parametrize("level", ["gym:Pendulum-v1", MINE + "TwoSenses", MINE + "Switches"])
def test_rows_through_a_worker(level: str) -> None:
    """What environments show in a worker process is what the same seeds show in this one."""
    envs = [make(level, seed) for seed in (5, 6)]
    probed = probe_spec(recipe(level, 1), timeout_s=60.0)
    assert probed == envs[0].spec
    rng = np.random.default_rng(0)

    async def compare() -> None:
        group = WorkerGroup(
            recipe(level, 1), probed, level_name=level, seeds=[5, 6], name="env-0",
            timeout_s=60.0, max_failures=1,
        )  # fmt: skip
        row = await group.reset()
        outcomes = [Outcome(env.reset(), 0.0, False, False) for env in envs]
        for _ in range(250):
            for i, outcome in enumerate(outcomes):
                shown = map_nest(lambda leaf, i=i: leaf[i], row.observation)
                map_nest(np.testing.assert_array_equal, shown, outcome.observation)
                assert row.reward[i] == np.float32(outcome.reward)
                assert row.terminated[i] == outcome.terminated
                assert row.truncated[i] == outcome.truncated
            action = np.stack([sample(probed.actions, rng) for _ in envs])
            row = await group.step(action)
            outcomes = [
                Outcome(env.reset(), 0.0, False, False)
                if outcome.terminated or outcome.truncated
                else env.step(one)
                for env, outcome, one in zip(envs, outcomes, action, strict=True)
            ]
        await group.close()

    asyncio.run(compare())


@pytest.mark.parametrize("level", ["gym:CartPol-v1", MINE + "Raises"])
def test_bad_levels_are_one_line_through_a_worker(level: str) -> None:
    """What keeps a worker from making the environment is told as it is told here."""
    with pytest.raises(UsageError) as here:
        make(level)
    with pytest.raises(UsageError) as there:
        probe_spec(recipe(level, 1), timeout_s=60.0)
    assert str(there.value) == str(here.value)


def test_checking_imports_nothing() -> None:
    """A level's form is checked without importing what it names; a recipe is JSON."""
    for level in ("gym:CartPole-v1", "gym:ALE/Pong-v5", "no_such.module:Some.callable"):
        check(level)
        one = recipe(level, 4)
        options = json.loads(json.dumps(dict(one.options)))
        assert options == {"level_name": level, "action_repeats": 4}
    module, _, function = recipe("gym:CartPole-v1", 1).maker.partition(":")
    assert getattr(import_engine(module, ""), function) is make_env
    assert not re.search("no_such", " ".join(sys.modules))


def test_gymnasium_says_nothing(capfd: pytest.CaptureFixture[str], recwarn: Any) -> None:
    """Warnings about old ids do not clutter the worker's output, which is for failures."""
    for level in ("gym:CartPole-v0", "gym:CartPole"):
        make(level).close()
    out, err = capfd.readouterr()
    assert (out, err, [str(warning.message) for warning in recwarn]) == ("", "", [])
