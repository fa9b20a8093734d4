"""Atari episodes: the rules on scripted emulators, and what the real ones bring."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from typing import Any, Literal

import numpy as np
import pytest

from asyncagent.config import Config
from asyncagent.envs import make_group
from asyncagent.envs.atari import PROTOCOLS, AtariEngine, make_emulators
from asyncagent.envs.emulators import Emulators, Frames
from asyncagent.structs import EnvStep, IntArray

Backend = Literal["envpool", "ale"]
BACKENDS = ["envpool", "ale"]


class ScriptedEmulators:
    """E emulators that lose lives and end games as told, and write a tape of every call.

    ``lives`` and ``over`` map a step's number (the very first opening is step 0) to what holds
    from then on, or at that step, in each environment; every step scores its own number.
    """

    def __init__(
        self, num_envs: int, lives: dict[int, list[int]], over: dict[int, list[int]]
    ) -> None:
        self.num_envs = num_envs
        self.num_actions = 4
        self.tape: list[str] = []
        self._lives = lives
        self._over = over
        self._step = -1
        self._now = [0] * num_envs

    def restart(self, which: IntArray) -> None:
        self.tape.append(f"restart {which.tolist()}")

    def step(self, action: IntArray) -> Frames:
        self._step += 1
        self.tape.append(f"step {action.tolist()}")
        self._now = self._lives.get(self._step, self._now)
        return Frames(
            np.zeros((self.num_envs, 4, 84, 84), np.uint8),
            np.full(self.num_envs, self._step, np.float32),
            np.array(self._over.get(self._step, [0] * self.num_envs)) == 1,
            np.array(self._now, np.int32),
        )

    def close(self) -> None:
        self.tape.append("close")


class Played:
    """Flags of the rows an engine brought, as strings: one character per row and environment."""

    def __init__(self, engine: AtariEngine, num_steps: int, action: int = 3) -> None:
        rows = [engine.reset()]
        rows += [engine.step(np.full(engine.num_envs, action)) for _ in range(num_steps)]
        self.ends = [
            "".join(
                "T" if row.terminated[env] else "L" if row.truncated[env] else "." for row in rows
            )
            for env in range(engine.num_envs)
        ]
        self.games = [
            "".join("X" if row.game_over[env] else "." for row in rows)
            for env in range(engine.num_envs)
        ]
        assert not any((row.terminated & row.truncated).any() for row in rows)


def engine_over(
    emulators: ScriptedEmulators, protocol: str, max_frames: int = 108_000
) -> AtariEngine:
    emulators.num_actions = 18 if protocol == "machado2018" else 4
    return AtariEngine(emulators, "breakout", protocol, action_repeats=4, max_frames=max_frames)


def test_life_loss_ends_the_episode_but_not_the_game() -> None:
    """impala2018: a lost life terminates the episode, FIRE opens the next, the game goes on."""
    emulators = ScriptedEmulators(2, lives={0: [3, 3], 2: [2, 3], 5: [2, 2]}, over={})
    played = Played(engine_over(emulators, "impala2018"), 6)
    assert played.ends == ["..T....", ".....T."]
    assert played.games == [".......", "......."]
    assert emulators.tape == [
        "restart [0, 1]",
        "step [1, 1]",
        "step [3, 3]",
        "step [3, 3]",
        "step [1, 3]",
        "step [3, 3]",
        "step [3, 3]",
        "step [3, 1]",
    ]


def test_game_over_restarts_before_the_opening() -> None:
    """A finished game alone is restarted, after its end row and before its opening."""
    emulators = ScriptedEmulators(2, lives={0: [1, 1], 2: [0, 1], 3: [1, 1]}, over={2: [1, 0]})
    played = Played(engine_over(emulators, "impala2018"), 4)
    assert (played.ends, played.games) == (["..T..", "....."], ["..X..", "....."])
    assert emulators.tape == [
        "restart [0, 1]",
        "step [1, 1]",
        "step [3, 3]",
        "step [3, 3]",
        "restart [0]",
        "step [1, 3]",
        "step [3, 3]",
    ]


def test_machado_plays_whole_games() -> None:
    """machado2018: lost lives end nothing, and NOOP opens."""
    emulators = ScriptedEmulators(1, lives={0: [3], 2: [2], 3: [0], 5: [3]}, over={4: [1]})
    played = Played(engine_over(emulators, "machado2018"), 6)
    assert (played.ends, played.games) == (["....T.."], ["....X.."])
    assert emulators.tape == [
        "restart [0]",
        "step [0]",
        *["step [3]"] * 4,
        "restart [0]",
        "step [0]",
        "step [3]",
    ]


def test_more_or_no_lives_end_nothing() -> None:
    """Neither a won life nor a game that counts none ends an episode; nor does the last life."""
    emulators = ScriptedEmulators(3, lives={0: [3, 0, 1], 2: [4, 0, 0]}, over={})
    played = Played(engine_over(emulators, "impala2018"), 4)
    assert played.ends == ["....."] * 3


def test_a_new_games_lives_are_no_loss() -> None:
    """Fewer lives than the last game ended with are no life loss in the new game's first row."""
    emulators = ScriptedEmulators(1, lives={0: [3], 3: [2]}, over={2: [1]})
    assert Played(engine_over(emulators, "impala2018"), 5).ends == ["..T..."]


def test_time_limit_truncates() -> None:
    """After max_frames frames, openings counted, the game is cut off: truncated, restarted."""
    emulators = ScriptedEmulators(1, lives={0: [3], 2: [2]}, over={})
    played = Played(engine_over(emulators, "impala2018", max_frames=24), 8)
    # Row 3 opens an episode of the same game; rows 0 to 5 are six steps of four frames.
    assert (played.ends, played.games) == (["..T..L..."], [".....X..."])
    assert emulators.tape.count("restart [0]") == 2


@pytest.mark.parametrize(("over", "lives"), [({2: [1]}, {0: [3]}), ({}, {0: [3], 2: [2]})])
def test_end_at_the_time_limit_terminates(
    over: dict[int, list[int]], lives: dict[int, list[int]]
) -> None:
    """An episode that ends by the rules in the limit's very step terminates; the game is over."""
    played = Played(engine_over(ScriptedEmulators(1, lives, over), "impala2018", 12), 5)
    assert (played.ends, played.games) == (["..T..L"], ["..X..X"])


def test_game_over_in_the_opening() -> None:
    """A game that ends while it is being opened ends in its first row."""
    emulators = ScriptedEmulators(1, lives={0: [3]}, over={3: [1], 2: [1]})
    played = Played(engine_over(emulators, "impala2018"), 5)
    assert (played.ends, played.games) == (["..TT.."], ["..XX.."])
    assert emulators.tape.count("restart [0]") == 3


def test_other_emulators_are_refused() -> None:
    """An emulator whose actions are not the table's is not played with."""
    emulators = ScriptedEmulators(1, {}, {})
    emulators.num_actions = 5
    with pytest.raises(RuntimeError, match="5 actions, not 4"):
        AtariEngine(emulators, "breakout", "impala2018", action_repeats=4)


def make(backend: Backend, game: str, protocol: str, seeds: list[int]) -> Emulators:
    """Emulators on one thread, four repeats."""
    return make_emulators(game, protocol, seeds, backend=backend, action_repeats=4, num_threads=1)


def play(level_name: str, actions: IntArray, **flags: Any) -> list[EnvStep]:
    """Rows of a group that takes ``actions`` [steps, E]; env seeds come from seed 1."""

    async def main() -> list[EnvStep]:
        config = Config(level_name=level_name, env_threads=1, **flags)
        group = make_group(
            config,
            level_name=config.level_name,
            num_envs=actions.shape[1],
            first_env_index=0,
            seed=1,
        )
        async with asyncio.timeout(120):
            rows = [await group.reset()]
            rows += [await group.step(action) for action in actions]
            await group.close()
        return rows

    return asyncio.run(main())


@pytest.fixture(scope="module", params=BACKENDS)
def breakout(request: pytest.FixtureRequest) -> list[EnvStep]:
    """Three Breakout environments, 300 steps: environment 0 does nothing, the others anything."""
    actions = np.random.default_rng(3).integers(4, size=(300, 3))
    actions[:, 0] = 0
    return play("atari_breakout", actions, atari_backend=request.param)


def test_rows_of_real_emulators(breakout: list[EnvStep]) -> None:
    """Shapes, dtypes, first rows after end rows with reward 0; every game of five episodes."""
    assert breakout[0].first.all()
    for before, row in itertools.pairwise(breakout):
        assert row.observation.shape == (3, 4, 84, 84) and row.observation.dtype == np.uint8
        assert row.reward.dtype == np.float32
        assert (row.first == (before.terminated | before.truncated)).all()
        assert not row.reward[row.first].any()
        assert not row.truncated.any()
    for env in range(3):
        ends = [n for n, row in enumerate(breakout) if row.terminated[env]]
        games = [game for row in breakout for game in row.episodes if game.env_index == env]
        assert len(games) == len(ends) // 5 > 0
        assert games[0].steps == ends[4] - 4, "four openings cost no agent step"
        points = sum(float(row.reward[env]) for row in breakout[: ends[4] + 1])
        assert games[0].episode_return == points
    assert any(game.episode_return > 0 for row in breakout for game in row.episodes)


def test_ball_flies_without_the_agent(breakout: list[EnvStep]) -> None:
    """Each opening presses FIRE: an agent that never does loses one life after the other."""
    ends = [n for n, row in enumerate(breakout) if row.terminated[0]]
    assert len(ends) >= 5 and max(np.diff([0, *ends])) < 100


def test_stack_moves_by_one_frame(breakout: list[EnvStep]) -> None:
    """The newest frame is the last; after a restart the stack holds the new game alone."""
    for before, row in itertools.pairwise(breakout):
        same_game = np.array([not any(g.env_index == e for g in before.episodes) for e in range(3)])
        shifted = (row.observation[:, :3] == before.observation[:, 1:]).all(axis=(1, 2, 3))
        assert (shifted | ~same_game).all()
        for env in np.flatnonzero(~same_game):
            oldest = row.observation[env, 0]
            assert oldest.any() and (row.observation[env, :3] == oldest).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_never_written_again(backend: Backend) -> None:
    """Rows kept from 20 steps are, after all of them, what they were when they came."""
    emulators = make(backend, "pong", "impala2018", [1, 2])
    emulators.restart(np.arange(2))
    rows, copies = [], []
    for step in range(20):
        rows.append(emulators.step(np.array([2, 3])))
        copies.append([field.copy() for field in rows[-1]])
        if step % 7 == 6:
            emulators.restart(np.array([1]))
    for row, copy in zip(rows, copies, strict=True):
        assert all((field == before).all() for field, before in zip(row, copy, strict=True))
    assert len({row.observation.tobytes() for row in rows}) == 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_seeds_settle_everything(backend: Backend) -> None:
    """The same seed and index play the same game twice; other indices play other games."""
    actions = np.repeat(np.random.default_rng(2).integers(18, size=(60, 1)), 2, axis=1)
    flags = {"atari_backend": backend, "atari_protocol": "machado2018"}
    once, again = (play("atari_boxing", actions, **flags) for _ in range(2))
    assert all((a.observation == b.observation).all() for a, b in zip(once, again, strict=True))
    last = once[-1].observation
    assert last[0].tobytes() != last[1].tobytes()


@pytest.mark.parametrize(("protocol", "sticks"), [("impala2018", False), ("machado2018", True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_actions_stick_in_machado_only(
    monkeypatch: pytest.MonkeyPatch, backend: Backend, protocol: str, sticks: bool
) -> None:
    """From one start, the same actions lead to different games in machado2018 only."""
    fixed_start = dataclasses.replace(PROTOCOLS[protocol], max_noops=0)
    monkeypatch.setitem(PROTOCOLS, protocol, fixed_start)
    emulators = make(backend, "boxing", protocol, [1, 2, 3, 4])
    emulators.restart(np.arange(4))
    for action in np.random.default_rng(1).integers(18, size=40):
        frames = emulators.step(np.full(4, action))
    assert (len({observation.tobytes() for observation in frames.observation}) > 1) == sticks
