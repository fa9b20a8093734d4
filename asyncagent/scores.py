"""Human-normalised scores: 0 is a random policy, 100 a human tester.

Figures per level are in ``envs/atari57.json`` (57 games, no-op starts) and ``envs/dmlab30.json``
(Espeholt et al. 2018, arXiv 1802.01561, appendix B; those of the *test* levels).  DMLab-30's
score is the mean over its 30 levels, each level's cut off at 100 in the capped variant.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from asyncagent.envs.dmlab30 import LEVELS, is_suite_level, training_level


class Reference(NamedTuple):
    """Mean undiscounted returns per episode that a level's scores are measured by."""

    human: float
    random: float


class Dmlab30Scores(NamedTuple):
    """DMLab-30's two scores; no_cap rewards levels beyond human, cap_100 breadth alone."""

    no_cap: float
    cap_100: float


_ATARI57 = json.loads((Path(__file__).parent / "envs" / "atari57.json").read_text("utf-8"))
ATARI = {game: Reference(**figures) for game, figures in _ATARI57["games"].items()}
"""By game, as in ``atari_<game>``."""
DMLAB30 = {level.train: Reference(level.human, level.random) for level in LEVELS}
"""By *training* level, in the suite's order; the figures are the test level's."""


def human_normalised(mean: float, human: float, random: float) -> float:
    """100·(mean − random)/(human − random), of mean returns per episode."""
    return 100.0 * (mean - random) / (human - random)


def atari_human_normalised(game: str, mean: float) -> float | None:
    """Score of a mean whole-game return at ``game``; None if it is not among the 57."""
    figures = ATARI.get(game)
    return None if figures is None else human_normalised(mean, *figures)


def dmlab30_human_normalised(level_name: str, mean: float) -> float | None:
    """Score of a mean return, by training or test name; None if the level is not of DMLab-30."""
    if not is_suite_level(level_name):
        return None
    return human_normalised(mean, *DMLAB30[training_level(level_name)])


def dmlab30_score(returns: Mapping[str, Sequence[float]], cap: float | None) -> float:
    """Mean of the 30 levels' human-normalised scores.

    Args:
      returns: undiscounted episode returns of every level, by its training or its test name.
      cap: most that one level counts for, 100 in the literature; None: no limit.

    Raises:
      ValueError: a level is missing, has no episode, is unknown, or is there by both its names.
    """
    means: dict[str, float] = {}
    for level_name, of_level in returns.items():
        level = _training_level(level_name)
        if level in means:
            raise ValueError(f"{level} is given twice: as training and as test level")
        if len(of_level):
            means[level] = math.fsum(of_level) / len(of_level)
    return _score(means, cap)


class Dmlab30Training:
    """Scores during training: one pair whenever all 30 levels have ended an episode again."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def state(self) -> dict[str, list[float]]:
        """By level: the sum of its episodes' returns since the last scores, and their number."""
        return {level: [total, self._counts[level]] for level, total in self._sums.items()}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Go on from what ``state()`` gave."""
        self._sums = {level: total for level, (total, _) in state.items()}
        self._counts = {level: int(count) for level, (_, count) in state.items()}

    def add(self, level_name: str, episode_return: float) -> Dmlab30Scores | None:
        """Account an episode; returns the scores, and starts over, once every level has one.

        Episodes are scored by the test levels' figures, as the literature's training curves are.

        Raises:
          ValueError: ``level_name`` is neither a training nor a test level of DMLab-30.
        """
        level = _training_level(level_name)
        self._sums[level] = self._sums.get(level, 0.0) + episode_return
        self._counts[level] = self._counts.get(level, 0) + 1
        if len(self._counts) < len(DMLAB30):
            return None
        means = {level: total / self._counts[level] for level, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return Dmlab30Scores(_score(means, None), _score(means, 100.0))


def _training_level(level_name: str) -> str:
    if not is_suite_level(level_name):
        raise ValueError(f"{level_name!r} is no level of DMLab-30")
    return training_level(level_name)


def _score(means: Mapping[str, float], cap: float | None) -> float:
    missing = [level for level in DMLAB30 if level not in means]
    if missing:
        raise ValueError(f"DMLab-30's score needs an episode of {', '.join(missing)}")
    limit = math.inf if cap is None else cap
    # In this order min() keeps what is no number, instead of making it a perfect score.
    scores = [
        min(human_normalised(means[level], *figures), limit) for level, figures in DMLAB30.items()
    ]
    return math.fsum(scores) / len(scores)
