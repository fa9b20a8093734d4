"""Fresh episodes played with a checkpoint's policy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import uvloop

from asyncagent.actor import Infer, action_that_led_to
from asyncagent.batcher import DynamicBatcher
from asyncagent.checkpoint import load_checkpoint
from asyncagent.config import Config
from asyncagent.envs import env_spec, make_group
from asyncagent.envs.base import EnvGroup
from asyncagent.errors import CheckpointError, UsageError
from asyncagent.models import load_weights, make_net
from asyncagent.policy import Policy, resolve_device, resolve_precision
from asyncagent.structs import Episode, Nest

SEED_OFFSET = 1_000_003
"""Added to the run's seed, so that test games are not the ones the agent was trained on."""

_MAX_GROUP = 32


class Evaluation(NamedTuple):
    """Whole games played with one checkpoint."""

    level_name: str
    frames: int
    """Frames the checkpoint was trained for."""
    greedy: bool
    returns: tuple[float, ...]
    """Undiscounted and unclipped, one per game."""
    steps: tuple[int, ...]
    """Agent steps, one per game."""

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def spread(self) -> float:
        """Standard deviation of the returns."""
        return float(np.std(self.returns))

    def to_json(self) -> str:
        """An indented JSON object with every game."""
        summary = {"num_episodes": len(self.returns), "mean": self.mean, "std": self.spread}
        return json.dumps(self._asdict() | summary, indent=2) + "\n"


def quotas(num_episodes: int, num_envs: int) -> list[int]:
    """Games each environment plays, fixed beforehand: the first N to finish would favour short
    games."""
    share, rest = divmod(num_episodes, num_envs)
    return [share + (index < rest) for index in range(num_envs)]


def evaluate(
    logdir: str | Path, num_episodes: int, *, greedy: bool = False, seed: int | None = None,
    device: str = "auto", on_episode: Callable[[Episode], None] = lambda episode: None,
) -> Evaluation:  # fmt: skip
    """Play ``num_episodes`` whole games with the newest checkpoint in ``logdir``.

    Args:
      greedy: take the likeliest action; otherwise actions are sampled, as in training.
      seed: of environments and sampling; by default the run's seed plus SEED_OFFSET.
      on_episode: called as each counted game ends.

    Raises:
      UsageError: num_episodes < 1, or an impossible seed.
      CheckpointError: no readable checkpoint there.
    """
    if num_episodes < 1:
        raise UsageError(f"test_num_episodes={num_episodes} must be >= 1")
    if seed is not None and not 0 <= seed < 2**31:
        raise UsageError(f"seed={seed} must be in [0, 2**31)")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_evaluate(Path(logdir), num_episodes, greedy, seed, device, on_episode))


async def _evaluate(
    logdir: Path, num_episodes: int, greedy: bool, seed: int | None, device_name: str,
    on_episode: Callable[[Episode], None],
) -> Evaluation:  # fmt: skip
    found = load_checkpoint(logdir)
    if found is None:
        raise CheckpointError(f"no checkpoint in {logdir}: give the --logdir of a training run")
    path, state = found
    config = Config.from_json(state["config"], path)
    seed = (config.seed + SEED_OFFSET) % 2**31 if seed is None else seed
    torch.set_num_threads(1)
    device = resolve_device(device_name)
    dtype = resolve_precision(config.precision, device)
    net = make_net(config.net, env_spec(config), config.use_lstm, config.seed)
    load_weights(net, state["net"])
    policy = Policy(net, device, dtype, seed, config.inference_threads, greedy)
    groups = _make_groups(config, num_episodes, seed)
    batcher = DynamicBatcher(policy.infer)
    try:
        async with asyncio.TaskGroup() as tasks:
            share = quotas(num_episodes, sum(group.num_envs for group in groups))
            games = []
            for group in groups:
                mine, share = share[: group.num_envs], share[group.num_envs :]
                play = _play(group, batcher, policy.initial_state(group.num_envs), mine, on_episode)
                games.append(tasks.create_task(play))
    finally:
        batcher.close()
        await asyncio.gather(*(group.close() for group in groups))
    episodes = [episode for game in games for episode in game.result()]
    return Evaluation(
        config.level_name,
        int(state["frames"]),
        greedy,
        tuple(episode.episode_return for episode in episodes),
        tuple(episode.steps for episode in episodes),
    )


def _make_groups(config: Config, num_episodes: int, seed: int) -> list[EnvGroup]:
    """Up to two groups, so that one steps while the other's actions are computed."""
    num_envs = min(num_episodes, 2 * _MAX_GROUP)
    sizes = [num_envs - num_envs // 2, num_envs // 2]
    first = 0
    groups = []
    for size in filter(None, sizes):
        groups.append(
            make_group(
                config,
                level_name=config.level_name,
                num_envs=size,
                first_env_index=first,
                seed=seed,
            )
        )
        first += size
    return groups


async def _play(
    group: EnvGroup, infer: Infer, core_state: Nest, quota: list[int],
    on_episode: Callable[[Episode], None],
) -> list[Episode]:  # fmt: skip
    """Play until environment i has ended ``quota[i]`` games; further games do not count."""
    left = list(quota)
    episodes: list[Episode] = []
    one = group.spec.actions.array
    last_action = np.zeros((group.num_envs, *one.shape), one.dtype)
    row = await group.reset()
    while any(left):
        choice = await infer(row.observation, row.reward, last_action, row.first, core_state)
        core_state = choice.core_state
        row = await group.step(choice.action)
        last_action = action_that_led_to(row, choice.action)
        for episode in row.episodes:
            if left[episode.env_index]:
                left[episode.env_index] -= 1
                episodes.append(episode)
                on_episode(episode)
    return episodes
