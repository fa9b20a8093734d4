"""A learner's bridge and an actor host on 127.0.0.1, in the clear and with keys.

The host plays ``memory``, which needs no package, and infers itself with weights that it is sent.
What arrives is played again here, from the same seed, with the actions that arrived: it must be
the same, row by row.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zmq
import zmq.asyncio

from asyncagent.actor import action_that_led_to
from asyncagent.config import Config
from asyncagent.envs import env_spec, make_group
from asyncagent.envs.base import EnvGroup
from asyncagent.envs.scratch import temporary_folder
from asyncagent.host import ActorHost, HostFlags
from asyncagent.keys import make_keys
from asyncagent.models import make_net
from asyncagent.policy import Policy
from asyncagent.remote import Learning, RemoteBridge, Weights, make_listener
from asyncagent.selftest.outcome import Failed, require
from asyncagent.structs import Episode, Loss, Nest, Unroll, map_nest
from asyncagent.tasks import cancel
from asyncagent.weights import encode_weights, num_weights

NUM_UNROLLS = 6
NUM_ENVS = 3
SEED = 11
LIMIT_S = 20.0
REFUSAL_S = 10.0
"""Longest until a stranger is refused."""
VERSION = 3
"""Of the weights that the host must have acted with."""


def check(with_keys: bool) -> str:
    """A few unrolls travel, and arrive whole; with keys, a stranger without them stays out."""
    with temporary_folder() as folder:
        return asyncio.run(_exchange(folder, with_keys))


async def _exchange(folder: Path, with_keys: bool) -> str:
    config, flags = _flags(folder, with_keys)
    spec = env_spec(config)
    net = make_net(config.net, spec, config.use_lstm, SEED)
    policy = Policy(net, spec.actions, torch.device("cpu"), torch.float32, SEED)
    policy.publish(VERSION, net)
    unrolls: list[Unroll] = []
    enough = asyncio.Event()

    async def put(level_name: str, unroll: Unroll, give_back: Callable[[Unroll], None]) -> None:
        if len(unrolls) < NUM_UNROLLS:
            unrolls.append(map_nest(np.copy, unroll))
        else:
            enough.set()
        give_back(unroll)

    learning = Learning(
        initial_state=policy.initial_state,
        version=lambda: policy.version,
        num_weights=num_weights(net),
        encode_weights=lambda: Weights(VERSION, encode_weights(policy.snapshot(), "float32")),
        put=put,
        act=_nobody,
        tell=_unheard,
    )
    bridge = RemoteBridge(config, spec, make_listener(config), learning, SEED)
    serving = asyncio.create_task(bridge.serve())
    host = ActorHost(
        HostFlags(connect=bridge.endpoint, num_actors=NUM_ENVS, num_groups=1, device="cpu", **flags)
    )
    acting = asyncio.create_task(host.run())
    started_s = time.perf_counter()
    try:
        waiting = asyncio.create_task(enough.wait())
        await asyncio.wait(
            {waiting, serving, acting}, timeout=LIMIT_S, return_when=asyncio.FIRST_COMPLETED
        )
        took_s = time.perf_counter() - started_s
        if not enough.is_set():
            _explain(bridge, len(unrolls), serving, acting)
        host.stop()
        await acting
        if with_keys:
            await _keep_a_stranger_out(bridge)
    finally:
        await cancel(waiting, serving, acting)
        bridge.close()
    await _play_again(config, policy, unrolls)
    how = "CURVE keys, a stranger refused" if with_keys else "no keys"
    return f"{NUM_UNROLLS} unrolls over {bridge.endpoint}, {how}, in {took_s:.1f} s; all intact"


def _flags(folder: Path, with_keys: bool) -> tuple[Config, dict[str, Any]]:
    """The learner's, and the host's."""
    keys: dict[str, Any] = {}
    hosts: dict[str, Any] = {}
    if with_keys:
        learner_key, learner_secret = make_keys(folder / "learner", "learner")
        _, host_secret = make_keys(folder / "hosts", "host")
        keys = {"secret_key": str(learner_secret), "allowed_keys": str(folder / "hosts")}
        hosts = {"secret_key": str(host_secret), "learner_key": str(learner_key)}
    config = Config(
        level_name="memory",
        listen="tcp://127.0.0.1:*",
        num_actors=0,
        num_groups=0,
        num_action_repeats=1,
        net="mlp",
        use_lstm=True,
        unroll_length=8,
        precision="float32",
        compression="zstd",
        logdir=str(folder),
        **keys,
    )
    return config, hosts


async def _nobody(name: str, level_name: str, group: EnvGroup) -> None:
    raise AssertionError("the host infers itself")


def _unheard(episodes: Sequence[Episode], losses: Sequence[Loss], frames: int) -> None:
    """Nobody counts here."""


async def _keep_a_stranger_out(bridge: RemoteBridge) -> None:
    """Failed unless the bridge refuses a client that has no key."""
    refused = bridge.refused
    context = zmq.asyncio.Context()
    try:
        context.socket(zmq.DEALER).connect(bridge.endpoint)
        async with asyncio.timeout(REFUSAL_S):
            while bridge.refused == refused:
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise Failed("a client without a key was not refused") from None
    finally:
        context.destroy(linger=0)


def _explain(bridge: RemoteBridge, arrived: int, *tasks: asyncio.Task[None]) -> None:
    """Raise what ended a task, or Failed."""
    for task in tasks:
        if task.done():
            task.result()
    raise Failed(
        f"{arrived} of {NUM_UNROLLS} unrolls in {LIMIT_S:.0f} s over {bridge.endpoint}; "
        f"{bridge.refused} refusals, {bridge.rejected} messages that were none"
    )


async def _play_again(config: Config, policy: Policy, unrolls: list[Unroll]) -> None:
    group = make_group(config, level_name="memory", num_envs=NUM_ENVS, first_env_index=0, seed=SEED)
    row = await group.reset()
    last_action = np.zeros(NUM_ENVS, np.int64)
    state = policy.initial_state(NUM_ENVS)
    for index, unroll in enumerate(unrolls):
        where = f"unroll {index}"
        _same(f"{where}: core state", unroll.core_state, state, 1e-4)
        for t in range(config.unroll_length + 1):
            _same(f"{where}, row {t}: observation", unroll.observation[t], row.observation)
            _same(f"{where}, row {t}: last action", unroll.last_action[t], last_action)
            for field in ("reward", "terminated", "truncated", "first"):
                _same(f"{where}, row {t}: {field}", getattr(unroll, field)[t], getattr(row, field))
            if t == config.unroll_length:
                break  # it is the next one's first
            answer = policy.infer(row.observation, row.reward, last_action, row.first, state)
            _same(f"{where}, row {t}: logits", unroll.behaviour_logits[t], answer.logits, 1e-4)
            _same(f"{where}, row {t}: version", unroll.policy_version[t], answer.policy_version)
            _same(f"{where}, row {t}: valid", unroll.valid[t], ~(row.terminated | row.truncated))
            state = answer.core_state
            row = await group.step(unroll.action[t])
            last_action = action_that_led_to(row, unroll.action[t])
    await group.close()


def _same(what: str, found: Nest, wanted: Nest, tolerance: float = 0.0) -> None:
    def compare(one: np.ndarray, other: np.ndarray) -> None:
        close = np.abs(one.astype(np.float64) - other.astype(np.float64)) <= tolerance
        require(bool(close.all()), f"{what} is {one.tolist()}, was {other.tolist()}")

    map_nest(compare, found, wanted)
