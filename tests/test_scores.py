"""Human-normalised scores, against figures worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncagent.envs.atari import MINIMAL_ACTIONS
from asyncagent.envs.dmlab30 import LEVELS, TEST_LEVELS, TRAIN_LEVELS
from asyncagent.scores import (
    ATARI,
    DMLAB30,
    Dmlab30Scores,
    Dmlab30Training,
    atari_human_normalised,
    dmlab30_human_normalised,
    dmlab30_score,
)


def all_at_random() -> dict[str, list[float]]:
    """An episode of every level, as a random policy plays."""
    return {level.train: [level.random] for level in LEVELS}


def test_atari_by_hand() -> None:
    """Breakout: random 1.7, human 30.5, so 16.1 is half of the way and 59.3 twice of it."""
    assert atari_human_normalised("breakout", 1.7) == pytest.approx(0.0)
    assert atari_human_normalised("breakout", 16.1) == pytest.approx(50.0)
    assert atari_human_normalised("breakout", 59.3) == pytest.approx(200.0)
    assert atari_human_normalised("adventure", 1.0) is None


def test_atari_games_are_ours() -> None:
    """There are 57, each by the name that its level has."""
    assert len(ATARI) == 57
    assert set(ATARI) <= set(MINIMAL_ACTIONS)


def test_dmlab_level_by_hand() -> None:
    """The test level's figures (random 0.073, human 10) count, by either name of the level."""
    for name in ("rooms_collect_good_objects_train", "rooms_collect_good_objects_test"):
        assert dmlab30_human_normalised(name, 5.0365) == pytest.approx(50.0)
    assert dmlab30_human_normalised("explore_goal_locations", 5.0) is None


def test_dmlab30_by_hand() -> None:
    """Scores of 100, 200, 50 and 27 zeros are 350 / 30 in the mean, 250 / 30 with the cap."""
    returns = all_at_random()
    returns["rooms_watermaze"] = [50.0, 58.0]  # mean 54, the human's
    returns["rooms_keys_doors_puzzle"] = [103.465]  # 4.135 + 2 * (53.8 - 4.135)
    returns["skymaze_irreversible_path_hard"] = [0.1, 100.0]  # half of the way from 0.1 to 100
    assert dmlab30_score(returns, None) == pytest.approx(350 / 30)
    assert dmlab30_score(returns, 100.0) == pytest.approx(250 / 30)


def test_worse_than_random_counts_in_full() -> None:
    """The cap cuts off above only: a score of -30 in one level makes the suite's -1."""
    returns = all_at_random()
    returns["rooms_watermaze"] = [4.065 - 0.3 * (54 - 4.065)]
    assert dmlab30_score(returns, 100.0) == pytest.approx(-1.0)


@pytest.mark.parametrize("cap", [None, 100.0])
def test_all_human_and_all_random(cap: float | None) -> None:
    """Human returns everywhere give 100, random ones 0, capped or not."""
    assert dmlab30_score({level.train: [level.human] for level in LEVELS}, cap) == pytest.approx(
        100
    )
    assert dmlab30_score(all_at_random(), cap) == pytest.approx(0.0)


def test_by_test_names() -> None:
    """The levels may be given by the names of their test levels."""
    assert dmlab30_score({level.test: [level.human] for level in LEVELS}, None) == pytest.approx(
        100
    )


def test_levels_that_lack() -> None:
    """A level that is missing, has no episode, is unknown or given twice is named."""
    returns = all_at_random()
    del returns["rooms_watermaze"]
    with pytest.raises(ValueError, match=r"needs an episode of rooms_watermaze$"):
        dmlab30_score(returns, None)
    with pytest.raises(ValueError, match=r"needs an episode of rooms_watermaze$"):
        dmlab30_score(returns | {"rooms_watermaze": []}, 100.0)
    with pytest.raises(ValueError, match="'rooms_waterfall' is no level of DMLab-30"):
        dmlab30_score(returns | {"rooms_waterfall": [1.0]}, None)
    both = all_at_random() | {"rooms_collect_good_objects_test": [1.0]}
    with pytest.raises(ValueError, match="rooms_collect_good_objects_train is given twice"):
        dmlab30_score(both, None)


def test_what_is_no_number_is_no_perfect_score() -> None:
    """The cap does not turn a return that is no number into 100."""
    assert math.isnan(dmlab30_score(all_at_random() | {"rooms_watermaze": [math.nan]}, 100.0))


def test_figures_are_the_levels_own() -> None:
    """The table of scores and the list of levels agree, level by level."""
    assert list(DMLAB30) == list(TRAIN_LEVELS)
    assert [*DMLAB30.values()] == [(level.human, level.random) for level in LEVELS]
    assert len(set(TEST_LEVELS)) == 30


@given(st.permutations(TRAIN_LEVELS))
def test_training_scores_come_with_the_last_level(order: list[str]) -> None:
    """Whatever the order, nothing before the thirtieth level, then both scores, then afresh."""
    scores = Dmlab30Training()
    for _ in range(2):
        for level in order[:-1]:
            assert scores.add(level, DMLAB30[level].human) is None
        last = scores.add(order[-1], DMLAB30[order[-1]].human)
        assert last == pytest.approx(Dmlab30Scores(100.0, 100.0))


@given(st.permutations(TRAIN_LEVELS), st.integers(0, 30))
def test_training_scores_are_resumed(order: list[str], cut: int) -> None:
    """Interrupted anywhere, the scores are those of a run that was not."""
    whole, first, second = Dmlab30Training(), Dmlab30Training(), Dmlab30Training()
    games = [(level, float(number)) for number, level in enumerate([order[0], *order])]
    expected = [whole.add(*game) for game in games]
    found = [first.add(*game) for game in games[:cut]]
    second.restore(json.loads(json.dumps(first.state())))
    assert found + [second.add(*game) for game in games[cut:]] == expected
    assert expected[-1] is not None


def test_training_scores_are_of_means() -> None:
    """Several episodes of a level count by their mean; a level beyond human is capped in one."""
    scores = Dmlab30Training()
    for episode_return in (50.0, 58.0):
        assert scores.add("rooms_watermaze", episode_return) is None
    for level in set(TRAIN_LEVELS) - {"rooms_watermaze", "rooms_keys_doors_puzzle"}:
        assert scores.add(level, DMLAB30[level].random) is None
    found = scores.add("rooms_keys_doors_puzzle", 103.465)
    assert found == pytest.approx(Dmlab30Scores(300 / 30, 200 / 30))


def test_training_refuses_other_levels() -> None:
    """An episode of a level outside of the suite is an error that names it."""
    with pytest.raises(ValueError, match="'catch' is no level of DMLab-30"):
        Dmlab30Training().add("catch", 1.0)
