"""Who spends how much time on what: one track for each thing that does one thing at a time.

A track is told of every change of state by the one thread that owns it, and read by the reporter,
which counts the state that lasts, too.  No lock: what has been is one assignment.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

STEPS, WAITS_ACTIONS, WAITS_LEARNER, KEEPS_BOOKS = range(4)
"""States of a group of environments; the last: its rows are written down, on the event loop."""
WAITS, COPIES, COMPUTES = range(3)
"""States of a thread: of the inference, and of the learner."""
AWAY, HERE = range(2)
"""States of a group on an actor host that leaves inference to the learner."""

EARLY_S = 0.001
"""Timers go by milliseconds: what is no earlier is in time."""


class Track:
    """The states of one thing, and how long each has lasted."""

    __slots__ = ("_clock", "_now", "_seen", "_seen_s")

    def __init__(self, num_states: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """It begins in state 0; ``clock``: seconds."""
        self._clock = clock
        self._seen_s = clock()
        self._seen = [0.0] * num_states
        # The state, since when, and the seconds spent in each before: nobody writes to the list.
        self._now = (0, self._seen_s, self._seen)

    def enter(self, state: int) -> None:
        """From now on it is in ``state``; called by the owner alone."""
        now_s = self._clock()
        before, since_s, spent = self._now
        spent = spent.copy()
        spent[before] += now_s - since_s
        self._now = (state, now_s, spent)

    def take(self) -> list[float]:
        """Share of the time since the last call, or the beginning, that each state has had.

        The state that lasts counts until now.  nan where no time has passed.
        """
        state, since_s, spent = self._now
        now_s = self._clock()
        until_now = spent.copy()
        until_now[state] += max(0.0, now_s - since_s)
        elapsed_s = now_s - self._seen_s
        seconds = [now - seen for now, seen in zip(until_now, self._seen, strict=True)]
        self._seen_s, self._seen = now_s, until_now
        if elapsed_s <= 0:
            return [math.nan] * len(seconds)
        # The owner may have moved on since its state was read: by so much one may be below 0.
        return [min(max(0.0, part / elapsed_s), 1.0) for part in seconds]


class Lag:
    """How late a loop ran what was due every ``interval_s``: plain arithmetic.

    One long stop makes all that was due meanwhile late, each by less than the one before.
    """

    def __init__(self, interval_s: float, now_s: float) -> None:
        self._interval_s = interval_s
        self._due_s = now_s + interval_s
        self._late_s = 0.0
        self._count = 0

    def wait_s(self, now_s: float) -> float:
        """Until the next is due."""
        return max(0.0, self._due_s - now_s)

    def ran(self, now_s: float) -> None:
        """Whatever was due by now has been run just now."""
        late_s = now_s - self._due_s
        if late_s < -EARLY_S:
            return
        late_s = max(0.0, late_s)
        count = math.floor(late_s / self._interval_s) + 1
        self._late_s += count * late_s - self._interval_s * count * (count - 1) / 2
        self._count += count
        self._due_s += count * self._interval_s

    def take_ms(self) -> float:
        """Mean of what was due since the last call; nan of nothing."""
        mean_ms = 1000 * self._late_s / self._count if self._count else math.nan
        self._late_s, self._count = 0.0, 0
        return mean_ms
