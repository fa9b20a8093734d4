"""envpool and ale-py play the same games: byte by byte, and by their statistics."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Literal, NamedTuple

import numpy as np
import pytest
import scipy.stats

from asyncagent.config import Config
from asyncagent.envs import make_group
from asyncagent.envs.atari import (
    MAX_FRAMES,
    MINIMAL_ACTIONS,
    PROTOCOLS,
    AtariEngine,
    atari_spec,
    make_emulators,
)
from asyncagent.envs.emulators import AleEmulators, EnvpoolEmulators
from asyncagent.structs import Episode

Backend = Literal["envpool", "ale"]
BACKENDS: tuple[Backend, ...] = ("envpool", "ale")

OTHER_SCREENS = (
    *("adventure", "air_raid", "carnival", "journey_escape", "keystone_kapers", "king_kong"),
    *("klax", "laser_gates", "mr_do", "pacman", "pooyan", "sir_lancelot", "space_war"),
)
"""Games whose screen is not 210 lines high: envpool cuts it off, ale-py shrinks all of it."""


def twins(
    game: str, protocol: str, *, num_envs: int, action_repeats: int = 4, max_frames: int
) -> tuple[AtariEngine, AtariEngine]:
    """The same environments on either backend, with one no-op (ale-py: none or one) at a start."""
    rules = PROTOCOLS[protocol]
    made = []
    for kind in (EnvpoolEmulators, AleEmulators):
        emulators = kind(
            game,
            list(range(13, 13 + num_envs)),
            action_repeats=action_repeats,
            sticky=rules.sticky,
            max_noops=1,
            full_action_space=rules.full_action_space,
            num_threads=1,
        )
        made.append(
            AtariEngine(
                emulators, game, protocol, action_repeats=action_repeats, max_frames=max_frames
            )
        )
    return made[0], made[1]


class Seen(NamedTuple):
    """What happened in the environments that were the same on both backends."""

    envs: int
    episodes: int
    truncations: int
    games: int
    points: int


def same_play(
    game: str,
    protocol: str,
    num_steps: int,
    *,
    num_envs: int = 2,
    action_repeats: int = 4,
    max_frames: int = MAX_FRAMES,
) -> Seen:
    """Play at random; count what happens in environments that are equal throughout.

    ale-py played no no-op in about half of them, which therefore differ sooner or later.  Each
    environment is compared, field by field and byte by byte, to the end of its first game.
    """
    engines = twins(
        game, protocol, num_envs=num_envs, action_repeats=action_repeats, max_frames=max_frames
    )
    rng = np.random.default_rng(0)
    rows = [engine.reset() for engine in engines]
    same = (rows[0].observation == rows[1].observation).all(axis=(1, 2, 3))
    playing = same.copy()
    seen = np.zeros((4, num_envs), np.int64)
    for _ in range(num_steps):
        action = rng.integers(engines[0].spec.actions.num_logits, size=num_envs)
        one, two = (engine.step(action) for engine in engines)
        differs = (one.observation != two.observation).any(axis=(2, 3))
        # Of a game that ended by itself the backends show different last frames.
        differs[one.game_over & ~one.truncated, 3] = False
        equal = ~differs.any(axis=1) & (one.reward == two.reward)
        for field in ("terminated", "truncated", "game_over"):
            equal &= getattr(one, field) == getattr(two, field)
        same &= equal | ~playing
        playing &= same
        seen[:, playing] += np.stack(
            [one.terminated, one.truncated, one.game_over, one.reward != 0]
        )[:, playing]
        playing &= ~one.game_over
        if not playing.any():
            break
    for engine in engines:
        engine.close()
    return Seen(int(same.sum()), *(int(count) for count in seen[:, same].sum(axis=1)))


def test_breakout_is_the_same_to_the_end() -> None:
    """Whole games of Breakout: pixels, points, five lost lives, game over, FIRE in each opening."""
    seen = same_play("breakout", "impala2018", 600, num_envs=3)
    assert seen.games == seen.envs > 0 and seen.episodes == 5 * seen.games
    assert seen.points > 0


def test_sticky_actions_stick_alike() -> None:
    """machado2018's sticky actions, with equal seeds, are drawn alike: 18 actions, whole games."""
    seen = same_play("boxing", "machado2018", 150)
    assert seen.envs > 0 and seen.points > 0 and seen.episodes == 0


@pytest.mark.parametrize("action_repeats", [1, 3, 4])
def test_time_limit_is_the_same(action_repeats: int) -> None:
    """The same step is truncated on either backend, whatever the repeats."""
    seen = same_play(
        "seaquest", "impala2018", 50, action_repeats=action_repeats, max_frames=40 * action_repeats
    )
    assert seen.truncations == seen.games == seen.envs > 0


@pytest.mark.parametrize("game", ["ms_pacman", "up_n_down"])
def test_actions_mean_the_same(game: str) -> None:
    """Random actions, all of the minimal set, move the same game the same way."""
    assert same_play(game, "impala2018", 100).envs > 0


@pytest.mark.slow
@pytest.mark.parametrize("protocol", list(PROTOCOLS))
@pytest.mark.parametrize("game", sorted(set(MINIMAL_ACTIONS) - set(OTHER_SCREENS)))
def test_every_game_is_the_same(game: str, protocol: str) -> None:
    """Every game whose screen both show in full is the same, pixel by pixel."""
    assert same_play(game, protocol, 100).envs > 0


@pytest.mark.slow
@pytest.mark.parametrize("game", OTHER_SCREENS)
def test_other_screens_play_the_same(game: str) -> None:
    """Where the pictures differ, actions, points, lives and ends still agree."""
    engines = twins(game, "impala2018", num_envs=6, max_frames=MAX_FRAMES)
    rng = np.random.default_rng(0)
    for engine in engines:
        engine.reset()
    score = np.zeros((2, 6))
    ends = np.zeros((2, 6))
    for _ in range(150):
        action = rng.integers(engines[0].spec.actions.num_logits, size=6)
        for k, engine in enumerate(engines):
            rows = engine.step(action)
            score[k] += rows.reward
            ends[k] += rows.terminated
    same = (score[0] == score[1]) & (ends[0] == ends[1])
    assert same.any(), (game, score, ends)


@pytest.mark.parametrize(
    ("game", "protocol"),
    [("breakout", "impala2018"), ("skiing", "machado2018"), ("pong", "machado2018")],
)
def test_specs_agree(game: str, protocol: str) -> None:
    """Either backend has the table's action count and observation."""
    for backend in BACKENDS:
        emulators = make_emulators(
            game, protocol, [1], backend=backend, action_repeats=4, num_threads=1
        )
        spec = atari_spec(game, protocol, 4)
        emulators.restart(np.arange(1))
        frames = emulators.step(np.array([spec.actions.num_logits - 1]))
        assert emulators.num_actions == spec.actions.num_logits
        assert frames.observation.shape[1:] == spec.observation.shape
        assert str(frames.observation.dtype) == spec.observation.dtype
        assert frames.reward.dtype == "float32" and frames.lives.dtype == "int32"


def openings(backend: Backend, restarts: int) -> dict[bytes, int]:
    """How often each first observation of Enduro, whose road moves with every frame, occurs."""
    emulators = make_emulators(
        "enduro", "impala2018", [1, 2], backend=backend, action_repeats=4, num_threads=1
    )
    counts: dict[bytes, int] = {}
    for _ in range(restarts):
        emulators.restart(np.arange(2))
        for observation in emulators.step(np.ones(2, np.int64)).observation:
            key = observation[3].tobytes()
            counts[key] = counts.get(key, 0) + 1
    return counts


@pytest.mark.parametrize("max_noops", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_noops(monkeypatch: pytest.MonkeyPatch, max_noops: int) -> None:
    """Both play each number of no-ops up to the limit equally often; only ale-py plays none."""
    assert PROTOCOLS["impala2018"].max_noops == 30
    rules = dataclasses.replace(PROTOCOLS["impala2018"], max_noops=max_noops)
    monkeypatch.setitem(PROTOCOLS, "impala2018", rules)
    of_envpool, of_ale = (openings(backend, 6 * max_noops) for backend in BACKENDS)
    assert (len(of_envpool), len(of_ale)) == (max_noops, max_noops + 1)
    assert set(of_envpool) < set(of_ale)
    for counts in (of_envpool, of_ale):
        assert scipy.stats.chisquare(list(counts.values())).pvalue > 0.01


def random_games(
    backend: Backend, level_name: str, num_envs: int, games: int, seed: int
) -> list[Episode]:
    """The first ``games`` games of each of ``num_envs`` environments, played at random."""

    async def main() -> list[Episode]:
        config = Config(level_name=level_name, atari_backend=backend, env_threads=1)
        group = make_group(
            config, level_name=config.level_name, num_envs=num_envs, first_env_index=0, seed=seed
        )
        rng = np.random.default_rng(seed)
        played: list[list[Episode]] = [[] for _ in range(num_envs)]
        await group.reset()
        while min(map(len, played)) < games:
            row = await group.step(rng.integers(group.spec.actions.num_logits, size=num_envs))
            for game in row.episodes:
                played[game.env_index].append(game)
        await group.close()
        # A fixed share per environment: whoever is done first would favour short games.
        return [game for of_env in played for game in of_env[:games]]

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("level_name", "num_envs", "games"),
    [
        ("atari_breakout", 6, 4),
        pytest.param("atari_breakout", 20, 10, marks=pytest.mark.slow),
        pytest.param("atari_pong", 20, 3, marks=pytest.mark.slow),
    ],
)
def test_random_games_are_indistinguishable(level_name: str, num_envs: int, games: int) -> None:
    """Returns and lengths of random whole games: Kolmogorov-Smirnov p > 0.01."""
    one = random_games("envpool", level_name, num_envs, games, seed=1)
    two = random_games("ale", level_name, num_envs, games, seed=2)
    assert len(one) == len(two) == num_envs * games
    for field in ("episode_return", "steps"):
        samples = [[getattr(game, field) for game in played] for played in (one, two)]
        result = scipy.stats.ks_2samp(*samples, method="asymp")
        print(level_name, field, [round(np.mean(sample), 2) for sample in samples], result.pvalue)
        assert result.pvalue > 0.01
