"""Builds what a run is made of: devices, environments, networks, and what a checkpoint says."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from asyncagent.bodies import has_image
from asyncagent.checkpoint import load_checkpoint
from asyncagent.config import MAX_ACTORS_PER_COLUMN, Config
from asyncagent.envs import levels_of, make_group, usable_spec
from asyncagent.envs.base import EnvGroup
from asyncagent.learner import Learner
from asyncagent.lockstep import Begin, begin_lockstep
from asyncagent.metrics import Counters
from asyncagent.models import make_net
from asyncagent.placement import keep_freed_memory, lower_priority
from asyncagent.policy import Policy, resolve_devices, resolve_precision
from asyncagent.remote import Listener, make_listener
from asyncagent.saving import resume
from asyncagent.structs import EnvSpec
from asyncagent.threads import NamedThread
from asyncagent.watchdog import Watchdog, of_thread

_log = logging.getLogger(__name__)


class Parts(NamedTuple):
    """What a run is made of; nothing of it runs yet but the environments."""

    groups: list[EnvGroup]
    policy: Policy
    learner: Learner
    counters: Counters
    spec: EnvSpec
    listener: Listener | None
    """None: no actor hosts."""
    begin: Begin | None
    """Where a deterministic run begins; None: it is none."""
    resumed: dict[str, Any] | None
    """The checkpoint's state; None: the run is new."""


async def build(config: Config, logdir: Path, watchdog: Watchdog) -> Parts:
    """Build a run, or the rest of the one found in ``logdir``. UsageError, CheckpointError."""
    torch.set_num_threads(1)
    keep_freed_memory()
    sys.setswitchinterval(config.switch_interval_ms / 1000)
    device, acting = resolve_devices(config)
    dtype = resolve_precision(config.precision, device)
    where = str(device) if acting == device else f"{device}, inference on {acting}"
    _log.info("device %s, precision %s", where, str(dtype).removeprefix("torch."))
    builder = NamedThread("build-envs")
    builder.submit(lambda: lower_priority(config.env_niceness))
    try:
        return await watchdog.during(
            _build(config, logdir, device, acting, dtype, builder),
            lambda: {"build-envs": of_thread(builder)},
        )
    finally:
        builder.close()


async def _build(
    config: Config, logdir: Path, device: torch.device, acting: torch.device, dtype: torch.dtype,
    builder: NamedThread,
) -> Parts:  # fmt: skip
    listener = make_listener(config) if config.listen else None
    _warn(config)
    spec = await builder.run(usable_spec, config)
    if config.net == "mlp" and has_image(spec.observation):
        _log.warning("net=mlp takes an image as so many numbers; try --net=shallow")
    net = make_net(config.net, spec, config.use_lstm, config.seed)
    policy = Policy(
        net,
        spec.actions,
        acting,
        dtype,
        config.seed,
        config.inference_threads,
        random_actions=config.benchmark_mode,
    )
    learner = Learner(config, net, spec.actions, device, dtype, policy, spec.observation)
    time_s = 0.0
    found = load_checkpoint(logdir)
    if found is not None:
        path, state = found
        time_s = resume(config, path, state, learner, policy)
        _log.info("resumed from %s", path)
    groups = [
        await builder.run(
            lambda index=index: make_group(
                config,
                level_name=level_of_group(config, index),
                num_envs=config.group_size,
                first_env_index=index * config.group_size,
                seed=env_seed(config, learner),
            )
        )
        for index in range(config.num_groups)
    ]
    resumed = None if found is None else found[1]
    begin = None
    if config.deterministic:
        begin = await begin_lockstep(groups, resumed, policy.initial_state)
    counters = Counters(config.num_action_repeats, learner.frames, learner.updates, time_s)
    return Parts(groups, policy, learner, counters, spec, listener, begin, resumed)


def _warn(config: Config) -> None:
    """Of flags that are allowed and seldom meant."""
    if config.benchmark_mode:
        _log.warning("benchmark_mode: actions are random, whatever the policy says")
    if config.num_actors > MAX_ACTORS_PER_COLUMN * config.batch_size:
        _log.warning(
            "num_actors=%d is more than %d times batch_size=%d: actions will be learned from "
            "many updates late, and beyond 20 to 30 that hurts (policy_lag in the reports)",
            config.num_actors,
            MAX_ACTORS_PER_COLUMN,
            config.batch_size,
        )
    if len(levels_of(config.level_name)) > config.num_groups and not config.listen:
        _log.warning(
            "num_groups=%d: only the first so many of the %d levels are played",
            config.num_groups,
            len(levels_of(config.level_name)),
        )


def level_of_group(config: Config, index: int) -> str:
    """Levels are dealt out to the groups round robin."""
    levels = levels_of(config.level_name)
    return levels[index % len(levels)]


def env_seed(config: Config, learner: Learner) -> int:
    """A resumed run plays other games than those it began with."""
    return (config.seed + learner.updates) % 2**31
