"""``asyncagent check-env``: what an environment is like, how fast, and what is wrong with it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncagent.__main__ import main
from asyncagent.commands.check_env import SLOW_STEP_S, LeafReport, Report, random_action
from asyncagent.structs import (
    ActionSpace,
    ArraySpec,
    Box,
    Discrete,
    EnvSpec,
    EnvStep,
    Episode,
    Loss,
    MultiDiscrete,
)

STAND_INS = Path(__file__).resolve().parent / "stand_ins"
LEVEL = "explore_goal_locations_small"


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(STAND_INS)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))


def line(said: str, word: str) -> str:
    """The report's only line that begins with ``word``."""
    (found,) = re.findall(rf"^{word} +(.*)$", said, re.MULTILINE)
    return str(found)


def test_good_environment(capsys: pytest.CaptureFixture[str]) -> None:
    """A sound one gives status 0, and its arrays, actions, repeats, episodes and times."""
    assert main(["check-env", LEVEL, "--num_steps=60", "--width=64", "--height=48"]) == 0
    said = capsys.readouterr().out
    assert line(said, "level") == LEVEL
    assert re.search(r"^shows +rgb uint8 \[48, 64, 3\], 0 ... 255$", said, re.MULTILINE)
    assert re.search(r"^shows +instruction int32 \[32\], no words$", said, re.MULTILINE)
    assert line(said, "actions") == "Discrete(num_actions=9), each held for 4 frames"
    assert "2 ended (0 by a time limit), of 23 ... 23 steps" in line(said, "episodes")
    assert line(said, "resets").startswith("2, median ")
    assert re.fullmatch(
        r"58, median .* ms, 99% below .* ms, longest .* ms; .* steps/s, resets included .*",
        line(said, "steps"),
    )
    assert line(said, "good") == "nothing is wrong" and "WRONG" not in said


@pytest.mark.parametrize("level_name", ["catch", "cartpole", "memory"])
def test_other_families(level_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Levels without a worker process are checked alike."""
    assert main(["check-env", f"--level_name={level_name}", "--num_steps=30"]) == 0
    assert line(capsys.readouterr().out, "actions").endswith("each held for a frame")


def test_every_level_of_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    """Each level of a list has its report."""
    assert main(["check-env", f"{LEVEL},language_select_located_object", "--num_steps=3"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^level +(.*)$", said, re.MULTILINE) == [
        LEVEL, "language_select_located_object",
    ]  # fmt: skip
    assert len(re.findall("no words", said)) == 1


def test_held_out_levels(capsys: pytest.CaptureFixture[str]) -> None:
    """--test plays the level that is held out for testing."""
    assert main(["check-env", "rooms_collect_good_objects_test", "--num_steps=3"]) == 2
    assert "held out" in capsys.readouterr().err
    assert main(["check-env", "rooms_collect_good_objects_test", "--num_steps=3", "--test"]) == 0


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"raise_at": 8}, "lost, and made anew: ValueError: Failed to advance"),
        ({"die_at": 8}, "killed by SIGABRT"),
        ({"exit_at": 8}, "exited with status 1"),
    ],
)
def test_what_dies_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: dict[str, int],
    words: str,
) -> None:
    """An environment that raises or dies is told of, with status 1; its replacement goes on."""
    monkeypatch.setenv("FAKE_DEEPMIND_LAB", json.dumps({LEVEL: fault}))
    assert main(["check-env", LEVEL, "--num_steps=5"]) == 1
    said = capsys.readouterr().out
    assert words in said and "good" not in said
    assert line(said, "resets") == "none"


def test_what_dies_always_shows_its_last_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that never gets going ends the check, with what its worker said last."""
    monkeypatch.setenv("FAKE_DEEPMIND_LAB", json.dumps({LEVEL: {"exit_at": 1}}))
    assert main(["check-env", LEVEL, "--num_steps=50", "--max_env_failures=2"]) == 1
    said = capsys.readouterr().out
    assert "failed 2 times" in said and "Couldn't load maps/arena.bsp" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tests/no_such_level"], ["tests/no_such_level", "not found"]),
        (["atari_brekout"], ["atari_breakout"]),
        ([LEVEL, "--num_steps=0"], ["num_steps=0", ">= 1"]),
        ([LEVEL, "--num_stps=3"], ["--num_stps", "--num_steps"]),
        (["psychlab_continuous_recognition"], ["--dataset_path"]),
        (["catch", "--num_action_repeats=4"], ["num_action_repeats=4"]),
    ],
)
def test_mistakes_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    """Bad input gives status 2 and one line with the fault and what would be right."""
    assert main(["check-env", *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and [word for word in words if word not in said] == []


def test_missing_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without deepmind_lab one line says how to get it."""
    monkeypatch.setitem(sys.modules, "deepmind_lab", None)
    assert main(["check-env", LEVEL]) == 2
    assert "build a wheel" in capsys.readouterr().err


SPEC = EnvSpec(
    {"x": ArraySpec((2,), "float32"), "words": ArraySpec((3,), "int32", num_tokens=5)},
    Discrete(2),
    1,
)


def row(number: int = 0, *, words: Any = (1, 0, 0), **fields: Any) -> EnvStep:
    """A good row of one environment, but for ``fields``."""
    no = np.zeros(1, np.bool_)
    observation = {
        "x": np.array([[number, -number]], np.float32),
        "words": np.array([words], np.int32),
    }
    good = EnvStep(observation, np.zeros(1, np.float32), no, no, no, no)
    return good._replace(**fields)


def wrong(*rows: EnvStep, time_s: float = 0.001) -> list[str]:
    """What a report on these rows calls wrong."""
    report = Report(SPEC)
    for one in rows:
        report.add(one, time_s)
    report.lines()
    return report.problems


def observed(**leaves: Any) -> EnvStep:
    return row(observation=row().observation | leaves)


GOOD = [row(n) for n in range(5)]


def test_good_rows() -> None:
    """Rows as the spec says have nothing wrong, nor has a sentence that never changes."""
    assert wrong(*GOOD) == []


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (observed(x=np.zeros((1, 3), np.float32)), "observation x is float32 [3], not float32 [2]"),
        (observed(x=np.zeros((1, 2), np.float64)), "observation x is float64 [2], not float32 [2]"),
        (observed(x=[[0.0, 1.0]]), "observation x is list [2], not float32 [2]"),
        (observed(x=np.array([[np.nan, 0]], np.float32)), "observation x has numbers that are not"),
        (observed(x=np.array([[np.inf, 0]], np.float32)), "observation x has numbers that are not"),
        (row(words=(6, 0, 0)), "observation words has tokens 0 ... 6 beyond 0 ... 5"),
        (row(words=(-1, 0, 0)), "observation words has tokens -1 ... 0 beyond 0 ... 5"),
        (observed(more=np.zeros(1)), "it shows ['more', 'words', 'x'], not ['words', 'x']"),
        (row(reward=np.array([np.nan], np.float32)), "a reward is nan"),
        (row(losses=(Loss("level", 7, 0, "it fell"),)), "lost, and made anew: it fell (seed 7)"),
    ],
)
def test_bad_rows(bad: EnvStep, says: str) -> None:
    """One row that is not as it should be is told of, once."""
    (problem,) = wrong(*GOOD, bad, bad)
    assert problem.startswith(says)


def test_frozen_observation() -> None:
    """An observation that is the same in every row is wrong, even with other rewards."""
    assert wrong(*[row(3) for _ in range(5)]) == ["observation x never changes"]


def test_slow_steps() -> None:
    """Steps beyond the bound are wrong; slow resets are not."""
    (problem,) = wrong(*GOOD, time_s=2 * SLOW_STEP_S)
    assert problem.startswith("steps take longer than")
    resets = [row(n, first=np.ones(1, np.bool_)) for n in range(5)]
    assert wrong(*resets, time_s=2 * SLOW_STEP_S) == []


def test_lost_rows_count_for_nothing() -> None:
    """A row without an environment is no step, and what follows it is no ordinary reset."""
    report = Report(SPEC)
    yes = np.ones(1, np.bool_)
    nothing = {"x": np.zeros((1, 9)), "words": None}
    loss = Loss("level", 7, 0, "it fell")
    rows = [*GOOD, row(observation=nothing, lost=yes, losses=(loss,)), row(5, first=yes), row(6)]
    for one in rows:
        report.add(one, 0.001)
    lines = "\n".join(report.lines())
    assert line(lines, "resets") == "none" and line(lines, "steps").startswith("6, ")
    assert len(report.problems) == 1


def test_episodes_and_rewards_are_described() -> None:
    """Returns, lengths, time limits and the share of rewards that say something."""
    report = Report(SPEC)
    ended = row(1, episodes=(Episode("level", 2.5, 7, 0), Episode("level", -1.0, 9, 0, True)))
    for one in (*GOOD, ended, row(2, reward=np.full(1, 4.0, np.float32))):
        report.add(one, 0.002)
    lines = "\n".join(report.lines())
    assert line(lines, "episodes") == (
        "2 ended (1 by a time limit), of 7 ... 9 steps, returns -1 ... 2.5"
    )
    assert line(lines, "rewards") == "0 ... 4, 1 of 7 not 0"
    assert line(lines, "steps") == (
        "7, median 2 ms, 99% below 2 ms, longest 2 ms; 500 steps/s, resets included 500"
    )


def test_nothing_seen() -> None:
    """A report without a row says so."""
    report = Report(SPEC)
    lines = "\n".join(report.lines())
    assert line(lines, "rewards") == "none seen" and line(lines, "steps") == "none"
    assert "x float32 [2], nothing seen" in lines and str(LeafReport("", ArraySpec((), "int64")))


@pytest.mark.parametrize("space", [Discrete(3), MultiDiscrete((2, 3)), Box(2)])
def test_random_actions(space: ActionSpace) -> None:
    """Actions fit the space and take on all its choices."""
    rng = np.random.default_rng(0)
    actions = np.concatenate([random_action(space, rng) for _ in range(200)])
    assert actions.shape == (200, *space.array.shape) and actions.dtype == space.array.dtype
    if isinstance(space, Box):
        assert abs(actions.mean()) < 0.2 and 0.8 < actions.std() < 1.2
    else:
        sizes = [3] if isinstance(space, Discrete) else [2, 3]
        columns = actions.reshape(200, -1).T
        assert [sorted(set(c.tolist())) for c in columns] == [list(range(n)) for n in sizes]
