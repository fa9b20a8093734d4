"""What a check says of itself."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

State: TypeAlias = Literal["passed", "failed", "not installed", "no reference"]


class Outcome(NamedTuple):
    """What came of one check."""

    state: State
    detail: str
    """One line."""


class Failed(Exception):
    """What is checked is not as it should be; the message is one line with the figures."""


class Absent(Exception):
    """There is nothing to check; the message is one line that says what is not there."""


def require(good: bool, what: str) -> None:
    """Raise Failed, with what was found, unless ``good``."""
    if not good:
        raise Failed(what)
