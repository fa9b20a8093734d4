"""Shares of time, with a clock that stands still between the lines."""

from __future__ import annotations

import math

import pytest

from asyncagent.tracks import Lag, Track


class Clock:
    """Stands where it is put."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_shares_of_the_time_since_the_report_before(clock: Clock) -> None:
    """Each state has the share of time that it lasted, of the time since the last report alone."""
    track = Track(3, clock)
    for state, seconds in ((1, 1.0), (2, 2.0), (1, 3.0), (0, 2.0)):
        track.enter(state)
        clock.now_s += seconds
    assert track.take() == pytest.approx([0.25, 0.5, 0.25])
    track.enter(2)
    clock.now_s += 5.0
    assert track.take() == pytest.approx([0.0, 0.0, 1.0])


def test_what_lasts_counts_in_every_report(clock: Clock) -> None:
    """A step of ten seconds is all of every second of it: never 0, and never 500% in the end."""
    track = Track(2, clock)
    track.enter(1)
    for _ in range(9):
        clock.now_s += 1.0
        assert track.take() == pytest.approx([0.0, 1.0])
    clock.now_s += 0.5
    track.enter(0)
    clock.now_s += 0.5
    assert track.take() == pytest.approx([0.5, 0.5])


def test_an_owner_that_moves_while_it_is_read(clock: Clock) -> None:
    """A change between reading the state and the clock puts no share below 0 or above 1."""
    track = Track(2, clock)
    clock.now_s += 1.0

    def late() -> float:
        track._clock = clock
        clock.now_s += 1.0  # the owner has moved on half a second ago, unseen
        now_s, clock.now_s = clock.now_s, clock.now_s - 0.5
        track.enter(1)
        clock.now_s = now_s
        return now_s

    track._clock = late
    assert track.take() == pytest.approx([1.0, 0.0])
    clock.now_s += 0.25
    shares = track.take()
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert shares[1] == 1.0


def test_no_time_no_shares(clock: Clock) -> None:
    """Two reports at the same moment: nobody knows."""
    assert all(math.isnan(share) for share in Track(2, clock).take())


def test_lag_of_a_loop_that_stops() -> None:
    """A stop of a second makes all that was due in it late, by half a second on average."""
    lag = Lag(0.1, 0.0)
    assert lag.wait_s(0.04) == pytest.approx(0.06)
    lag.ran(0.09)  # early: not yet due
    assert math.isnan(lag.take_ms())
    lag.ran(0.1)
    assert lag.take_ms() == pytest.approx(0.0, abs=1e-6)
    lag.ran(1.2)  # due at 0.2, 0.3, ... 1.2
    assert lag.take_ms() == pytest.approx(500.0)
    assert math.isnan(lag.take_ms())
    assert lag.wait_s(1.2) == pytest.approx(0.1)


def test_lag_is_a_mean() -> None:
    """One that is late among many that are not weighs as one."""
    lag = Lag(1.0, 0.0)
    for number in range(1, 10):
        lag.ran(float(number))
    lag.ran(10.5)
    assert lag.take_ms() == pytest.approx(50.0)
