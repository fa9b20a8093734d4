"""Test mode: whole games of every level, their record, and what is refused beforehand."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from asyncagent import evaluation
from asyncagent.checkpoint import save_checkpoint
from asyncagent.config import Config, resolve
from asyncagent.envs import env_spec
from asyncagent.envs.base import EnvGroup, check_action
from asyncagent.envs.dmlab30 import LEVELS
from asyncagent.errors import ActorLost, CheckpointError, UsageError
from asyncagent.evaluation import SEED_OFFSET, Evaluation, LevelResult, evaluate
from asyncagent.models import make_net
from asyncagent.structs import (
    ActionArray,
    ActionSpace,
    ArraySpec,
    Box,
    Discrete,
    EnvSpec,
    EnvStep,
    MultiDiscrete,
)
from tests.fakes import CounterGroup


def write_checkpoint(logdir: Path, config: Config, spec: EnvSpec | None = None) -> None:
    """Of a run that learned nothing in 3000 frames."""
    net = make_net(config.net, spec or env_spec(config), config.use_lstm, config.seed)
    save_checkpoint(logdir, {"frames": 3000, "config": config.to_json(), "net": net.state_dict()})


class Fakes:
    """Stands in for the environment families: every level is a CounterGroup."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, actions: ActionSpace | None = None) -> None:
        self.spec = CounterGroup([[1]], num_actions=3).spec
        if actions is not None:
            self.spec = EnvSpec(self.spec.observation, actions, 1)
        self.made: list[dict[str, Any]] = []
        self.groups: list[CounterGroup] = []
        monkeypatch.setattr(evaluation, "usable_spec", lambda config: self.spec)
        monkeypatch.setattr(evaluation, "make_group", self.make_group)

    def make_group(self, config: Config, **options: Any) -> EnvGroup:
        self.made.append({"config": config, **options})
        group = CounterGroup([[3]] * options["num_envs"], truncations=[(0, 0)])
        group.spec = self.spec
        self.groups.append(group)
        return group


def test_evaluate_plays_the_newest_checkpoint(tmp_path: Path) -> None:
    """Every game asked for is played and recorded, by default with a seed that training had not."""
    write_checkpoint(tmp_path, resolve("catch", seed=5))
    left: list[int] = []
    result = evaluate(tmp_path, 37, on_episode=lambda episode, n: left.append(n))
    (level,) = result.levels
    assert level.level_name == level.test_level_name == "catch"
    assert len(level.returns) == len(level.steps) == len(level.truncated) == 37
    assert level.frames == (9,) * 37
    assert set(result.returns) <= {-1.0, 1.0}
    assert left == list(range(36, -1, -1))
    assert (result.frames, result.seed, result.greedy) == (3000, 5 + SEED_OFFSET, False)
    assert result.mean == level.mean == pytest.approx(np.mean(level.returns))
    assert result.spread == pytest.approx(np.std(level.returns))


def test_greedy_games_are_the_same_again(tmp_path: Path) -> None:
    """Environments, quotas and the likeliest actions follow from checkpoint and seed."""
    write_checkpoint(tmp_path, resolve("cartpole"))
    first, second = (evaluate(tmp_path, 70, greedy=True, seed=3) for _ in range(2))
    assert first == second
    assert evaluate(tmp_path, 70, greedy=True, seed=4).levels != first.levels


def test_record_as_json(tmp_path: Path) -> None:
    """The JSON has every game of every level and what sums them up."""
    write_checkpoint(tmp_path, resolve("memory"))
    result = evaluate(tmp_path, 3, seed=1, greedy=True, level_name="memory,cartpole")
    told = json.loads(result.to_json())
    assert (told["frames"], told["seed"], told["greedy"]) == (3000, 1, True)
    assert told["benchmark_mode"] is False
    assert told["dmlab30"] is None
    assert [level["level_name"] for level in told["levels"]] == ["memory", "cartpole"]
    for level, of_level in zip(result.levels, told["levels"], strict=True):
        assert of_level["num_episodes"] == 3
        assert of_level["returns"] == list(level.returns)
        assert of_level["frames"] == list(level.frames)
        assert of_level["truncated"] == [False] * 3
        assert of_level["truncated_share"] == 0.0
        assert of_level["mean"] == pytest.approx(level.mean)
        assert of_level["frames_mean"] == pytest.approx(np.mean(level.frames))
        assert of_level["human_normalised"] is None


def test_what_is_no_number_is_null() -> None:
    """A return that is no number does not make the file unreadable to other languages."""
    level = LevelResult("own:Env", "own:Env", (math.nan, 1.0), (3, 3), (False, False), 1, 0)
    told = json.loads(
        Evaluation(0, 0, False, False, (level,)).to_json(), parse_constant=pytest.fail
    )
    assert told["levels"][0]["returns"] == [None, 1.0]
    assert told["levels"][0]["mean"] is None


def test_dmlab30(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 30 levels are played by the test's rules, with the flags given, and scored."""
    fakes = Fakes(monkeypatch)
    write_checkpoint(tmp_path, resolve("dmlab30", net="mlp"), fakes.spec)
    (tmp_path / "data").mkdir()
    result = evaluate(tmp_path, 2, dataset_path=str(tmp_path / "data"), renderer="hardware")
    assert [level.level_name for level in result.levels] == [level.train for level in LEVELS]
    assert [level.test_level_name for level in result.levels] == [level.test for level in LEVELS]
    assert {len(level.returns) for level in result.levels} == {2}
    assert {made["level_name"] for made in fakes.made} == {level.train for level in LEVELS}
    for made in fakes.made:
        assert made["test"] is True
        assert made["config"].dataset_path == str(tmp_path / "data")
        assert made["config"].renderer == "hardware"
    assert all(group.closed for group in fakes.groups)
    assert result.dmlab30 is not None
    assert json.loads(result.to_json())["dmlab30"]["no_cap"] == pytest.approx(result.dmlab30.no_cap)


def test_dmlab30_scores_by_hand() -> None:
    """Human play in all levels but one, and three times human in that: 100 + 200/30, capped 100."""
    results = [
        LevelResult(level.train, level.test, (level.human,), (9,), (True,), 4, 0)
        for level in LEVELS
    ]
    human, random = LEVELS[3].human, LEVELS[3].random
    results[3] = results[3]._replace(returns=(random + 3 * (human - random),))
    scores = Evaluation(0, 0, False, False, tuple(results)).dmlab30
    assert scores == pytest.approx((100 + 200 / 30, 100))
    assert results[5].human_normalised == pytest.approx(100.0)
    assert Evaluation(0, 0, False, False, tuple(results[1:])).dmlab30 is None


def test_atari_is_scored_by_its_game() -> None:
    """Also where the level has the ancestor's spelling; what is no game of the 57 has no score."""
    result = LevelResult("atari_spaceinvaders", "", (148.0, 1668.7), (9, 9), (False, False), 4, 0)
    assert result.human_normalised == pytest.approx(100 * (908.35 - 148.0) / (1668.7 - 148.0))
    assert result._replace(level_name="atari_adventure").human_normalised is None
    assert result._replace(level_name="catch").human_normalised is None


def test_images_of_psychlab_are_missed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DMLab-30 without its data set is refused before the first of the levels is played."""
    fakes = Fakes(monkeypatch)
    write_checkpoint(tmp_path, resolve("dmlab30", net="mlp"), fakes.spec)
    with pytest.raises(UsageError, match="give --dataset_path"):
        evaluate(tmp_path, 1)
    assert not fakes.made


@pytest.mark.parametrize("actions", [Discrete(3), MultiDiscrete((3, 2, 4)), Box(2)])
@pytest.mark.parametrize("greedy", [False, True])
def test_every_action_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, actions: ActionSpace, greedy: bool
) -> None:
    """Games are played with choices, several choices at once, and real numbers."""
    fakes = Fakes(monkeypatch, actions)
    write_checkpoint(tmp_path, resolve("catch"), fakes.spec)
    (level,) = evaluate(tmp_path, 4, greedy=greedy).levels
    assert level.steps == (3,) * 4
    for group in fakes.groups:
        for action in group.actions:
            check_action(action, group.num_envs, actions)


def test_time_limits_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which games a time limit ended is recorded game by game."""
    fakes = Fakes(monkeypatch)
    write_checkpoint(tmp_path, resolve("catch"), fakes.spec)
    # Two groups of one environment each; the first game of each is cut off.
    (level,) = evaluate(tmp_path, 2).levels
    assert level.truncated == (True, True)
    assert level.to_dict()["truncated_share"] == 1.0


def test_benchmark_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the run acted at random stays known."""
    fakes = Fakes(monkeypatch)
    write_checkpoint(tmp_path, resolve("catch", benchmark_mode=True), fakes.spec)
    result = evaluate(tmp_path, 1)
    assert result.benchmark_mode
    assert json.loads(result.to_json())["benchmark_mode"] is True


def test_failing_level_ends_with_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ended the games comes out as it is, not inside a group of exceptions."""

    class Failing(CounterGroup):
        async def step(self, action: ActionArray) -> EnvStep:
            raise ActorLost("level catch: environment 0 failed 5 times")

    fakes = Fakes(monkeypatch)
    write_checkpoint(tmp_path, resolve("catch"), fakes.spec)
    groups = [Failing([[1]]), CounterGroup([[1]])]
    monkeypatch.setattr(evaluation, "make_group", lambda *_, **__: groups.pop(0))
    with pytest.raises(ActorLost, match="environment 0 failed 5 times"):
        evaluate(tmp_path, 2)

    def refuse(*_: Any, **__: Any) -> EnvGroup:
        raise UsageError("no such engine")

    monkeypatch.setattr(evaluation, "make_group", refuse)
    with pytest.raises(UsageError, match="no such engine"):
        evaluate(tmp_path, 2)


def children() -> set[int]:
    """Processes that this one has started."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            *_, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid():
                found.add(int(stat.parent.name))
    return found


@pytest.mark.parametrize("level_name", ["memory", "tests.my_envs:Switches"])
def test_interrupt_ends_the_games(tmp_path: Path, level_name: str) -> None:
    """Ctrl-C ends test mode at once, and leaves neither threads nor processes."""
    write_checkpoint(tmp_path, resolve(level_name))
    left: list[int] = []

    def interrupt(episode: object, n: int) -> None:
        left.append(n)
        if len(left) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    threads, processes = set(threading.enumerate()), children()
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, 1_000_000, on_episode=interrupt)
    assert left[-1] > 990_000
    assert children() <= processes
    for thread in set(threading.enumerate()) - threads:
        thread.join(60)
        assert not thread.is_alive()


class PictureGroup(CounterGroup):
    """Shows a picture whose brightness is its row counter."""

    async def reset(self) -> EnvStep:
        return self._show(await super().reset())

    async def step(self, action: ActionArray) -> EnvStep:
        return self._show(await super().step(action))

    def _show(self, row: EnvStep) -> EnvStep:
        shades = row.observation.astype(np.uint8)[:, :, None, None]
        return row._replace(observation=np.broadcast_to(shades, (self.num_envs, 16, 16, 3)).copy())


def test_video_of_every_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A film per level, as long as the first environment's first game has rows."""
    spec = EnvSpec(ArraySpec((16, 16, 3), "uint8"), Discrete(3), 1)
    lengths = {"memory": 3, "catch": 7}

    def make_group(config: Config, **options: Any) -> EnvGroup:
        length = lengths[options["level_name"]] + options["first_env_index"]
        group = PictureGroup([[length]] * options["num_envs"])
        group.spec = spec
        return group

    monkeypatch.setattr(evaluation, "usable_spec", lambda config: spec)
    monkeypatch.setattr(evaluation, "make_group", make_group)
    write_checkpoint(tmp_path, resolve("memory,catch", net="shallow"), spec)
    result = evaluate(tmp_path, 5, video=True)
    for level in result.levels:
        path = tmp_path / "video" / f"{level.level_name}-3000.mp4"
        assert level.video == str(path)
        with av.open(str(path)) as film:
            assert len(list(film.decode(video=0))) == lengths[level.level_name] + 1
    assert not list(tmp_path.glob("video/*.tmp"))


def test_games_in_worker_processes(tmp_path: Path) -> None:
    """Environments of the user's own, with several choices at once, are tested as all others."""
    level_name = "tests.my_envs:Switches"
    write_checkpoint(tmp_path, resolve(level_name))
    before = children()
    (level,) = evaluate(tmp_path, 5).levels
    assert level.steps == (10,) * 5
    assert level.truncated == (True,) * 5
    assert children() <= before


def test_nothing_to_play(tmp_path: Path) -> None:
    """No games, no checkpoint, or an impossible flag is said in one line."""
    with pytest.raises(UsageError, match="test_num_episodes=0 must be >= 1"):
        evaluate(tmp_path, 0)
    with pytest.raises(UsageError, match="seed=-1 must be in"):
        evaluate(tmp_path, 1, seed=-1)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        evaluate(tmp_path, 1)
    with pytest.raises(TypeError, match="cannot replace use_lstm"):
        evaluate(tmp_path, 1, use_lstm=True)


def test_level_that_does_not_fit(tmp_path: Path) -> None:
    """Another level is played only if it shows and takes what the policy knows."""
    write_checkpoint(tmp_path, resolve("catch"))
    with pytest.raises(UsageError, match=r"'cartpole' does not fit .* learned catch: its obs"):
        evaluate(tmp_path, 1, level_name="cartpole")
    with pytest.raises(UsageError, match="shows no picture"):
        evaluate(tmp_path, 1, video=True)
