"""Which faults there are, and in which order a seed sends them: plain decisions."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping
from typing import Literal, NamedTuple

Hit = Literal["worker", "host", "port", "learner"]

LIMIT_S: Mapping[Hit, float] = {"worker": 15.0, "host": 15.0, "port": 15.0, "learner": 30.0}
"""Longest that frames may take to go on, and all that was there to be back, by what was hit."""

ENV_TIMEOUT_S = 8.0
"""After which a worker that does not answer is given up, and replaced."""
HOLDS_S: Mapping[str, tuple[float, float]] = {
    "stop_worker": (2.0, 18.0),
    "stop_host": (2.0, 12.0),
    "cut_host": (2.0, 12.0),
    "stop_learner": (2.0, 12.0),
    "no_descriptors": (2.0, 2.0),
    "full_disk": (10.0, 10.0),
}
"""How long it is held. A worker is given up after ENV_TIMEOUT_S, a host is missed after 7 s: each
is sometimes held for longer, sometimes not. In a full disk's time two checkpoints are due."""


class Kind(NamedTuple):
    """One kind of fault."""

    hits: Hit
    needs: str
    """What a run must have: "workers", "hosts" (then it has a port, too), or "" for any."""
    what: str


KINDS: Mapping[str, Kind] = {
    "kill_worker": Kind("worker", "workers", "SIGKILL of a worker process"),
    "stop_worker": Kind("worker", "workers", "SIGSTOP of a worker, SIGCONT 2 to 18 s later"),
    "close_descriptors": Kind("worker", "workers", "a worker's file descriptors are closed"),
    "no_descriptors": Kind(
        "worker", "workers", "the learner may open no file for 2 s, in which a worker is killed"
    ),
    "kill_host": Kind("host", "hosts", "SIGKILL of an actor host, started again"),
    "stop_host": Kind("host", "hosts", "SIGSTOP of an actor host, SIGCONT 2 to 12 s later"),
    "end_host": Kind("host", "hosts", "SIGTERM to an actor host: status 0, started again"),
    "cut_host": Kind(
        "host", "hosts", "nothing passes between a host and its learner for 2 to 12 s"
    ),
    "reset_host": Kind("host", "hosts", "a host's connection is reset"),
    "garbage": Kind("port", "hosts", "random bytes, HTTP, TLS and silence on the learner's port"),
    "malformed_zmtp": Kind("port", "hosts", "a ZMTP greeting, then frames that are none"),
    "wrong_key": Kind("port", "hosts", "clients with a key that is not allowed, and with none"),
    "nonsense": Kind("port", "hosts", "messages that mean nothing, with a key that is allowed"),
    "kill_learner": Kind("learner", "", "SIGKILL of the learner, started again"),
    "stop_learner": Kind("learner", "", "SIGSTOP of the learner, SIGCONT 2 to 12 s later"),
    "end_learner": Kind("learner", "", "SIGTERM to the learner: status 0, nothing lost, resumed"),
    "power_cut": Kind(
        "learner", "", "SIGKILL of all processes at once; the files written last are torn"
    ),
    "damaged_checkpoint": Kind(
        "learner", "", "SIGKILL of the learner; its newest checkpoint is cut, flipped or emptied"
    ),
    "full_disk": Kind("learner", "", "the disk of checkpoints and metrics is full for 10 s"),
}


class Fault(NamedTuple):
    """One fault to come."""

    number: int
    kind: str
    run: str
    """Name of the run that it strikes."""
    seed: str
    """Of what else is chosen: which worker, for how long."""


def plan(
    seed: int, runs: Mapping[str, Collection[str]], kinds: Collection[str] = tuple(KINDS)
) -> Iterator[Fault]:
    """Faults without end: in rounds, so that after any number no kind is more than one ahead.

    Args:
      runs: by name, what the run has: "workers", "hosts".
    """
    choice = random.Random(seed)
    number = 0
    while True:
        for kind in choice.sample(sorted(kinds), len(kinds)):
            needs = KINDS[kind].needs
            fitting = sorted(name for name, has in runs.items() if not needs or needs in has)
            if fitting:
                number += 1
                yield Fault(number, kind, choice.choice(fitting), f"{seed}:{number}")
