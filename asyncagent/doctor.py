"""Judges a run by the shares of its stages: what limits it, the evidence, what to change."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from asyncagent.advice import Try, advise
from asyncagent.config import Config
from asyncagent.limits import Figure, busy, figures, lacks_hosts, limit_of, or_0, percent
from asyncagent.stages import Limit, Stages, Verdict

WINDOW_S = 60.0
"""A verdict while training is about so many seconds."""


class Account(NamedTuple):
    """A verdict with its reasons."""

    verdict: Verdict
    evidence: tuple[Figure, ...]
    tries: tuple[Try, ...]
    """What to try, the most promising first."""
    no_help: str
    """What will not help; empty: not known."""


def mean_stages(parts: Iterable[tuple[float, Stages]]) -> Stages:
    """Mean of (seconds, shares) of several reports, field by field; nan where nobody knows."""
    weighed = [(seconds, stages) for seconds, stages in parts if seconds > 0]

    def mean(field: int) -> float:
        known = [(s, stages[field]) for s, stages in weighed if math.isfinite(stages[field])]
        total_s = sum(s for s, _ in known)
        return sum(s * share for s, share in known) / total_s if known else math.nan

    return Stages(*(mean(field) for field in range(len(Stages._fields))))


def diagnose(
    stages: Stages, config: Config, loop_lag_ms: float = math.nan,
    num_cores: float | None = None, num_hosts: int | None = None,
) -> Account:  # fmt: skip
    """What limits a run of ``config``, the figures that say so, and what to change.

    ``num_cores``: the run's; None: this machine's. ``num_hosts``: that are there now, if known.
    """
    limit: Limit = limit_of(stages, loop_lag_ms, num_cores)
    if (not limit or num_hosts == 0) and lacks_hosts(stages, config, num_hosts):
        limit = "actor hosts"
    known = bool(busy(stages))
    sentence, tries, no_help = advise(limit, stages, config, num_cores) if known else ("", [], "")
    if or_0(stages.cores_taken) >= 0.2:
        others = f"other programs take {percent(stages.cores_taken)} of the cores"
        tries.insert(0, Try("leave the machine to this run", others))
    return Account(Verdict(limit, sentence), figures(stages, num_cores), tuple(tries), no_help)


class Doctor:
    """Follows the reports of one run. Belongs to one thread."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._parts: deque[tuple[float, Stages, float]] = deque()
        self._before_s = math.nan
        self._learns = False

    def see(
        self, time_s: float, frames_per_s: float, stages: Stages, loop_lag_ms: float,
        num_hosts: int | None = None,
    ) -> Verdict:  # fmt: skip
        """The verdict on the last ``WINDOW_S``, with the report of ``time_s``.

        Reports until the first that has learned are not judged: they have the beginning in them.
        But that nobody is there who would act is said at once.
        """
        seconds, self._before_s = time_s - self._before_s, time_s
        if not self._learns:
            self._learns = frames_per_s > 0
            if not lacks_hosts(stages, self._config, num_hosts):
                return Verdict()
            return diagnose(stages, self._config, num_hosts=num_hosts).verdict
        self._parts.append((seconds, stages, loop_lag_ms))
        while sum(s for s, _, _ in self._parts) - self._parts[0][0] >= WINDOW_S:
            self._parts.popleft()
        shares = mean_stages((s, part) for s, part, _ in self._parts)
        lag_ms = mean_lag_ms((s, lag) for s, _, lag in self._parts)
        return diagnose(shares, self._config, lag_ms, num_hosts=num_hosts).verdict


def mean_lag_ms(parts: Iterable[tuple[float, float]]) -> float:
    """Mean of (seconds, milliseconds) of several reports; nan of nothing."""
    known = [(s, lag_ms) for s, lag_ms in parts if math.isfinite(lag_ms) and s > 0]
    return sum(s * lag for s, lag in known) / sum(s for s, _ in known) if known else math.nan
