"""What an actor host tells of its time, and what the learner makes of it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from asyncagent.config import resolve
from asyncagent.host_duties import _shares
from asyncagent.members import Member
from asyncagent.remote_group import RemoteGroup
from asyncagent.structs import ArraySpec, Discrete, EnvSpec
from asyncagent.tracks import AWAY, HERE, STEPS, WAITS_LEARNER, Track
from asyncagent.wire import PROTOCOL, Group, Hello, Ping

SPEC = EnvSpec(ArraySpec((1,), "float32"), Discrete(2), 1)
CONFIG = resolve("catch")


class Clock:
    """Stands where it is put."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def member(inference: Any = "host") -> Member:
    hello = Hello(PROTOCOL, b"0123456789abcdef", "far", inference, 2, 2, 1)
    return Member(hello, b"", [Group(0, "catch", 1, 0), Group(1, "catch", 1, 1)])


def test_a_host_tells_the_mean_of_its_groups() -> None:
    """Stepping and waiting for the learner, as shares of the time since the last Ping."""
    clock = Clock()
    tracks = [Track(4, clock), Track(4, clock)]
    assert _shares([]) == (0.0, 0.0)
    assert _shares(tracks) == (0.0, 0.0)
    tracks[1].enter(WAITS_LEARNER)
    clock.now_s = 1.0
    tracks[0].enter(WAITS_LEARNER)
    tracks[1].enter(STEPS)
    clock.now_s = 4.0
    assert _shares(tracks) == pytest.approx((0.5, 0.5))


def test_pings_become_a_report() -> None:
    """The mean of all Pings since the report before; the last figures where none has come."""
    host = member()
    assert math.isnan(host.report().waits) and math.isnan(host.report().env_steps)
    host.on_ping(Ping(1.0, 0.1, 2, 0.2, 0.7))
    host.on_ping(Ping(3.0, 0.2, 3, 0.4, 0.5))
    for _ in range(2):
        report = host.report()
        assert (report.env_steps, report.waits) == pytest.approx((0.3, 0.6))
        assert (report.round_trip_ms, report.reconnects) == (200.0, 3)


def test_waiting_for_our_inference_is_not_the_network() -> None:
    """Of a host's waiting, the time that its rows were here is taken off."""
    clock = Clock()
    host = member("learner")
    for slot in (0, 1):
        group = RemoteGroup(slot, SPEC, 1, "none", lambda act, part: None)
        group.track = Track(2, clock)
        host.remote_groups[slot] = group
    host.remote_groups[0].track.enter(HERE)
    host.remote_groups[1].track.enter(AWAY)
    clock.now_s = 10.0
    host.on_ping(Ping(1.0, 0.1, 0, 0.1, 0.8))
    assert host.report().waits == pytest.approx(0.3)
    clock.now_s = 20.0
    host.on_ping(Ping(1.0, 0.1, 0, 0.1, 0.2))
    assert host.report().waits == 0.0
