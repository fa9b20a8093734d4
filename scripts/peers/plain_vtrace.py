#!/usr/bin/env python3
"""A plain synchronous V-trace loop, as a careful user would write it; for ``bench_peers.py``.

    python scripts/peers/plain_vtrace.py --level_name=atari_breakout --num_envs=64 --seconds=10

One vector environment; T times: infer for all rows, step all environments; then learn from the
unroll, B columns at a time.  Nothing overlaps: whoever acts waits for the slowest environment, and
the environments wait for the learner.  Environments, net, precision, inference and learning are
asyncagent's own, with as many operator threads as asked for: the loop alone differs.  The vector
environment is envpool's own thread pool for Atari, elsewhere ``--env_workers`` worker processes
that share the environments evenly and are stepped together.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import optree
import torch
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from asyncagent.actor import action_that_led_to
from asyncagent.config import Config, family_of, resolve
from asyncagent.envs import env_spec, make_group
from asyncagent.envs.base import EnvGroup
from asyncagent.errors import UsageError
from asyncagent.learner import Learner
from asyncagent.models import make_net
from asyncagent.placement import cores
from asyncagent.policy import Policy, resolve_device, resolve_precision
from asyncagent.structs import ActionArray, EnvStep, PolicyStep, Unroll, map_nest
from asyncagent.unroll import Columns, empty_unroll


class VectorEnv:
    """Groups stepped together, as one environment of all their rows."""

    def __init__(self, groups: list[EnvGroup]) -> None:
        self._groups = groups
        self._size = groups[0].num_envs

    async def reset(self) -> EnvStep:
        return _joined(await asyncio.gather(*(group.reset() for group in self._groups)))

    async def step(self, action: ActionArray) -> EnvStep:
        parts = [action[i * self._size : (i + 1) * self._size] for i in range(len(self._groups))]
        steps = (group.step(part) for group, part in zip(self._groups, parts, strict=True))
        return _joined(await asyncio.gather(*steps))

    async def close(self) -> None:
        await asyncio.gather(*(group.close() for group in self._groups))


def _joined(rows: list[EnvStep]) -> EnvStep:
    if len(rows) == 1:
        return rows[0]
    arrays = [row._replace(episodes=(), losses=()) for row in rows]
    joined: EnvStep = map_nest(lambda *leaves: np.concatenate(leaves), *arrays)
    return joined


def make_vector_env(config: Config, num_envs: int, workers: int) -> VectorEnv:
    """``num_envs`` environments in all, in as many equal parts as there are workers."""
    if num_envs % workers:
        raise UsageError(f"num_envs={num_envs} must be a multiple of env_workers={workers}")
    size = num_envs // workers
    return VectorEnv(
        [
            make_group(
                config,
                level_name=config.level_name,
                num_envs=size,
                first_env_index=index * size,
                seed=config.seed,
            )
            for index in range(workers)
        ]
    )


def write_row(unroll: Unroll, t: int, row: EnvStep, last_action: ActionArray) -> None:
    """x_t and what led to it."""
    optree.tree_map_(
        lambda target, value: np.copyto(target[t], value), unroll.observation, row.observation
    )
    unroll.reward[t] = row.reward
    unroll.terminated[t] = row.terminated
    unroll.truncated[t] = row.truncated
    unroll.first[t] = row.first
    unroll.last_action[t] = last_action
    if t > 0:
        unroll.valid[t - 1] &= ~row.lost


def write_choice(unroll: Unroll, t: int, row: EnvStep, choice: PolicyStep) -> None:
    """What was chosen at x_t."""
    unroll.action[t] = choice.action
    unroll.behaviour_logits[t] = choice.logits
    unroll.policy_version[t] = choice.policy_version
    unroll.valid[t] = ~(row.terminated | row.truncated | row.lost)


async def train(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """Train for the warm-up and the seconds; the figures of the latter."""
    torch.set_num_threads(1)  # as asyncagent.loop does before it chooses the precision
    device = resolve_device(config.device)
    dtype = resolve_precision(config.precision, device)
    torch.set_num_threads(flags.threads)
    spec = env_spec(config)
    net = make_net(config.net, spec, config.use_lstm, config.seed)
    policy = Policy(net, spec.actions, device, dtype, config.seed, config.inference_threads)
    learner = Learner(config, net, spec.actions, device, dtype, policy)
    workers = 1 if family_of(config.level_name) == "atari" else flags.env_workers
    env = make_vector_env(config, flags.num_envs, workers)
    core_state = policy.initial_state(flags.num_envs)
    unroll = empty_unroll(config.unroll_length, flags.num_envs, spec, core_state)
    row = await env.reset()
    one = spec.actions.array
    last_action: ActionArray = np.zeros((flags.num_envs, *one.shape), one.dtype)
    start_s, start_frames, warm_s = math.nan, 0, time.monotonic() + flags.warmup_s
    while not time.monotonic() >= start_s + flags.seconds:
        optree.tree_map_(np.copyto, unroll.core_state, core_state)
        write_row(unroll, 0, row, last_action)
        for t in range(config.unroll_length):
            choice = policy.infer(row.observation, row.reward, last_action, row.first, core_state)
            write_choice(unroll, t, row, choice)
            core_state = choice.core_state
            row = await env.step(choice.action)
            last_action = action_that_led_to(row, choice.action)
            write_row(unroll, t + 1, row, last_action)
        for column in range(0, flags.num_envs, config.batch_size):
            learner.update([Columns(unroll, column, column + config.batch_size)])
        if math.isnan(start_s) and time.monotonic() >= warm_s:
            start_s, start_frames = time.monotonic(), learner.frames
    seconds = time.monotonic() - start_s
    await env.close()
    return {
        "frames_per_s": round((learner.frames - start_frames) / seconds),
        "policy_lag_mean": round(learner.take_statistics().policy_lag_mean, 2),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "precision": str(dtype).removeprefix("torch."),
    }


def main() -> None:
    """Parse the flags, train, print one JSON object on stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--level_name", default="atari_breakout")
    parser.add_argument("--num_envs", type=int, default=64)
    parser.add_argument("--threads", type=int, default=cores(), help="of torch's operators")
    parser.add_argument("--env_threads", type=int, default=cores(), help="of envpool")
    parser.add_argument("--env_workers", type=int, default=cores(), help="processes, elsewhere")
    parser.add_argument("--net", default="", help="default: the preset's")
    parser.add_argument("--precision", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--seconds", type=float, default=30.0, help="measured time")
    parser.add_argument("--warmup_s", type=float, default=10.0, help="time left out before it")
    flags = parser.parse_args()
    chosen = {"net": flags.net} if flags.net else {}
    if flags.precision != "auto":
        chosen["precision"] = flags.precision
    try:
        config = dataclasses.replace(
            resolve(flags.level_name, **chosen),
            inference_threads=flags.threads,
            learner_threads=flags.threads,
            env_threads=flags.env_threads,
            total_environment_frames=10**12,
        )
        if flags.num_envs % config.batch_size:
            raise UsageError(
                f"num_envs={flags.num_envs} must be a multiple of batch_size={config.batch_size}"
            )
        print(json.dumps(uvloop.run(train(config, flags))))
    except UsageError as error:
        print(f"plain_vtrace: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
