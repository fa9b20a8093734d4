"""What limits a run: plain decisions about the shares of its stages.

Environments, inference, learner, the way to actor hosts and the event loop work like machines in a
row: the one that is hardly ever idle limits the others, which wait for it.  Where all cores are
full that is no longer seen in wall time, since everybody waits for a core: then whoever uses most
of the cores limits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from asyncagent.config import Config
from asyncagent.placement import core_time
from asyncagent.stages import Limit, Stages

FULL = 0.9
"""Cores are full from this share on."""
LATE_MS = 100.0
"""An event loop that is so late, although cores are free, is held up by something."""


class Figure(NamedTuple):
    """A share that is known."""

    stage: str
    doing: str
    share: float
    """Of the time, or of the machine's cores; 0 to 1."""


def limit_of(
    stages: Stages, loop_lag_ms: float = math.nan, num_cores: float | None = None
) -> Limit:  # fmt: skip
    """What limits; empty where nothing does, or too little is known.

    ``num_cores``: the run's; None: this machine's.
    """
    shares = busy(stages)
    if not shares:
        return ""
    if cores_are_full(stages) and math.isfinite(stages.learner_cpu):
        used = _cores_used(stages, num_cores)
        return max(used, key=lambda stage: used[stage])
    if shares.get("event loop", 0.0) >= FULL or (loop_lag_ms >= LATE_MS and cores_free(stages)):
        return "event loop"
    limit = max(shares, key=lambda stage: shares[stage])
    return limit if shares[limit] >= 0.5 else ""


def busy(stages: Stages) -> dict[Limit, float]:
    """How much of the time each stage is at work, 0 to 1; those that there are and are known."""
    local = math.isfinite(stages.env_steps)
    found: dict[Limit, float] = {
        "environments": stages.env_steps if local else stages.hosts_step,
        "inference": stages.inference_computes + stages.inference_copies,
        "learner": stages.learner_computes + stages.learner_copies,
        # Hosts wait for a learner that has no time, too.
        "network": min(stages.hosts_wait, stages.learner_waits),
        "event loop": stages.loop_busy,
    }
    return {stage: share for stage, share in found.items() if math.isfinite(share)}


def cores_are_full(stages: Stages) -> bool:
    """Whether no core is free, and most of them work for this run."""
    return stages.cores_busy >= 0.5 and stages.cores_busy + or_0(stages.cores_taken) >= FULL


def cores_free(stages: Stages) -> bool:
    """Whether some core is, for whomever."""
    return all_cores(stages) < FULL


def all_cores(stages: Stages) -> float:
    """Share of the cores that works, for whomever."""
    return min(1.0, stages.cores_busy + or_0(stages.cores_taken))


def lacks_hosts(stages: Stages, config: Config, num_hosts: int | None = None) -> bool:
    """Whether nobody acts, since only hosts would, and none is there.

    ``num_hosts``: there; None: as many as have shares, which a host that has just come has not.
    """
    expected = bool(config.listen) and config.num_actors == 0 and bool(busy(stages))
    return expected and ("environments" not in busy(stages) if num_hosts is None else not num_hosts)


def decoding_cpu(stages: Stages, num_cores: float | None = None) -> float:
    """Share of the cores that takes hosts' messages in; nan where other things have no line, too.

    That is where this process steps environments.
    """
    if math.isfinite(stages.env_cpu) or not math.isfinite(stages.learner_cpu):
        return math.nan
    named = or_0(stages.inference_cpu) + stages.learner_cpu + _loop_cpu(stages, num_cores)
    return max(0.0, stages.cores_busy - named)


def figures(stages: Stages, num_cores: float | None = None) -> tuple[Figure, ...]:
    """All shares that are known, in words."""
    found = (
        Figure("environments", "stepping", stages.env_steps),
        Figure("environments", "waiting for actions", stages.env_waits_actions),
        Figure("environments", "waiting for the learner", stages.env_waits_learner),
        Figure("inference", "computing", stages.inference_computes),
        Figure("inference", "copying", stages.inference_copies),
        Figure("inference", "waiting for rows", stages.inference_waits),
        Figure("learner", "computing", stages.learner_computes),
        Figure("learner", "copying", stages.learner_copies),
        Figure("learner", "waiting for unrolls", stages.learner_waits),
        Figure("event loop", "of one core", stages.loop_busy),
        Figure("actor hosts", "stepping", stages.hosts_step),
        Figure("actor hosts", "waiting for the learner", stages.hosts_wait),
        Figure("cores", "used by this run", stages.cores_busy),
        Figure("cores", "by its environments", stages.env_cpu),
        Figure("cores", "by inference", stages.inference_cpu),
        Figure("cores", "by the learner", stages.learner_cpu),
        Figure("cores", "by decoding for hosts", decoding_cpu(stages, num_cores)),
        Figure("cores", "by other programs", stages.cores_taken),
    )
    return tuple(figure for figure in found if math.isfinite(figure.share))


def about_cores(stages: Stages) -> str:
    """What else a sentence should say of the cores, where they are not full of this run."""
    if not math.isfinite(stages.cores_busy):
        return ""
    if cores_free(stages):
        return f", cores are {percent(1 - all_cores(stages))} free"
    return f", other programs take {percent(stages.cores_taken)} of the cores"


def _cores_used(stages: Stages, num_cores: float | None) -> dict[Limit, float]:
    """Shares of the cores."""
    found: dict[Limit, float] = {
        "environments": or_0(stages.env_cpu),
        "inference": or_0(stages.inference_cpu),
        "learner": stages.learner_cpu,
    }
    decoding = decoding_cpu(stages, num_cores)
    if math.isfinite(decoding):
        return found | {"event loop": _loop_cpu(stages, num_cores), "decoding": decoding}
    return found | {"event loop": stages.cores_busy - sum(found.values())}


def _loop_cpu(stages: Stages, num_cores: float | None) -> float:
    return or_0(stages.loop_busy) / (core_time() if num_cores is None else num_cores)


def or_0(value: float) -> float:
    """nan is 0."""
    return value if math.isfinite(value) else 0.0


def percent(share: float) -> str:
    """Without digits after the point; a dash for nan."""
    return f"{100 * share:.0f}%" if math.isfinite(share) else "-"
