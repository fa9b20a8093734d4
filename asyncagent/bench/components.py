"""What is measured: the objects that training uses, driven as fast as they go.

A component works in pieces and calls ``going(steps)`` after each, until that is False.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import optree
import torch
import uvloop

from asyncagent.bench.job import Parameters
from asyncagent.config import Config
from asyncagent.envs import env_spec, levels_of, make_group
from asyncagent.envs.base import EnvGroup
from asyncagent.learner import Learner
from asyncagent.models import make_net
from asyncagent.policy import Policy, resolve_devices, resolve_precision
from asyncagent.structs import (
    ActionArray,
    ActionSpace,
    Box,
    Discrete,
    EnvSpec,
    MultiDiscrete,
    Nest,
    Unroll,
    map_nest,
)
from asyncagent.unroll import Columns, empty_unroll

Going: TypeAlias = Callable[[int], bool]
"""``going(steps)``: so many more steps are done; False: stop now."""

RING = 4
"""Batches that take turns, so that none finds its inputs in the caches."""


class Component(Protocol):
    """Made from a configuration and the setting of a sweep."""

    def run(self, going: Going) -> None:
        """Work until ``going`` says no."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class EnvComponent:
    """Groups of environments, as training makes them, each stepped with random actions.

    Parameters: ``group_size``, and ``groups``: with two, the Python of one runs while the other's
    engine works.
    """

    def __init__(self, config: Config, parameters: Parameters, index: int) -> None:
        """``index``: of this process; every process has other seeds, and levels in turn."""
        size, count = parameters["group_size"], parameters["groups"]
        levels = levels_of(config.level_name)
        config = replace(config, env_threads=1, env_niceness=0)
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._groups = [
            make_group(
                config,
                level_name=levels[place % len(levels)],
                num_envs=size,
                first_env_index=place * size,
                seed=config.seed,
            )
            for place in range(index * count, (index + 1) * count)
        ]

    def run(self, going: Going) -> None:
        self._runner.run(self._run(going))

    async def _run(self, going: Going) -> None:
        async with asyncio.TaskGroup() as tasks:
            for group in self._groups:
                tasks.create_task(_step(group, going))

    def close(self) -> None:
        async def close() -> None:
            await asyncio.gather(*(group.close() for group in self._groups))

        self._runner.run(close())
        self._runner.close()


async def _step(group: EnvGroup, going: Going) -> None:
    actions = random_actions(group.spec.actions, (64, group.num_envs), np.random.default_rng(0))
    await group.reset()
    for action in itertools.cycle(actions):
        row = await group.step(action)
        if not going(group.num_envs - int(np.count_nonzero(row.lost))):
            return


class InferenceComponent:
    """``Policy.infer`` on batches of ``rows`` random observations."""

    def __init__(self, config: Config, parameters: Parameters, index: int) -> None:
        del index
        rows = parameters["rows"]
        spec, dtype = env_spec(config), precision_of(config)
        _, device = resolve_devices(config)
        net = make_net(config.net, spec, config.use_lstm, config.seed)
        self._policy = Policy(net, spec.actions, device, dtype, config.seed)
        state = self._policy.initial_state(rows)
        self._batches = [
            (*inputs_of(random_unroll(1, rows, spec, state, seed)), state) for seed in range(RING)
        ]

    def run(self, going: Going) -> None:
        for batch in itertools.cycle(self._batches):
            answer = self._policy.infer(*batch)
            if not going(len(answer.action)):
                return

    def close(self) -> None:
        pass


class LearnerComponent:
    """``Learner.update``, publishing included, on batches of the configured size.

    Parameters: ``columns`` per micro-batch; 0: as many as training takes on all its threads.
    """

    def __init__(self, config: Config, parameters: Parameters, index: int) -> None:
        del index
        spec, dtype = env_spec(config), precision_of(config)
        device, acting = resolve_devices(config)
        net = make_net(config.net, spec, config.use_lstm, config.seed)
        policy = Policy(net, spec.actions, acting, dtype, config.seed)
        state = policy.initial_state(config.batch_size)
        length, size = config.unroll_length, config.batch_size
        self._batches = [
            [Columns(random_unroll(length, size, spec, state, seed), 0, size)]
            for seed in range(RING)
        ]
        columns = parameters["columns"]
        if columns == 0 and device.type == "cpu":
            learner = Learner(config, net, spec.actions, device, dtype)
            with _MostColumns(net) as most:
                learner.update(self._batches[0])
            learner.close()
            columns = most.columns
        alone = replace(config, learner_threads=1, micro_batch_rows=columns * (length + 1))
        self._learner = Learner(alone, net, spec.actions, device, dtype, policy)
        self._steps = length * size
        self._on_gpu = device.type == "cuda"

    def run(self, going: Going) -> None:
        for batch in itertools.cycle(self._batches):
            self._learner.update(batch)
            if self._on_gpu:
                torch.cuda.synchronize()
            if not going(self._steps):
                return

    def close(self) -> None:
        self._learner.close()


class _MostColumns:
    """The most columns that a net saw at once within the block."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.columns = 1
        self._hook = net.register_forward_pre_hook(self._see)

    def _see(self, net: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        _, reward, *_ = inputs
        self.columns = max(self.columns, reward.shape[1])

    def __enter__(self) -> _MostColumns:
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()


class TransferComponent:
    """Observations copied from pinned memory to the GPU; ``megabytes`` at a time."""

    def __init__(self, config: Config, parameters: Parameters, index: int) -> None:
        del index
        size = parameters["megabytes"] << 20
        self._steps = size // observation_bytes(env_spec(config))
        self._device, _ = resolve_devices(config)
        self._host = torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def run(self, going: Going) -> None:
        target = torch.empty_like(self._host, device=self._device)
        while True:
            target.copy_(self._host, non_blocking=True)
            torch.cuda.synchronize()
            if not going(self._steps):
                return

    def close(self) -> None:
        pass


COMPONENTS: dict[str, Callable[[Config, Parameters, int], Component]] = {
    "env": EnvComponent,
    "inference": InferenceComponent,
    "learner": LearnerComponent,
    "transfer": TransferComponent,
}


def random_actions(
    space: ActionSpace, shape: tuple[int, ...], rng: np.random.Generator
) -> ActionArray:
    """Valid actions [*shape, ...]: uniform choices, normal numbers."""
    match space:
        case Discrete():
            return rng.integers(space.num_actions, size=shape)
        case MultiDiscrete():
            return rng.integers(space.sizes, size=(*shape, len(space.sizes)))
        case Box():
            return rng.standard_normal((*shape, space.num_dims), np.float32)


def random_unroll(
    unroll_length: int, num_envs: int, spec: EnvSpec, state: Nest, seed: int
) -> Unroll:
    """An unroll of T steps of random bytes and numbers, in which nothing ends and all is valid."""
    rng = np.random.default_rng(seed)
    unroll = empty_unroll(unroll_length, num_envs, spec, state)
    optree.tree_map_(lambda leaf, one: _fill(leaf, one, rng), unroll.observation, spec.observation)
    for flags in (unroll.terminated, unroll.truncated, unroll.first):
        flags[:] = False
    unroll.reward[:] = rng.integers(-1, 2, unroll.reward.shape)
    unroll.last_action[:] = random_actions(spec.actions, unroll.reward.shape, rng)
    unroll.action[:] = random_actions(spec.actions, unroll.valid.shape, rng)
    unroll.behaviour_logits[:] = 0
    unroll.policy_version[:] = 0
    unroll.valid[:] = True
    optree.tree_map_(np.copyto, unroll.core_state, state)
    return unroll


def _fill(leaf: np.ndarray[Any, Any], spec: Any, rng: np.random.Generator) -> None:
    if spec.num_tokens:
        leaf[:] = 0  # most levels say nothing
    elif leaf.dtype == np.uint8:
        leaf[:] = np.frombuffer(rng.bytes(leaf.size), np.uint8).reshape(leaf.shape)
    elif leaf.dtype.kind == "f":
        leaf[:] = rng.random(leaf.shape)
    else:
        leaf[:] = rng.integers(0, 2, leaf.shape)


def inputs_of(unroll: Unroll) -> tuple[Nest, ...]:
    """Observation, reward, last_action and first of an unroll's first row, as ``infer`` takes."""
    fields = (unroll.observation, unroll.reward, unroll.last_action, unroll.first)
    inputs: tuple[Nest, ...] = map_nest(lambda leaf: leaf[0], fields)
    return inputs


def observation_bytes(spec: EnvSpec) -> int:
    """Bytes of one observation."""
    leaves = optree.tree_leaves(spec.observation)
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def precision_of(config: Config) -> torch.dtype:
    """Of convolutions and matrix products."""
    return resolve_precision(config.precision, resolve_devices(config)[0])
