"""Which actor hosts a run has, and which groups of environments each of them runs.

Bookkeeping alone: no socket, no task.  Every group of a run has a number, its slot (the local
groups have the first ones), which decides its level; a lost host's slots are dealt out again
before there are new ones.  Indices of environments, which decide their seeds, never are.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import OrderedDict, deque
from typing import Any

from asyncagent.config import Config, family_of
from asyncagent.envs import levels_of
from asyncagent.metrics import HostReport
from asyncagent.remote_group import RemoteGroup
from asyncagent.tracks import HERE
from asyncagent.wire import Group, Hello, Ping, UnrollSent

MAX_HOSTS = 4096
MAX_GROUP = 256
"""Environments of one group of a host at most."""


class Figures:
    """Of one host, since its last report."""

    def __init__(self) -> None:
        self.frames = 0
        self.lag_sum = 0
        self.lag_rows = 0
        self.received_bytes = 0
        self.sent_bytes = 0
        self.pings = 0
        self.steps_sum = 0.0
        self.waits_sum = 0.0
        self.since_s = time.monotonic()


class Member:
    """One host that has been welcomed."""

    def __init__(self, hello: Hello, user: bytes, groups: list[Group]) -> None:
        """``user``: the public key that it showed."""
        self.hello = hello
        self.user = user
        self.groups = groups
        self.slots = {group.slot: group for group in groups}
        self.routing = b""
        self.past_routings: deque[bytes] = deque(maxlen=16)
        """Connections it had before: what still comes of them is old."""
        self.heard_s = 0.0
        self.received = 0
        """The last unroll that is here."""
        self.accepted = 0
        """The last unroll that has been counted."""
        self.may_skip = False
        """It may not know yet which unrolls went with its last membership, and leave them out."""
        self.inbox: deque[tuple[UnrollSent, list[Any]]] = deque()
        self.filled = asyncio.Event()
        self.remote_groups: dict[int, RemoteGroup] = {}
        self.tasks: list[asyncio.Task[None]] = []
        self.weights_wanted: int | None = None
        """Version that the host has, if it waits for newer ones."""
        self.weights_sent = -1
        self.weights_sent_s = 0.0
        self.complaints = 0
        self.round_trip_s = 0.0
        self.reconnects = 0
        self.figures = Figures()
        self._shares = (math.nan, math.nan)  # env_steps and waits of the report before

    @property
    def actors(self) -> int:
        """Environments."""
        return sum(group.num_envs for group in self.groups)

    def report(self) -> HostReport:
        """Since the last one."""
        figures, self.figures = self.figures, Figures()
        # Where rows wait for actions here, the host waits, too, and not for the connection.
        here = [group.track.take()[HERE] for group in self.remote_groups.values()]
        if figures.pings:
            waits = figures.waits_sum / figures.pings - sum(here) / max(1, len(here))
            self._shares = (figures.steps_sum / figures.pings, max(0.0, waits))
        seconds = max(self.figures.since_s - figures.since_s, 1e-9)
        return HostReport(
            actors=self.actors,
            frames_per_s=figures.frames / seconds,
            policy_lag_mean=figures.lag_sum / figures.lag_rows if figures.lag_rows else 0.0,
            received_bytes_per_s=figures.received_bytes / seconds,
            sent_bytes_per_s=figures.sent_bytes / seconds,
            round_trip_ms=1000 * self.round_trip_s,
            reconnects=self.reconnects,
            env_steps=self._shares[0],
            waits=self._shares[1],
        )

    def on_ping(self, ping: Ping) -> None:
        """What the host has to tell of itself."""
        self.round_trip_s, self.reconnects = ping.round_trip_s, ping.reconnects
        self.figures.pings += 1
        self.figures.steps_sum += ping.steps
        self.figures.waits_sum += ping.waits


class Members:
    """The hosts of one run."""

    def __init__(self, config: Config) -> None:
        self.present: dict[bytes, Member] = {}
        """By incarnation."""
        self.by_routing: dict[bytes, Member] = {}
        # Hosts that were lost: what they may still come back with.
        self._departed: OrderedDict[bytes, Member] = OrderedDict()
        self._dmlab = family_of(config.level_name) == "dmlab"
        self._levels = levels_of(config.level_name)
        self._free_slots: list[int] = []
        self._next_slot = config.num_groups
        self._next_env = config.num_actors

    def known(self, incarnation: bytes) -> Member | None:
        """A host that is here, or was."""
        return self.present.get(incarnation) or self._departed.get(incarnation)

    def connect(self, member: Member, routing: bytes) -> None:
        """From now on that is where the host is reached."""
        if routing != member.routing:
            # One that it had before it was lost may be another host's by now.
            if self.by_routing.get(member.routing) is member:
                del self.by_routing[member.routing]
            member.past_routings.append(member.routing)
        member.routing = routing
        self.by_routing[routing] = member

    def join(self, hello: Hello, user: bytes) -> Member | None:
        """A host that is not here: deal its groups; None if there are too many hosts.

        A host that was lost gets the groups that it had, if nobody else has them by now.  If it
        infers itself it can go on with them; if not, the unrolls they were in are gone, and its
        environments begin anew, as others.
        """
        if len(self.present) >= MAX_HOSTS:
            return None
        before = self._departed.pop(hello.incarnation, None)
        if before is None or not before.slots.keys() <= set(self._free_slots):
            groups = self._deal(hello)
        else:
            groups = before.groups
            self._free_slots = [slot for slot in self._free_slots if slot not in before.slots]
            heapq.heapify(self._free_slots)
            if hello.inference == "learner":
                groups = [self._group(group.slot, group.num_envs) for group in groups]
        member = Member(hello, user, groups)
        if before is not None:
            member.received = member.accepted = before.accepted
            member.may_skip = before.may_skip or before.received > before.accepted
            member.routing, member.past_routings = before.routing, before.past_routings
        self.present[hello.incarnation] = member
        return member

    def lose(self, member: Member, comes_back: bool) -> None:
        """A host has gone; ``comes_back``: perhaps not for good."""
        del self.present[member.hello.incarnation]
        self.by_routing.pop(member.routing, None)
        for slot in member.slots:
            heapq.heappush(self._free_slots, slot)
        member.inbox.clear()
        member.remote_groups = {}
        if comes_back:
            self._departed[member.hello.incarnation] = member
            if len(self._departed) > MAX_HOSTS:
                self._departed.popitem(last=False)

    def _deal(self, hello: Hello) -> list[Group]:
        count = self._num_groups(hello)
        size = hello.num_actors // count
        return [self._group(self._slot(), size) for _ in range(count)]

    def _num_groups(self, hello: Hello) -> int:
        """What was asked for, or one for each core, as far as groups of equal size allow it."""
        if self._dmlab:
            return hello.num_actors
        wanted = hello.num_groups or max(4, hello.num_cores)
        least = -(-hello.num_actors // MAX_GROUP)
        fitting = [n for n in range(least, hello.num_actors + 1) if hello.num_actors % n == 0]
        return max((n for n in fitting if n <= wanted), default=fitting[0])

    def _slot(self) -> int:
        """Those of lost hosts first, so that their levels are played again."""
        if self._free_slots:
            return heapq.heappop(self._free_slots)
        self._next_slot += 1
        return self._next_slot - 1

    def _group(self, slot: int, size: int) -> Group:
        self._next_env += size
        return Group(slot, self._levels[slot % len(self._levels)], size, self._next_env - size)
