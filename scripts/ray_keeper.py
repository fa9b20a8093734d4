"""Which actor host belongs on which node, and when it is started (again): plain decisions.

No Ray here and no clock of its own; ``ray_actors.py`` carries the decisions out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

FIRST_BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0
STEADY_S = 60.0
"""A host that ran for so long before it died is started again as if it were the first time."""
SILENT_S = 30.0


class State(Enum):
    NO_NODE = "waits for a node"
    BACKOFF = "waits to start again"
    STARTING = "starting"
    SILENT = "does not answer"
    RUNNING = "running"
    ENDED = "ended by itself"
    REFUSED = "refused"


AT_REST = (State.ENDED, State.REFUSED)


class Node(NamedTuple):
    """A living machine of the cluster."""

    id: str
    hostname: str


class Answer(NamedTuple):
    """What a node says of its host; ``status`` is None while it runs, negative if a signal."""

    pid: int
    status: int | None
    line: str


@dataclass(eq=False)
class Place:
    """One host that should be running, wherever it is just now."""

    number: int
    node: Node | None = None
    state: State = State.NO_NODE
    since_s: float = 0.0
    heard_s: float = 0.0
    retry_s: float = 0.0
    starts: int = 0
    failures: int = 0  # in a row
    line: str = ""  # the last that it printed, or why it is not running

    def __str__(self) -> str:
        return f"host {self.number}" + (f" on {self.node.hostname}" if self.node else "")


def backoff_s(failures: int) -> float:
    """Seconds to wait after so many failures in a row: 1, 2, 4, ... 60."""
    return min(FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 16), MAX_BACKOFF_S)


@dataclass
class Keeper:
    """Decides which host starts where and when.

    ``hosts``: how many; -1: one on every node, nodes that join later included.  ``clock()`` gives
    seconds; ``report(line)`` takes every change of state.
    """

    hosts: int
    clock: Callable[[], float]
    report: Callable[[str], None]
    max_per_node: int = 1
    places: list[Place] = field(default_factory=list)
    _next: int = 0

    def __post_init__(self) -> None:
        for _ in range(self.hosts):
            self._add(None)

    @property
    def finished(self) -> bool:
        """Every host has ended, and none will be started again."""
        return bool(self.places) and all(place.state in AT_REST for place in self.places)

    def nodes_are(self, nodes: Iterable[Node]) -> None:
        """Take the cluster's living nodes: hosts of the others move, or go if one per node."""
        living = {node.id: node for node in nodes}
        for place in list(self.places):
            if place.node is None or place.node.id in living:
                continue
            self.report(f"{place}: the node is gone")
            if self.hosts < 0:
                self.places.remove(place)
            elif place.state in AT_REST:
                place.node = None
            else:
                place.node, place.failures, place.line = None, 0, "its node is gone"
                self._enter(place, State.NO_NODE)
        loads = dict.fromkeys(living, 0)
        for place in self.places:
            if place.node is not None:
                loads[place.node.id] += 1
        if self.hosts < 0:
            for id in [id for id, load in loads.items() if not load]:
                self._add(living[id])
            return
        for place in self.places:
            if place.state is State.NO_NODE and loads:
                id = min(loads, key=loads.__getitem__)
                if loads[id] < self.max_per_node:
                    loads[id] += 1
                    place.node, place.retry_s = living[id], self.clock()

    def due(self) -> list[Place]:
        """Hosts to start now; each counts as starting from here on."""
        now = self.clock()
        waiting = (State.NO_NODE, State.BACKOFF)
        due = [p for p in self.places if p.state in waiting and p.node and p.retry_s <= now]
        for place in due:
            place.starts += 1
            self._enter(place, State.STARTING)
        return due

    def answered(self, place: Place, answer: Answer) -> None:
        """Its node says how the host is."""
        place.heard_s = self.clock()
        place.line = answer.line
        if answer.status is None:
            if place.state is not State.RUNNING:
                self._enter(place, State.RUNNING, f" (pid {answer.pid})")
        elif answer.status == 0:
            self._enter(place, State.ENDED)
        elif answer.status == 2:
            self._enter(place, State.REFUSED)
        else:
            ending = f"signal {-answer.status}" if answer.status < 0 else f"status {answer.status}"
            self.lost(place, f"ended with {ending}" + (f": {answer.line}" if answer.line else ""))

    def lost(self, place: Place, why: str) -> None:
        """The host, or the Ray process that held it, is dead: start it again after a while."""
        now = self.clock()
        if place.state is State.RUNNING and now - place.since_s >= STEADY_S:
            place.failures = 0
        place.failures += 1
        place.line = why
        delay_s = backoff_s(place.failures)
        place.retry_s = now + delay_s
        self._enter(place, State.BACKOFF, f" in {delay_s:g} s")

    def watch(self) -> None:
        """Say so where nothing was heard of a host for long; it stays the node's business."""
        for place in self.places:
            expected = place.state in (State.STARTING, State.RUNNING)
            if expected and self.clock() - place.heard_s >= SILENT_S:
                place.line = f"Ray said nothing for {SILENT_S:g} s: no free CPU or GPU, or cut off"
                self._enter(place, State.SILENT)

    def summary(self) -> str:
        """How many are running, of how many."""
        running = sum(place.state is State.RUNNING for place in self.places)
        return f"{running} of {len(self.places)} hosts running"

    def _add(self, node: Node | None) -> None:
        now = self.clock()
        place = Place(self._next, node, since_s=now, retry_s=now)
        self._next += 1
        self.places.append(place)
        if node is None:
            self.report(f"{place}: {place.state.value}")

    def _enter(self, place: Place, state: State, more: str = "") -> None:
        place.state, place.since_s = state, self.clock()
        if state is State.STARTING:
            place.heard_s = place.since_s
        why = f" ({place.line})" if place.line and state is not State.RUNNING else ""
        self.report(f"{place}: {state.value}{more}{why}")
