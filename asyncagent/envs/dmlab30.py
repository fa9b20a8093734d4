"""The thirty levels of DMLab-30, with the scores that returns are measured against.

The figures are in ``dmlab30.json`` beside this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

NAME = "dmlab30"
"""The level name that stands for all thirty."""


class Dmlab30Level(NamedTuple):
    """One level of the suite."""

    train: str
    """The level that is learnt."""
    test: str
    """The level that is played to test it; for most the same."""
    human: float
    """A person's mean return per episode of the test level."""
    random: float
    """The same of a policy that acts at random."""


def _load() -> tuple[Dmlab30Level, ...]:
    table = json.loads((Path(__file__).parent / "dmlab30.json").read_text("utf-8"))
    return tuple(
        Dmlab30Level(row["train"], row["test"], float(row["human"]), float(row["random"]))
        for row in table["levels"]
    )


LEVELS = _load()
"""In the suite's order, in which groups of environments take them round robin."""
TRAIN_LEVELS = tuple(level.train for level in LEVELS)
TEST_LEVELS = tuple(level.test for level in LEVELS)

_TEST_OF = dict(zip(TRAIN_LEVELS, TEST_LEVELS, strict=True))
_TRAIN_OF = dict(zip(TEST_LEVELS, TRAIN_LEVELS, strict=True))


def is_suite_level(level_name: str) -> bool:
    """Whether it is one of the suite's levels, for training or for testing."""
    return level_name in _TEST_OF or level_name in _TRAIN_OF


def testing_level(level_name: str) -> str:
    """The level that tests what was learnt on ``level_name``; itself if the suite has no other."""
    return _TEST_OF.get(level_name, level_name)


def training_level(level_name: str) -> str:
    """The level to learn what ``level_name`` tests; itself if the suite has no other."""
    return _TRAIN_OF.get(level_name, level_name)
