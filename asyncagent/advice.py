"""What to change where a stage limits: flags that the run can be given, and that change something.

What helps is listed first, what the run would refuse is dropped, and only then a sentence is made
of what is left.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

from asyncagent.config import (
    IDENTITY_FLAGS,
    LEARNING_FLAGS,
    MAX_ACTORS_PER_COLUMN,
    Config,
    family_of,
    in_workers,
    num_levels,
    resolve,
)
from asyncagent.errors import ConfigError
from asyncagent.limits import (
    FULL,
    about_cores,
    all_cores,
    busy,
    cores_are_full,
    decoding_cpu,
    percent,
)
from asyncagent.placement import cores
from asyncagent.stages import Limit, Stages

MAX_POLICY_LAG = 30
"""Learning suffers from actions that are more updates old."""
# What a step, an inference or an update costs by: tune should try with the same.
_COSTS = (
    *("num_action_repeats", "atari_backend", "atari_protocol", "width", "height", "dataset_path"),
    *("renderer", "level_cache", "unroll_length", "batch_size", "epochs_per_batch", "optimizer"),
    *("net", "use_lstm", "device", "learner_device", "inference_device", "precision"),
    *("micro_batch_rows", "max_inference_rows"),
)


class Try(NamedTuple):
    """Something that may help."""

    what: str
    """Flags as one would type them, or a few words."""
    why: str


class _Change(NamedTuple):
    """What may help, if the run can be given it."""

    why: str
    helps: str
    """How the sentence calls it; empty: it does not."""
    flags: dict[str, Any]
    words: str
    """What else to do, or what instead of flags."""


class _Advice(NamedTuple):
    limits: str
    """The beginning of the sentence: what limits, and by which figures."""
    changes: list[_Change]
    """The most promising first."""
    useless: str = ""
    """The end of the sentence: what does not help, with its verb."""
    no_help: str = ""


class _Case(NamedTuple):
    stages: Stages
    config: Config
    num_cores: int


def advise(
    limit: Limit, stages: Stages, config: Config, num_cores: float | None = None
) -> tuple[str, list[Try], str]:  # fmt: skip
    """A sentence, what to try, the most promising first, and what does not help.

    ``num_cores``: the run's; None: this machine's.
    """
    case = _Case(stages, config, cores() if num_cores is None else math.ceil(num_cores))
    limits, changes, useless, no_help = _ADVICE.get(limit, _on_nothing)(case)
    if config.deterministic:
        why = "acting and learning take turns with it, on a thread each"
        words = "no --deterministic, in a new --logdir"
        changes.insert(0, _do(words, why, "leaving --deterministic out"))
    changes = [change for change in changes if _can_be(change, config)]
    helps = list(dict.fromkeys(change.helps for change in changes if change.helps))
    if helps:
        verb = "help" if helps[-1].endswith("s") else "helps"
        *first, last = helps
        listed = f"{', '.join(first)} or {last}" if first else last
        sentence = f"{limits}; {listed} {verb}" + (f", {useless}" if useless else "")
    else:
        sentence = f"{limits}; {useless} help" if useless else limits
    return sentence, [Try(_typed(change, config), change.why) for change in changes], no_help


def _set(why: str, helps: str = "", words: str = "", **flags: Any) -> _Change:
    return _Change(why, helps, flags, words)


def _do(words: str, why: str, helps: str = "") -> _Change:
    return _Change(why, helps, {}, words)


def _can_be(change: _Change, config: Config) -> bool:
    """Whether the run would accept the flags, and be another one with them."""
    try:
        changed = dataclasses.replace(config, **change.flags)
    except ConfigError:
        return False
    return changed != config or not change.flags


def _typed(change: _Change, config: Config) -> str:
    """As one would type it, to go on with the run if that can be."""
    parts = [f"--{name}={value}" for name, value in change.flags.items()]
    learning = [name for name in change.flags if name in LEARNING_FLAGS]
    if any(name in IDENTITY_FLAGS for name in change.flags):
        parts.append("in a new --logdir")
    elif learning:
        parts.append(f"--override={','.join(learning)}")
    return " ".join([*parts, *filter(None, [change.words])])


# Advice.


def _on_environments(case: _Case) -> _Advice:
    stages, config, _ = case
    no_help = "a faster GPU, more threads for learning"
    if cores_are_full(stages):
        changes = _hosts(config, "their cores step environments, too", "remote actor hosts")
        if not config.deterministic:
            cause = "environments scale with them"
            changes.insert(0, _do("a machine with more cores", cause, "more cores"))
            changes += _tune(config)
        return _Advice(
            f"environments limit: cores {percent(all_cores(stages))} busy",
            changes,
            "a faster GPU does not",
            f"{no_help}, more environments",
        )
    where = "environments" if math.isfinite(stages.env_steps) else "the hosts' environments"
    changes = _more_groups(
        config,
        "more step at once (policy_lag grows: keep it below 20)",
        "more environments",
    )
    changes += _env_threads(case)
    if config.listen:
        changes += _hosts(config, "more of them, or more environments on each", "more actor hosts")
    return _Advice(
        f"{where} limit: they step {percent(busy(stages)['environments'])} of the time"
        f"{about_cores(stages)}",
        changes,
        "a faster GPU does not",
        no_help,
    )


def _on_inference(case: _Case) -> _Advice:
    stages, config, num_cores = case
    changes = _cheaper_net(config, "inference_device")
    rows = 2 * max(config.min_inference_rows, config.group_size)
    if config.num_groups >= 4 and rows <= config.num_actors // 2:
        cause = "larger batches cost less per row"
        changes.append(_set(cause, "larger batches", min_inference_rows=rows))
    if cores_are_full(stages):
        limits = f"inference limits: cores {percent(all_cores(stages))} busy, most of them with it"
        useless = "more environments do not"
    else:
        share = percent(busy(stages)["inference"])
        limits = f"inference limits: its thread is busy {share} of the time"
        useless = "faster environments do not"
        threads = min(2 * config.inference_threads, num_cores)
        if threads > config.inference_threads and not _on_gpu(config, "inference_device"):
            cause = "on a CPU, where cores are free: not many are"
            changes.append(_set(cause, inference_threads=threads))
    if config.listen:
        changes.append(_host_infers("hosts infer for themselves"))
    else:
        changes += _hosts(config, "they infer for themselves", "actor hosts")
    return _Advice(limits, changes, useless, "faster environments, more threads for learning")


def _on_learner(case: _Case) -> _Advice:
    stages, config, num_cores = case
    changes = _cheaper_net(config, "learner_device")
    if config.epochs_per_batch > 1:
        cause = "one update of each batch (changes learning)"
        changes.insert(0, _set(cause, "fewer updates", epochs_per_batch=1))
    if cores_are_full(stages):
        cores_busy = percent(all_cores(stages))
        limits = f"the learner limits: cores {cores_busy} busy, most of them with learning"
    else:
        limits = f"the learner limits: it is busy {percent(busy(stages)['learner'])} of the time"
        threads = min(2 * config.learner_threads, num_cores)
        if threads > config.learner_threads and not _on_gpu(config, "learner_device"):
            cause = "on a CPU, where cores are free"
            changes.append(_set(cause, "more threads", learner_threads=threads))
    cause = "fewer, larger updates: pays on a GPU (changes learning)"
    changes.append(_set(cause, "larger batches", batch_size=2 * config.batch_size))
    return _Advice(
        limits,
        changes,
        "more environments or actor hosts do not",
        "more environments, more actor hosts, faster inference",
    )


def _on_network(case: _Case) -> _Advice:
    stages, config, _ = case
    changes = []
    if config.compression != "zstd":
        better = "lz4" if config.compression == "none" else "zstd"
        cause = "observations take a fraction of the bytes"
        changes.append(_set(cause, "compression", compression=better))
    if config.weights_precision == "float32":
        cause = "weights take half of the bytes"
        changes.append(_set(cause, "smaller weights", weights_precision="bfloat16"))
    changes.append(_host_infers("whole unrolls travel: no round trip per step"))
    lag = min(2 * config.max_policy_lag, MAX_POLICY_LAG)
    if lag > config.max_policy_lag:
        cause = "hosts wait less for weights (and act with older ones)"
        changes.append(_set(cause, max_policy_lag=lag))
    changes.append(_do("a faster link", "or hosts nearer to the learner", "a faster link"))
    return _Advice(
        f"the network limits: actor hosts wait {percent(stages.hosts_wait)} of the time, the "
        f"learner {percent(stages.learner_waits)}",
        changes,
        "more cores or a faster GPU do not",
        "more cores, a faster GPU, more environments per host",
    )


def _on_decoding(case: _Case) -> _Advice:
    stages, config, num_cores = case
    changes = []
    if config.compression != "none":
        lighter = "lz4" if config.compression == "zstd" else "none"
        cause = "costs less to undo, and takes more bytes"
        changes.append(_set(cause, "lighter compression", compression=lighter))
    changes.append(_host_infers("whole unrolls travel: fewer messages than one per step"))
    changes.append(_do("a machine with more cores", "for the learner", "more cores"))
    return _Advice(
        f"decoding limits: cores {percent(all_cores(stages))} busy, "
        f"{percent(decoding_cpu(stages, num_cores))} with what hosts send",
        changes,
        "a faster GPU or more actor hosts do not",
        "a faster GPU, more actor hosts, a faster link",
    )


def _on_event_loop(case: _Case) -> _Advice:
    stages, config, _ = case
    limits = "the event loop limits: something holds it up"
    if cores_are_full(stages):
        cores_busy = percent(all_cores(stages))
        limits = f"the event loop limits: cores {cores_busy} busy, most of them with it"
    elif stages.loop_busy >= FULL:
        share = percent(stages.loop_busy)
        limits = f"the event loop limits: its thread is busy {share} of the time"
    changes = []
    half, odd = divmod(config.num_groups, 2)
    # A group plays one level, on DeepMind Lab in one environment: there are no larger ones.
    levels_stay = half % num_levels(config.level_name) == 0
    if half >= 2 and not odd and levels_stay and family_of(config.level_name) != "dmlab":
        cause = "a group costs the loop as much as an environment alone"
        changes.append(_set(cause, "fewer, larger groups", num_groups=half))
    if config.switch_interval_ms > 0.5:
        cause = "other threads hold Python's lock less long"
        changes.append(_set(cause, switch_interval_ms=0.5))
    if config.listen:
        changes.append(_host_infers("whole unrolls travel: the loop sees no single step"))
    else:
        changes += _hosts(config, "hosts have loops of their own", "actor hosts")
    return _Advice(
        limits, changes, "a faster GPU or more cores do not", "a faster GPU, more cores"
    )  # fmt: skip


def _on_no_hosts(case: _Case) -> _Advice:
    hosts = _hosts(case.config, "on any machine that can reach the learner")
    (command,) = (change.words for change in hosts)
    return _Advice(f"no actor host is here, and nobody else acts: start {command}", hosts)


def _on_nothing(case: _Case) -> _Advice:
    stages, config, _ = case
    most = ", ".join(f"{stage} {percent(share)}" for stage, share in busy(stages).items())
    changes = _more_groups(config, "one steps while another's actions are computed", "more groups")
    if config.listen:
        changes += _hosts(config, "more of them, or more environments on each", "more actor hosts")
    if config.min_inference_rows > max(1, config.group_size):
        changes.append(_set("rows wait for others' no more", min_inference_rows=1))
    return _Advice(f"nothing limits for long, each waits for the other ({most})", changes)


_ADVICE: dict[Limit, Callable[[_Case], _Advice]] = {
    "environments": _on_environments,
    "inference": _on_inference,
    "learner": _on_learner,
    "network": _on_network,
    "event loop": _on_event_loop,
    "decoding": _on_decoding,
    "actor hosts": _on_no_hosts,
}


# Changes that several have.


def _more_groups(config: Config, why: str, helps: str) -> list[_Change]:
    """Up to twice as many of the same size; not so many that the policy lag is too large."""
    if not config.num_groups:
        return []
    levels = num_levels(config.level_name)
    most = MAX_ACTORS_PER_COLUMN * config.batch_size // config.group_size
    groups = min(2 * config.num_groups, most)
    if groups > levels:
        groups -= groups % levels  # every level has as many
    if groups <= config.num_groups:
        return []
    actors = groups * config.group_size
    return [_set(why, helps, num_actors=actors, num_groups=groups)]


def _env_threads(case: _Case) -> list[_Change]:
    config = case.config
    threads = min(2 * config.env_threads, config.group_size, case.num_cores)
    if in_workers(config.level_name) or threads <= config.env_threads:
        return []
    cause = "one group's environments step side by side"
    return [_set(cause, "more threads", env_threads=threads)]


def _cheaper_net(config: Config, device_flag: str) -> list[_Change]:
    """What makes forward passes and updates cheaper, where they are done on ``device_flag``."""
    changes = []
    if config.precision == "float32":
        cause = "where the hardware has it: up to twice as fast"
        changes.append(_set(cause, "bfloat16", precision="bfloat16"))
    if _on_gpu(config, device_flag):
        changes.append(_do("a faster GPU", "the same flags", "a faster GPU"))
    else:
        flag = "device" if getattr(config, device_flag) == "auto" else device_flag
        changes.append(_set("a GPU, or a faster one", "a GPU", **{flag: "cuda"}))
    if config.net in ("deep", "ancestor"):
        cause = "a third of the work or less (another agent)"
        changes.append(_set(cause, "a smaller net", net="shallow"))
    return changes


def _on_gpu(config: Config, device_flag: str) -> bool:
    """Whether flags say so; an ``auto`` does not."""
    own: str = getattr(config, device_flag)
    return (config.device if own == "auto" else own).startswith("cuda")


def _hosts(config: Config, why: str, helps: str = "") -> list[_Change]:
    """Actor hosts, or more of them."""
    if not config.listen:
        cause = f"then asyncagent actors on other machines: {why}"
        flags = {"listen": "tcp://0.0.0.0:5555", "secret_key": "...", "allowed_keys": "..."}
        return [_set(cause, helps, **flags)]
    transport, _, place = config.listen.partition("://")
    address = config.listen
    if transport == "tcp":
        host, _, port = place.rpartition(":")
        host = "learner" if host in ("*", "0.0.0.0", "[::]") else host
        address = f"tcp://{host}:{'PORT' if port in ('*', '0') else port}"
    keys = " --secret_key=... --learner_key=..." if config.secret_key else ""
    return [_do(f"asyncagent actors --connect={address}{keys}", why, helps)]


def _host_infers(why: str) -> _Change:
    return _do("asyncagent actors --inference=host", why)


def _tune(config: Config) -> list[_Change]:
    """Find the flags for the machine, with the same network and work as the run's."""
    if not config.num_actors:
        return []
    preset = resolve(config.level_name, config.preset)
    flags = [f"--level_name={config.level_name}"]
    if config.preset != Config.preset:
        flags.append(f"--preset={config.preset}")
    for name in _COSTS:
        value = getattr(config, name)
        if value == getattr(preset, name):
            continue
        switch = f"--{name}" if value is True else f"--no_{name}"
        flags.append(switch if isinstance(value, bool) else f"--{name}={value}")
    return [_do(f"asyncagent tune {shlex.join(flags)}", "measures the fastest flags")]
