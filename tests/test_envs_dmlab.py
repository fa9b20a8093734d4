"""The adapter of DeepMind Lab, against a stand-in as strict as the real module, and against that.

With ``deepmind_lab`` installed, the tests that ``lab`` is a part of run with both.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from asyncagent.config import Config, resolve
from asyncagent.envs import dmlab, dmlab30, make_group
from asyncagent.envs.base import Env, EnvGroup, Outcome
from asyncagent.envs.instructions import MAX_WORDS, tokenise
from asyncagent.errors import UsageError
from asyncagent.structs import ArraySpec, Discrete
from tests import fake_deepmind_lab

ROOT = Path(__file__).resolve().parent.parent
STAND_INS = f"{ROOT / 'tests' / 'stand_ins'}:{ROOT}"
IN_TIME = "rooms_collect_good_objects_train"
"""A level whose resets are quick and whose episodes last a minute."""
SPOKEN = "language_select_located_object"
COMPILED = "explore_goal_locations_small"
INSTALLED = importlib.util.find_spec("deepmind_lab") is not None


class Crash(BaseException):
    """Where the real module would have ended the process."""


@pytest.fixture(autouse=True)
def _no_deaths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def crash(how: str, status: int) -> NoReturn:
        raise Crash(f"{how} ({status})")

    monkeypatch.setattr(fake_deepmind_lab, "die", crash)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("TEST_TMPDIR", raising=False)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in is what ``import deepmind_lab`` gives."""
    monkeypatch.setitem(sys.modules, "deepmind_lab", fake_deepmind_lab)


@pytest.fixture(
    params=[
        "stand-in",
        pytest.param(
            "real",
            marks=[
                pytest.mark.dmlab,
                pytest.mark.skipif(not INSTALLED, reason="deepmind_lab is not installed"),
            ],
        ),
    ]
)
def lab(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which module is imported as ``deepmind_lab``: the stand-in, or the real one."""
    if request.param == "stand-in":
        monkeypatch.setitem(sys.modules, "deepmind_lab", fake_deepmind_lab)
    return str(request.param)


@pytest.fixture
def make() -> Iterator[Any]:
    """Makes environments as a worker does, and closes them after the test."""
    envs: list[Env] = []

    def make(level_name: str = IN_TIME, seed: int = 1, test: bool = False, **flags: Any) -> Env:
        config = resolve(level_name, level_cache="", **flags)
        recipe = dmlab.recipe(level_name, config, test=test)
        assert recipe.maker == "asyncagent.envs.dmlab:make_env"
        env = dmlab.make_env(seed=seed, **json.loads(json.dumps(recipe.options)))
        assert env.spec == dmlab.spec(config.width, config.height, config.num_action_repeats)
        envs.append(env)
        return env

    yield make
    for env in envs:
        env.close()


def in_new_process(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``program`` where ``import deepmind_lab`` gives the stand-in, which kills."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": STAND_INS} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def play(env: Env, max_steps: int = 5000) -> list[Outcome]:
    """Outcomes until the episode's end, of all nine actions in turn."""
    outcomes = []
    for step in range(max_steps):
        outcomes.append(env.step(np.int64(step % 9)))
        if outcomes[-1].terminated or outcomes[-1].truncated:
            return outcomes
    raise AssertionError(f"no end within {max_steps} steps")


def record_seeds(env: Any) -> list[int]:
    """The list to which every seed is added that reaches the engine from now on."""
    seeds: list[int] = []
    reset = env._lab.reset

    def recorded(seed: int) -> None:
        seeds.append(seed)
        reset(seed=seed)

    env._lab.reset = recorded
    return seeds


def test_spec() -> None:
    """Frames are height by width by colour, the instruction is a sentence, actions are nine."""
    spec = dmlab.spec(96, 72, 4)
    assert spec.observation["rgb"] == ArraySpec((72, 96, 3), "uint8")
    assert spec.observation["instruction"] == ArraySpec((MAX_WORDS,), "int32", num_tokens=1000)
    assert (spec.actions, spec.action_repeats) == (Discrete(9), 4)


@pytest.mark.parametrize(("width", "height"), [(96, 72), (64, 48)])
def test_observations_are_as_the_spec_says(lab: str, make: Any, width: int, height: int) -> None:
    """Every row's arrays have the spec's shapes and dtypes and are the row's own."""
    env = make(width=width, height=height)
    rows = [env.reset(), *(env.step(np.int64(i)).observation for i in range(9))]
    for row in rows:
        assert row.keys() == env.spec.observation.keys()
        for name, one in env.spec.observation.items():
            assert (row[name].shape, row[name].dtype.name) == (one.shape, one.dtype)
        assert not row["instruction"].any()
    assert len({row["rgb"].tobytes() for row in rows}) > 1
    assert not np.shares_memory(rows[0]["rgb"], rows[1]["rgb"])


def test_instructions_become_tokens(lab: str, make: Any) -> None:
    """A level with language shows its instruction's tokens in every row."""
    env = make(SPOKEN)
    rows = [env.reset(), env.step(np.int64(0)).observation]
    for row in rows:
        tokens = row["instruction"]
        num_words = int((tokens > 0).sum())
        assert num_words >= 4 and not tokens[num_words:].any()
    if lab == "stand-in":
        expected = tokenise("Pick the green object in the red room")
        assert rows[0]["instruction"].tolist() == expected.tolist()


def test_actions_are_the_ancestors(stand_in: None, make: Any) -> None:
    """Each action reaches the engine as its seven numbers, over all repeated frames."""
    env = make(num_action_repeats=4)
    env.reset()
    # The stand-in rewards look x 1 + up x 10 + strafe x 100 + forward x 1,000 + fire x 10,000.
    weighed = [1000, -1000, -100, 100, -20, 20, 980, 1020, 10_000]
    assert [env.step(np.int64(i)).reward for i in range(9)] == [4 * w for w in weighed]


@pytest.mark.parametrize("repeats", [1, 4, 7])
def test_episode_ends_without_a_frame(stand_in: None, make: Any, repeats: int) -> None:
    """The end row shows nothing, carries the last reward, and counts as an end by the rules."""
    env = make(num_action_repeats=repeats)
    for _ in range(2):
        env.reset()
        *steps, end = play(env)
        assert len(steps) + 1 == -(-fake_deepmind_lab.EPISODE_FRAMES // repeats)
        assert all(row.observation is not None for row in steps)
        assert not any(row.terminated or row.truncated for row in steps)
        assert (end.observation, end.terminated, end.truncated) == (None, True, False)
        assert end.reward != 0 and end.score is None


def test_whole_episodes(lab: str, make: Any) -> None:
    """Two episodes from opening to end, the second from another seed."""
    env = make()
    rows = []
    for _ in range(2):
        rows.append(env.reset()["rgb"])
        outcomes = play(env)
        assert outcomes[-1].observation is None and outcomes[-1].terminated
        assert all(np.isfinite(outcome.reward) for outcome in outcomes)
    assert (rows[0] != rows[1]).any()


def test_same_seed_same_episode(lab: str, make: Any) -> None:
    """Environments of one seed open their first episode alike, of another seed differently."""
    rows = [make(seed=seed).reset()["rgb"] for seed in (5, 5, 6)]
    assert (rows[0] == rows[1]).all() and (rows[0] != rows[2]).any()


def test_every_episode_has_a_seed_of_31_bits(stand_in: None, make: Any) -> None:
    """Seeds are Python ints, differ between episodes, and follow from the environment's own."""
    given: list[list[int]] = []
    for seed in (9, 9, 10):
        env = make(seed=seed)
        given.append(record_seeds(env))
        for _ in range(50):
            env.reset()
    assert given[0] == given[1] != given[2] and len(set(given[0])) == 50
    assert all(type(seed) is int and 0 <= seed < 2**31 for seed in given[0])
    assert max(given[0]) > 2**30


def test_close_puts_the_engine_out_of_reach(lab: str, make: Any) -> None:
    """Closing twice is harmless, and a later call is an error instead of a dead process."""
    env = make()
    env.reset()
    env.close()
    env.close()
    with pytest.raises(AttributeError):
        env.reset()
    with pytest.raises(AttributeError):
        env.step(np.int64(0))


def test_an_unused_environment_closes(lab: str, make: Any) -> None:
    """One that was never reset closes too."""
    make().close()


def test_unknown_level_is_told_in_one_line(lab: str, make: Any) -> None:
    """A level that DeepMind Lab has not is bad input, named in one line."""
    with pytest.raises(UsageError, match="'tests/no_such_level'") as failure:
        make("tests/no_such_level")
    assert "\n" not in str(failure.value) and len(str(failure.value)) < 600


def test_any_other_level_is_passed_on(lab: str, make: Any) -> None:
    """Names outside the suite go to DeepMind Lab as they are, or without the prefix."""
    for name in ("tests/empty_room_test", "dmlab:tests/empty_room_test"):
        assert make(name).reset()["rgb"].shape == (72, 96, 3)


def test_level_without_instr(stand_in: None, make: Any) -> None:
    """A level that does not offer INSTR shows an instruction of no words."""
    env = make("tests/no_instr_test")
    assert not env.reset()["instruction"].any()
    assert not env.step(np.int64(0)).observation["instruction"].any()


def test_held_out_level(lab: str, make: Any) -> None:
    """A test level cannot be trained on, which is told beforehand, and is played in test mode."""
    held_out = "rooms_exploit_deferred_effects_test"
    with pytest.raises(UsageError, match="train on 'rooms_exploit_deferred_effects_train'"):
        make(held_out)
    with pytest.raises(UsageError, match=held_out):
        dmlab.make_env(
            seed=1, level=dmlab.engine_level(held_out), width=96, height=72, action_repeats=4
        )
    for name in (held_out, "rooms_exploit_deferred_effects_train"):
        make(name, test=True).reset()


def test_test_mode_plays_the_test_level() -> None:
    """Test mode turns a training level into its test level; others stay as they are."""
    for level in dmlab30.LEVELS:
        config = resolve(level.train, dataset_path="/")
        tested = dmlab.recipe(level.train, config, test=True).options
        assert tested["level"] == f"contributed/dmlab30/{level.test}" and tested["test"] is True
        learnt = dmlab.recipe(level.train, config, test=False).options
        assert learnt["level"] == f"contributed/dmlab30/{level.train}" and learnt["test"] is False


def test_configuration_is_the_ancestors(
    stand_in: None, make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Sizes, data set, log level, and in test mode the two more, all as strings."""
    made: list[tuple[Any, ...]] = []

    class Recorded(fake_deepmind_lab.Lab):
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append((args, options))
            super().__init__(*args, **options)

    monkeypatch.setattr(fake_deepmind_lab, "Lab", Recorded)
    make(width=64, height=48, renderer="hardware", dataset_path=str(tmp_path))
    make(test=True)
    config = {"width": "64", "height": "48", "datasetPath": str(tmp_path), "logLevel": "WARN"}
    ((level, observations, given), options), (_, _, tested) = made[0], made[1][0]
    assert level == f"contributed/dmlab30/{IN_TIME}" and given == config
    assert observations == ["RGB_INTERLEAVED", "INSTR"]
    assert options == {"renderer": "hardware", "level_cache": None}
    assert tested["allowHoldOutLevels"] == "true" and tested["mixerSeed"] == "1611489005"


@pytest.mark.parametrize(
    "level_name",
    [
        "psychlab_arbitrary_visuomotor_mapping",
        "psychlab_continuous_recognition",
        "contributed/dmlab30/psychlab_continuous_recognition",
    ],
)
def test_missing_images_are_told_beforehand(level_name: str, tmp_path: Path) -> None:
    """The two levels that show photographs say so before anything starts."""
    with pytest.raises(UsageError, match=r"psychlab_.*--dataset_path"):
        dmlab.recipe(level_name, resolve(level_name), test=False)
    gone = str(tmp_path / "gone")
    with pytest.raises(UsageError, match=f"dataset_path='{gone}'"):
        dmlab.recipe(level_name, resolve(level_name, dataset_path=gone), test=False)
    dmlab.recipe(level_name, resolve(level_name, dataset_path=str(tmp_path)), test=False)


def test_a_map_that_does_not_compile(
    stand_in: None, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reset raises is raised: the environment is lost, not the run's configuration wrong."""
    monkeypatch.setenv("FAKE_DEEPMIND_LAB", json.dumps({COMPILED: {"fail_resets": True}}))
    with pytest.raises(RuntimeError, match="does not compile") as failure:
        make(COMPILED).reset()
    assert not isinstance(failure.value, UsageError)


def test_renderer_that_does_not_start(
    stand_in: None, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A constructor that refuses is bad input, with level and renderer in one line."""
    monkeypatch.setenv("FAKE_DEEPMIND_LAB", json.dumps({"*": {"refuse": True}}))
    with pytest.raises(UsageError, match=rf"{IN_TIME}' \(hardware\): Failed to connect"):
        make(renderer="hardware")


@pytest.mark.parametrize("check", [dmlab.check_installed, lambda: dmlab._import_module()])
def test_missing_module(monkeypatch: pytest.MonkeyPatch, check: Any) -> None:
    """Without the module one line says how to get it, and with which Python."""
    monkeypatch.setitem(sys.modules, "deepmind_lab", None)
    with pytest.raises(UsageError, match=r"wheel.*Python 3\.11") as failure:
        check()
    assert "\n" not in str(failure.value)


def test_installed_module_passes(stand_in: None) -> None:
    """With the module there is nothing to say."""
    dmlab.check_installed()


def test_broken_module(tmp_path: Path) -> None:
    """A module that is there and cannot be imported says why."""
    (tmp_path / "deepmind_lab.py").write_text("import imp_of_old\n")
    said = in_new_process(
        "from asyncagent.envs import dmlab\ndmlab.check_installed()\ndmlab._import_module()",
        PYTHONPATH=f"{tmp_path}:{ROOT}",
    )
    assert "UsageError: deepmind_lab cannot be imported (No module named 'imp_of_old')" in (
        said.stderr
    )


@pytest.mark.parametrize(("users", "seen"), [({}, "0"), ({"LP_NUM_THREADS": "3"}, "3")])
def test_rasteriser_threads(users: dict[str, str], seen: str) -> None:
    """LP_NUM_THREADS=0 stands in the environment before the import, unless the user set it."""
    said = in_new_process(
        "import os; os.environ.pop('LP_NUM_THREADS', None)\n"
        f"os.environ.update({users})\n"
        "from asyncagent.envs import dmlab\n"
        "print(dmlab._import_module().lp_num_threads)"
    )
    assert said.stdout.strip() == seen, said.stderr


def test_runfiles_path(
    stand_in: None, make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A build that does not find its files is told by an environment variable where they are."""
    monkeypatch.setattr(fake_deepmind_lab, "_runfiles", "by itself")
    make()
    assert fake_deepmind_lab.runfiles_path() == "by itself"
    monkeypatch.setenv(dmlab.RUNFILES, str(tmp_path))
    make()
    assert fake_deepmind_lab.runfiles_path() == str(tmp_path)


def test_asking_imports_nothing() -> None:
    """Names, specs, checks and recipes do without the module."""
    said = in_new_process(
        "import sys\n"
        "from asyncagent.config import resolve\n"
        "from asyncagent.envs import dmlab\n"
        "dmlab.check_installed(); dmlab.is_dmlab('lt_chasm'); dmlab.spec(96, 72, 4)\n"
        f"dmlab.recipe('{IN_TIME}', resolve('{IN_TIME}'), test=False)\n"
        "print('deepmind_lab' in sys.modules, 'torch' in sys.modules)"
    )
    assert said.stdout.strip() == "False False", said.stderr


def test_levels_are_compiled_once(lab: str, make: Any, tmp_path: Path) -> None:
    """What one environment compiled, another with the same seed takes from the cache."""
    options = dmlab.recipe(COMPILED, resolve(COMPILED, level_cache=str(tmp_path / "c")), test=False)
    envs = [dmlab.make_env(seed=3, **options.options) for _ in range(2)]
    rows = [env.reset()["rgb"] for env in envs]
    counts = [(c.hits, c.misses, c.writes) for env in envs if (c := env.level_cache) is not None]
    for env in envs:
        env.close()
    assert (rows[0] == rows[1]).all()
    assert len(list((tmp_path / "c").glob("*.level"))) == 1
    assert counts == [(0, 1, 1), (1, 0, 0)]


def test_a_broken_cache_costs_only_time(lab: str, tmp_path: Path) -> None:
    """Where the cache's folder cannot be, levels are compiled each time, and nothing dies."""
    (tmp_path / "file").write_text("")
    config = resolve(COMPILED, level_cache=str(tmp_path / "file" / "cache"))
    env = dmlab.make_env(seed=3, **dmlab.recipe(COMPILED, config, test=False).options)
    env.reset()
    env.step(np.int64(0))
    env.close()


def test_temporary_folders_do_not_pile_up(lab: str, make: Any, tmp_path: Path) -> None:
    """What a killed process left behind goes when the next one starts; what lives is left alone."""
    ours = tmp_path / f"asyncagent-{os.getuid()}"
    program = f"""
import os, signal, sys
from asyncagent.envs import dmlab
env = dmlab.make_env(seed=1, level="contributed/dmlab30/{IN_TIME}", width=96, height=72,
                     action_repeats=4)
env.reset()
print("up", flush=True)
if sys.stdin.readline():
    env.close()
else:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": STAND_INS if lab == "stand-in" else str(ROOT)}
    living = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert living.stdin is not None and living.stdout is not None
    while living.stdout.readline() != "up\n":
        assert living.poll() is None
    killed = subprocess.run(
        [sys.executable, "-c", program], stdin=subprocess.DEVNULL, env=environment, timeout=60
    )
    assert killed.returncode == -9
    owners = {path.name.split("-")[0] for path in ours.iterdir()}
    assert len(owners) == 2 and str(living.pid) in owners
    env = make()
    env.reset()
    owners = {path.name.split("-")[0] for path in ours.iterdir()}
    assert owners == {str(living.pid), str(os.getpid())}
    living.communicate("close\n", timeout=60)
    assert living.returncode == 0
    env.close()
    assert [path for path in ours.rglob("dmlab_temp_folder_*")] == []
    assert os.environ["TMPDIR"] == str(tmp_path)


def group_of(level_name: str, num_envs: int, **flags: Any) -> EnvGroup:
    """A group in a worker process, which imports the stand-in."""
    config = resolve(level_name, level_cache="", **flags)
    return make_group(config, level_name=level_name, num_envs=num_envs, first_env_index=0, seed=3)


@pytest.fixture
def stand_in_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in is what a worker imports."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "stand_ins")


def test_end_rows_in_a_worker(stand_in_worker: None) -> None:
    """In a group an end row repeats the frame before it, and the next row opens an episode."""

    async def run() -> None:
        group = group_of(SPOKEN, 2, num_action_repeats=10)
        try:
            shown = [await group.reset()]
            for _ in range(10):
                row = await group.step(np.array([0, 8]))
                shown.append(row._replace(observation=copy.deepcopy(row.observation)))
        finally:
            await group.close()
        assert [row.terminated.tolist() for row in shown] == [[False] * 2] * 9 + [
            [True] * 2, [False] * 2,
        ]  # fmt: skip
        assert [row.first.all() for row in shown] == [True] + [False] * 9 + [True]
        before, end, opening = shown[-3:]
        for name in ("rgb", "instruction"):
            assert (end.observation[name] == before.observation[name]).all()
        assert (opening.observation["rgb"] != end.observation["rgb"]).any()
        assert end.reward.tolist() == [10_000, 100_000] and not opening.reward.any()
        assert [e.episode_return for e in end.episodes] == [90_000, 900_000]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"die_at": 20}, "SIGABRT"),
        ({"exit_at": 20}, "exited with status 1"),
        ({"raise_at": 20}, "ValueError: Failed to advance"),
    ],
)
def test_deaths_in_a_worker(
    stand_in_worker: None, monkeypatch: pytest.MonkeyPatch, fault: dict[str, int], reason: str
) -> None:
    """A level that kills its process, or raises, is lost for a row and then opens an episode."""
    monkeypatch.setenv("FAKE_DEEPMIND_LAB", json.dumps({IN_TIME: fault}))

    async def run() -> None:
        group = group_of(IN_TIME, 1, num_action_repeats=10)
        try:
            await group.reset()
            assert not (await group.step(np.array([0]))).lost[0]
            row = await group.step(np.array([0]))
            assert row.lost[0] and reason in row.losses[0].reason
            row = await group.step(np.array([0]))
            assert row.first[0] and not row.lost[0]
        finally:
            await group.close()

    asyncio.run(run())


def test_slow_reset_holds_up_nobody(stand_in_worker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one level compiles for seconds with the interpreter locked, another's group plays."""
    monkeypatch.setenv("FAKE_DEEPMIND_LAB", json.dumps({COMPILED: {"reset_s": 2.0}}))

    async def run() -> None:
        slow, fast = group_of(COMPILED, 1), group_of(IN_TIME, 1)
        try:
            resetting = asyncio.create_task(slow.reset())
            await fast.reset()
            for _ in range(100):
                await fast.step(np.array([0]))
            assert not resetting.done()
            assert (await resetting).first.all()
        finally:
            await asyncio.gather(slow.close(), fast.close())

    asyncio.run(run())


def test_bad_level_in_a_worker(stand_in_worker: None) -> None:
    """A level that DeepMind Lab has not comes out of the group as bad input."""

    async def run() -> None:
        group = group_of("tests/no_such_level", 1)
        try:
            with pytest.raises(UsageError, match="tests/no_such_level"):
                await group.reset()
        finally:
            await group.close()

    asyncio.run(run())


def test_names() -> None:
    """The suite's levels, its other levels' beginnings, and whatever is prefixed."""
    ours = [*dmlab30.TRAIN_LEVELS, *dmlab30.TEST_LEVELS, "nav_maze_random_goal_01", "lt_chasm"]
    ours += ["contributed/psychlab/harlow", "tests/empty_room_test", "seekavoid_arena_01"]
    ours += ["dmlab:anything at all", "stairway_to_melon_01"]
    assert [name for name in ours if not dmlab.is_dmlab(name)] == []
    others = ["atari_pong", "doom_basic", "doom:my.cfg", "gym:CartPole-v1", "my.module:make"]
    others += ["catch", "memory", "contributed/", "", "dmlab", "explore_"]
    assert [name for name in others if dmlab.is_dmlab(name)] == []


def test_engine_names() -> None:
    """The suite's levels stand in a folder of theirs, all others are named as they are."""
    assert dmlab.engine_level("rooms_watermaze") == "contributed/dmlab30/rooms_watermaze"
    assert dmlab.engine_level("dmlab:rooms_watermaze") == "contributed/dmlab30/rooms_watermaze"
    for name in ("lt_chasm", "tests/empty_room_test", "contributed/dmlab30/rooms_watermaze"):
        assert dmlab.engine_level(name) == name
    assert dmlab.engine_level("dmlab:gym:odd") == "gym:odd"


def test_the_suite() -> None:
    """Thirty levels in the suite's order, two of which are tested on others."""
    assert len(dmlab30.LEVELS) == len(set(dmlab30.TRAIN_LEVELS)) == 30
    assert dmlab30.LEVELS[0] == (
        "rooms_collect_good_objects_train", "rooms_collect_good_objects_test", 10.0, 0.073,
    )  # fmt: skip
    assert dmlab30.TRAIN_LEVELS[-1] == "explore_object_rewards_many"
    others = [level.train for level in dmlab30.LEVELS if level.train != level.test]
    assert others == ["rooms_collect_good_objects_train", "rooms_exploit_deferred_effects_train"]
    for level in dmlab30.LEVELS:
        assert level.human > level.random
        assert dmlab30.testing_level(level.train) == dmlab30.testing_level(level.test) == level.test
        assert dmlab30.training_level(level.test) == level.train
        assert dmlab30.is_suite_level(level.train) and dmlab30.is_suite_level(level.test)
    assert not dmlab30.is_suite_level("lt_chasm") and not dmlab30.is_suite_level(dmlab30.NAME)


def test_paths_are_the_starting_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Folders given relative, or to the user's home, mean the same in every worker."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somebody")
    config = Config(level_name=IN_TIME, level_cache="~/cache", dataset_path="images")
    options = dmlab.recipe(IN_TIME, config, test=False).options
    assert options["level_cache"] == "/somebody/cache"
    assert options["dataset_path"] == str(tmp_path / "images")
    config = Config(level_name=IN_TIME, level_cache="")
    options = dmlab.recipe(IN_TIME, config, test=False).options
    assert (options["level_cache"], options["dataset_path"]) == ("", "")
