"""Programs for tests to play: statements of any kind, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from hypothesis import strategies as st

Program: TypeAlias = list[tuple[str, int]]
"""Statements: their names, and a number from which each makes what it needs."""


def statements_of(player: type) -> list[str]:
    """Names of the statements that a class can play: its methods ``do_...``."""
    return [name.removeprefix("do_") for name in vars(player) if name.startswith("do_")]


def programs(names: Sequence[str]) -> st.SearchStrategy[Program]:
    """About thirty statements; a name that stands there more often is drawn more often."""
    statements = st.tuples(st.sampled_from(names), st.integers(0, 60))
    # Of lists, as one list would have half a dozen statements on average.
    paragraphs = st.lists(st.lists(statements, max_size=12), max_size=12)
    return paragraphs.map(lambda whole: [one for paragraph in whole for one in paragraph])
