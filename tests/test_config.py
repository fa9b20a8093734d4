"""Configuration: bounds, presets, and what config.json gives back."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncagent.config import (
    MAX_ACTORS_PER_COLUMN,
    PRESETS,
    Config,
    preset_values,
    resolve,
    split_groups,
)
from asyncagent.errors import ConfigError, UsageError


def test_atari_preset_is_the_papers() -> None:
    """Flags left out of an Atari run take the paper's values."""
    config = resolve("atari_breakout")
    assert (config.unroll_length, config.batch_size) == (20, 32)
    assert (config.learning_rate, config.epsilon, config.decay) == (6e-4, 0.01, 0.99)
    assert (config.entropy_cost, config.baseline_cost, config.max_grad_norm) == (0.01, 0.5, 40.0)
    assert (config.optimizer, config.momentum, config.discounting) == ("rmsprop", 0.0, 0.99)
    assert (config.reward_clipping, config.atari_protocol) == ("abs_one", "impala2018")
    assert config.total_environment_frames == 200_000_000
    assert not config.bootstrap_truncated


@pytest.mark.parametrize(
    "flags",
    [
        {"num_actors": 0},
        {"num_actors": 10, "num_groups": 3},
        {"unroll_length": 0},
        {"batch_size": -1},
        {"discounting": 1.5},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"epsilon": float("inf")},
        {"momentum": 1.0},
        {"reward_clipping": "abs_two"},
        {"optimizer": "sgd"},
        {"seed": -1},
        {"net": "shalow"},
        {"report_interval_s": 0.0},
        {"logdir": ""},
    ],
)
def test_impossible_values_are_told_in_one_line(flags: dict[str, Any]) -> None:
    """The message names the flag and its value, and is a usage error."""
    with pytest.raises(ConfigError) as caught:
        resolve("atari_breakout", **flags)
    message = str(caught.value)
    assert "\n" not in message
    assert any(f"{name}={value!r}" in message for name, value in flags.items())
    assert isinstance(caught.value, UsageError)


@pytest.mark.parametrize("level_name", ["atari_pong", "catch", "cartpole", "memory"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("cores", [1, 2, 3, 16, 128])
def test_presets_hold_on_any_machine(level_name: str, preset: Any, cores: int) -> None:
    """Every preset is a possible configuration whatever the number of cores."""
    config = Config(**preset_values(level_name, preset, cores))
    assert config.num_actors >= config.num_groups >= 2


FAMILIES = {
    "atari": "atari_pong",
    "doom": "doom_basic",
    "dmlab": "rooms_watermaze",
    "gym": "gym:A-v0",
    "small": "catch",
}
"""A level of each."""


@given(
    st.integers(1, 400),
    st.integers(1, 100),
    st.sampled_from(sorted(FAMILIES)),
    st.sampled_from(PRESETS),
)
@example(4, 18, "atari", "paper")
@example(192, 1, "atari", "paper")
@example(4, 10, "atari", "workstation")
@example(4, 57, "gym", "paper")
@example(192, 1, "dmlab", "paper")
def test_presets_keep_their_own_limit_of_actors(
    cores: int, levels: int, family: str, preset: Any
) -> None:
    """Never so many per column of the batch that train would warn of it; every level is played."""
    values = preset_values(",".join([FAMILIES[family]] * levels), preset, cores)
    config = Config(**values)
    assert config.num_actors <= MAX_ACTORS_PER_COLUMN * config.batch_size
    assert config.num_groups % levels == 0
    assert config.group_size >= 1


@pytest.mark.parametrize("num_cores", [1, 2, 4, 8, 16, 24, 32, 48, 64])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_actors_of_one_level_on_usual_machines(family: str, preset: Any, num_cores: int) -> None:
    """What figures were published with: the limits for long lists and large machines are no part.

    Atari and ViZDoom fill the paper's batch of 32, DMLab has four actors per core, others few.
    """
    groups = max(4, num_cores)
    largest = {"atari": 64, "doom": 16}
    if family == "dmlab":
        groups, size = 4 * num_cores, 1
    elif family not in largest:
        groups, size = 2, 16
    elif preset == "paper":
        size = min(largest[family], 512 // groups)
    else:
        groups, size = 2 if num_cores <= 2 else 4, 16
    values = preset_values(FAMILIES[family], preset, num_cores)
    assert (values["num_groups"], values["num_actors"]) == (groups, groups * size)


@pytest.mark.parametrize("preset", PRESETS)
def test_json_round_trip(preset: Any) -> None:
    """config.json gives the configuration back."""
    config = resolve("atari_pong", preset, seed=7, use_lstm=True)
    assert Config.from_json(config.to_json(), "config.json") == config


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ('{"no_such_flag": 1}', "no_such_flag"),
        ('{"batch_size": "32"}', "batch_size='32' must be of type int"),
        ('{"batch_size": true}', "batch_size=True must be of type int"),
        ('{"use_lstm": 1}', "use_lstm=1 must be of type bool"),
        ('{"batch_size": 0}', "batch_size=0 must be >= 1"),
    ],
)
def test_bad_json_names_file_and_fault(text: str, what: str) -> None:
    """A damaged config.json is a usage error that says what is wrong with it."""
    with pytest.raises(ConfigError) as caught:
        Config.from_json(text, "x/config.json")
    assert what in str(caught.value)


def test_float_flags_accept_whole_numbers() -> None:
    """1 is a float to whoever edits config.json by hand."""
    assert Config.from_json('{"learning_rate": 1}', "x").learning_rate == 1


@given(st.integers(1, 5000), st.integers(1, 64))
def test_split_groups(num_actors: int, wanted: int) -> None:
    """Groups are equal, at most as many as wanted, and no larger count would do."""
    groups = split_groups("atari_pong", num_actors, wanted)
    assert num_actors % groups == 0
    assert 1 <= groups <= wanted
    assert not any(num_actors % n == 0 for n in range(groups + 1, min(wanted, num_actors) + 1))


def test_num_actors_alone_is_split_for_the_user() -> None:
    """--num_actors=6 needs no --num_groups beside it."""
    config = resolve("atari_pong", num_actors=7)
    assert config.num_groups in (1, 7)
    assert config.group_size * config.num_groups == 7


def test_every_flag_has_a_help_text() -> None:
    """A docstring follows every field, for --help."""
    import ast
    import inspect

    import asyncagent.config as module

    tree = ast.parse(inspect.getsource(module))
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config").body
    documented = {
        statement.target.id
        for statement, following in itertools.pairwise(body)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(following, ast.Expr)
    }
    assert documented == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize(
    ("level_name", "groups"), [("rooms_watermaze", 12), ("a_level,another", 12), ("catch", 2)]
)
def test_every_dmlab_environment_is_a_group_of_its_own(level_name: str, groups: int) -> None:
    """Its resets take up to half a minute; other levels share groups."""
    assert resolve(level_name, num_actors=12).num_groups == groups


@pytest.mark.parametrize("num_cores", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("level_name", ["dmlab30", "gym:A-v0,gym:B-v0,gym:C-v0", "doom_a,doom_b"])
def test_every_level_gets_as_many_groups(level_name: str, num_cores: int) -> None:
    """Levels are dealt out to groups round robin, and it comes out even."""
    values = preset_values(level_name, "paper", num_cores)
    levels = {"dmlab30": 30}.get(level_name, level_name.count(",") + 1)
    assert values["num_groups"] % levels == 0
    assert values["num_actors"] % values["num_groups"] == 0
    assert values["num_groups"] >= levels


def test_default_logdir_is_one_folder_of_harmless_characters() -> None:
    """A level name may be a path or an id with slashes; its folder is under logdir all the same."""
    logdir = preset_values("doom:../my scenarios/a.cfg", "paper", 2)["logdir"]
    assert logdir == "logdir/doom_.._my_scenarios_a.cfg"


def test_a_hung_environment_is_replaced_before_the_run_counts_as_stalled() -> None:
    """Where environments live in worker processes, their timeout is the shorter one."""
    with pytest.raises(ConfigError, match="stall_timeout_s=60 must be > env_timeout_s=120"):
        resolve("doom_basic", stall_timeout_s=60.0)
    assert resolve("atari_pong", stall_timeout_s=60.0).stall_timeout_s == 60.0


def test_a_list_is_played_by_equal_numbers_of_groups_or_not_at_all() -> None:
    """No level is silently left out or favoured."""
    assert resolve("doom_a,doom_b", num_actors=6).num_groups == 2
    assert resolve("gym:A-v0,gym:B-v0,gym:C-v0", num_actors=18).num_groups == 3
    with pytest.raises(ConfigError, match="num_actors=5 must be a multiple of the 2 levels"):
        resolve("doom_a,doom_b", num_actors=5)


def test_only_a_learner_with_hosts_may_have_no_actors() -> None:
    """num_actors=0 needs --listen, and then means no groups."""
    config = resolve("catch", listen="tcp://127.0.0.1:5555", num_actors=0)
    assert (config.num_groups, config.group_size) == (0, 0)
    with pytest.raises(ConfigError, match=r"num_actors=0 must be >= 1"):
        resolve("catch", num_actors=0)
    with pytest.raises(ConfigError, match="must both be 0"):
        resolve("catch", listen="tcp://127.0.0.1:5555", num_actors=8, num_groups=0)
