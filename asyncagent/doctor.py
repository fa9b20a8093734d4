"""What limits a run, and what to change: plain decisions about the shares of its stages.

Environments, inference, learner, the way to actor hosts and the event loop work like machines in a
row: the one that is hardly ever idle limits the others, which wait for it.  Where all cores are
full that is no longer seen in wall time, since everybody waits for a core: then whoever uses most
of the cores limits.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from asyncagent.config import Config, in_workers
from asyncagent.stages import Limit, Stages, Verdict

FULL = 0.9
"""Cores are full from this share on."""
LATE_MS = 100.0
"""An event loop that is so late, although cores are free, is held up by something."""
WINDOW_S = 60.0
"""A verdict while training is about so many seconds."""


class Try(NamedTuple):
    """Something that may help."""

    what: str
    """Flags as one would type them, or a few words."""
    why: str


class Figure(NamedTuple):
    """A share that is known."""

    stage: str
    doing: str
    share: float
    """Of the time, or of the machine's cores; 0 to 1."""


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
    return stages.cores_busy >= 0.5 and stages.cores_busy + _or_0(stages.cores_taken) >= FULL


def limit_of(stages: Stages, loop_lag_ms: float = math.nan) -> Limit:
    """What limits; empty where nothing does, or too little is known."""
    shares = busy(stages)
    if not shares:
        return ""
    full = cores_are_full(stages)
    if full and math.isfinite(stages.learner_cpu):
        used = _cpu(stages)
        return max(used, key=lambda stage: used[stage])
    if shares.get("event loop", 0.0) >= FULL or (loop_lag_ms >= LATE_MS and _cores_free(stages)):
        return "event loop"
    limit = max(shares, key=lambda stage: shares[stage])
    return limit if shares[limit] >= 0.5 else ""


def diagnose(stages: Stages, config: Config, loop_lag_ms: float = math.nan) -> Account:
    """What limits a run of ``config``, the figures that say so, and what to change."""
    limit = limit_of(stages, loop_lag_ms)
    full = cores_are_full(stages)
    advise = _ADVICE.get(limit, _on_nothing)
    sentence, tries, no_help = advise(stages, config, full)
    if limit == "" and not busy(stages):
        sentence, tries = "", []
    if _or_0(stages.cores_taken) >= 0.2:
        others = f"other programs take {_percent(stages.cores_taken)} of the cores"
        tries.insert(0, Try("leave the machine to this run", others))
    return Account(Verdict(limit, sentence), figures(stages), tuple(tries), no_help)


class Doctor:
    """Follows the reports of one run. Belongs to one thread."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._parts: deque[tuple[float, Stages, float]] = deque()
        self._before_s = math.nan
        self._learns = False

    def see(
        self, time_s: float, frames_per_s: float, stages: Stages, loop_lag_ms: float
    ) -> Verdict:  # fmt: skip
        """The verdict on the last ``WINDOW_S``, with the report of ``time_s``.

        Reports until the first that has learned are not judged: they have the beginning in them.
        """
        seconds, self._before_s = time_s - self._before_s, time_s
        if not self._learns:
            self._learns = frames_per_s > 0
            return Verdict()
        self._parts.append((seconds, stages, loop_lag_ms))
        while sum(s for s, _, _ in self._parts) - self._parts[0][0] >= WINDOW_S:
            self._parts.popleft()
        shares = mean_stages((s, part) for s, part, _ in self._parts)
        lag_ms = mean_lag_ms((s, lag) for s, _, lag in self._parts)
        return diagnose(shares, self._config, lag_ms).verdict


def mean_lag_ms(parts: Iterable[tuple[float, float]]) -> float:
    """Mean of (seconds, milliseconds) of several reports; nan of nothing."""
    known = [(s, lag_ms) for s, lag_ms in parts if math.isfinite(lag_ms) and s > 0]
    return sum(s * lag for s, lag in known) / sum(s for s, _ in known) if known else math.nan


# Advice: (stages, config, cores are full) -> sentence, what to try, what does not help.

_Advice = tuple[str, list[Try], str]


def _on_environments(stages: Stages, config: Config, full: bool) -> _Advice:
    no_help = "a faster GPU, more threads for learning"
    tries = []
    if full:
        sentence = (
            f"environments limit: cores {_percent(_all_cores(stages))} busy; more cores or remote "
            "actor hosts help, a faster GPU does not"
        )
        if not config.listen:
            tries.append(
                Try(
                    "--listen=tcp://0.0.0.0:5555 --secret_key=... --allowed_keys=...",
                    "then asyncagent actors on other machines: their cores step environments, too",
                )
            )
        tries.append(Try("a machine with more cores", "environments scale with them"))
        tries.append(
            Try(f"asyncagent tune --level_name={config.level_name}", "measures the fastest flags")
        )
        return sentence, tries, f"{no_help}, more environments"
    where = "environments" if math.isfinite(stages.env_steps) else "the hosts' environments"
    sentence = (
        f"{where} limit: they step {_percent(busy(stages)['environments'])} of the time"
        f"{_about_cores(stages)}; more environments at once help, a faster GPU does not"
    )
    if config.num_actors:
        twice = f"--num_actors={2 * config.num_actors} --num_groups={2 * config.num_groups}"
        tries.append(Try(twice, "more step at once (policy_lag grows: keep it below 20)"))
        if not in_workers(config.level_name):
            threads = min(2 * config.env_threads, max(2, config.group_size))
            tries.append(
                Try(f"--env_threads={threads}", "one group's environments step side by side")
            )
    if config.listen:
        tries.append(Try("asyncagent actors --num_actors=...", "more of them, or more per host"))
    return sentence, tries, no_help


def _on_inference(stages: Stages, config: Config, full: bool) -> _Advice:
    tries = _faster_net(config)
    rows = max(2 * config.min_inference_rows, 2 * config.group_size)
    if config.num_groups >= 4 and rows <= config.num_actors // 2:
        tries.append(Try(f"--min_inference_rows={rows}", "larger batches cost less per row"))
    if full:
        sentence = (
            f"inference limits: cores {_percent(_all_cores(stages))} busy, most of them with it; "
            "a GPU, bfloat16 or a smaller net helps, more environments do not"
        )
    else:
        sentence = (
            f"inference limits: its thread is busy {_percent(busy(stages)['inference'])} of the "
            "time; larger batches, a GPU or a smaller net help, faster environments do not"
        )
        threads = 2 * config.inference_threads
        tries.append(
            Try(f"--inference_threads={threads}", "on a CPU, where cores are free: not many are")
        )
    if not config.listen:
        tries.append(
            Try("--listen=... and asyncagent actors --inference=host", "hosts infer for themselves")
        )
    return sentence, tries, "faster environments, more threads for learning"


def _on_learner(stages: Stages, config: Config, full: bool) -> _Advice:
    tries = _faster_net(config)
    if config.epochs_per_batch > 1:
        tries.insert(0, Try("--epochs_per_batch=1", "one update of each batch (changes learning)"))
    if full:
        sentence = (
            f"the learner limits: cores {_percent(_all_cores(stages))} busy, most of them with "
            "learning; a GPU or bfloat16 helps, more environments or actor hosts do not"
        )
    else:
        sentence = (
            f"the learner limits: it is busy {_percent(busy(stages)['learner'])} of the time; a "
            "faster GPU or cheaper updates help, more environments or actor hosts do not"
        )
        threads = 2 * config.learner_threads
        tries.append(Try(f"--learner_threads={threads}", "on a CPU, where cores are free"))
    tries.append(
        Try(
            f"--batch_size={2 * config.batch_size}",
            "fewer, larger updates: pays on a GPU (changes learning)",
        )
    )
    return sentence, tries, "more environments, more actor hosts, faster inference"


def _on_network(stages: Stages, config: Config, full: bool) -> _Advice:
    sentence = (
        f"the network limits: actor hosts wait {_percent(stages.hosts_wait)} of the time, the "
        f"learner {_percent(stages.learner_waits)}; compression or a faster link helps, more cores "
        "or a faster GPU do not"
    )
    tries = []
    if config.compression != "zstd":
        better = "lz4" if config.compression == "none" else "zstd"
        tries.append(Try(f"--compression={better}", "observations take a fraction of the bytes"))
    if config.weights_precision == "float32":
        tries.append(Try("--weights_precision=bfloat16", "weights take half of the bytes"))
    tries.append(
        Try("asyncagent actors --inference=host", "whole unrolls travel: no round trip per step")
    )
    lag = 2 * config.max_policy_lag
    tries.append(
        Try(f"--max_policy_lag={lag}", "hosts wait less for weights (and act with older ones)")
    )
    return sentence, tries, "more cores, a faster GPU, more environments per host"


def _on_event_loop(stages: Stages, config: Config, full: bool) -> _Advice:
    sentence = (
        f"the event loop limits: its thread is busy {_percent(stages.loop_busy)} of the time; "
        "fewer, larger groups help, a faster GPU or more cores do not"
    )
    if stages.loop_busy < FULL:
        sentence = (
            "the event loop limits: something holds it up; fewer, larger groups help, a faster GPU "
            "or more cores do not"
        )
    tries = []
    if config.num_groups >= 4 and config.num_groups % 2 == 0:
        half = config.num_groups // 2
        tries.append(
            Try(f"--num_groups={half}", "a group costs the loop as much as an environment alone")
        )
    if config.switch_interval_ms > 0.5:
        tries.append(Try("--switch_interval_ms=0.5", "other threads hold Python's lock less long"))
    tries.append(
        Try("--listen=... and asyncagent actors --inference=host", "hosts have loops of their own")
    )
    return sentence, tries, "a faster GPU, more cores"


def _on_nothing(stages: Stages, config: Config, full: bool) -> _Advice:
    shares = busy(stages)
    most = ", ".join(f"{stage} {_percent(share)}" for stage, share in shares.items())
    sentence = f"nothing limits for long, each waits for the other ({most}); more groups help"
    tries = []
    if config.deterministic:
        tries.append(Try("no --deterministic", "acting and learning take turns with it"))
    elif config.num_actors:
        twice = f"--num_actors={2 * config.num_actors} --num_groups={2 * config.num_groups}"
        tries.append(Try(twice, "one steps while another's actions are computed"))
    if config.min_inference_rows > max(1, config.group_size):
        tries.append(Try("--min_inference_rows=1", "rows wait for others' no more"))
    return sentence, tries, ""


_ADVICE: dict[Limit, Callable[[Stages, Config, bool], _Advice]] = {
    "environments": _on_environments,
    "inference": _on_inference,
    "learner": _on_learner,
    "network": _on_network,
    "event loop": _on_event_loop,
}


def _faster_net(config: Config) -> list[Try]:
    """What makes forward passes and updates cheaper."""
    tries = []
    if config.precision == "float32":
        tries.append(Try("--precision=bfloat16", "where the hardware has it: up to twice as fast"))
    if config.device in ("auto", "cpu"):
        tries.append(Try("--device=cuda", "a GPU, or a faster one"))
    if config.net in ("deep", "ancestor"):
        tries.append(Try("--net=shallow", "a third of the work or less (another agent)"))
    return tries


# Figures.


def figures(stages: Stages) -> tuple[Figure, ...]:
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
        Figure("cores", "by other programs", stages.cores_taken),
    )
    return tuple(figure for figure in found if math.isfinite(figure.share))


def _cpu(stages: Stages) -> dict[Limit, float]:
    """Shares of the cores."""
    found: dict[Limit, float] = {
        "environments": _or_0(stages.env_cpu),
        "inference": _or_0(stages.inference_cpu),
        "learner": _or_0(stages.learner_cpu),
    }
    found["event loop"] = stages.cores_busy - sum(found.values())
    return found


def _about_cores(stages: Stages) -> str:
    """What else a sentence should say of the cores, where they are not full of this run."""
    if not math.isfinite(stages.cores_busy):
        return ""
    if _cores_free(stages):
        return f", cores are {_percent(1 - _all_cores(stages))} free"
    return f", other programs take {_percent(stages.cores_taken)} of the cores"


def _cores_free(stages: Stages) -> bool:
    return _all_cores(stages) < FULL


def _all_cores(stages: Stages) -> float:
    """Share of the cores that works, for whomever."""
    return min(1.0, stages.cores_busy + _or_0(stages.cores_taken))


def _or_0(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if math.isfinite(share) else "-"
