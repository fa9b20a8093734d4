#!/usr/bin/env python3
"""What starting blind to brightness is worth: how fast a network fits the value of random play.

    python scripts/bench_pixel_init.py [--level_name=atari_pong] [--updates=600]

Plays random games, then fits their discounted returns twice with the same batches and the same
network: once as ``models.py`` initialises it, once with the first layer's filters as a plain
orthogonal initialisation leaves them.  Prints the mean squared error of the last 100 batches at
several points; the first line is the variance of the returns, which a constant would reach.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from asyncagent.bodies import Conv2dSame
from asyncagent.config import resolve
from asyncagent.envs import env_spec, make_group
from asyncagent.errors import UsageError
from asyncagent.models import make_net
from asyncagent.policy import resolve_precision

NUM_ENVS, BATCH, HORIZON = 16, 160, 250


async def play(level_name: str, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Observations [N, 4, 84, 84] and discounted clipped returns [N] of random play."""
    config = resolve(level_name)
    group = make_group(
        config, level_name=config.level_name, num_envs=NUM_ENVS, first_env_index=0, seed=3
    )
    rng = np.random.default_rng(0)
    rows = [await group.reset()]
    for _ in range(num_steps + HORIZON):
        rows.append(await group.step(rng.integers(0, group.spec.actions.num_logits, NUM_ENVS)))
    await group.close()
    value = np.zeros(NUM_ENVS)
    returns = np.zeros((num_steps, NUM_ENVS), np.float32)
    for t in range(len(rows) - 2, -1, -1):
        value = np.clip(rows[t + 1].reward, -1, 1) + config.discounting * value
        if t < num_steps:
            returns[t] = value
    observations = np.stack([row.observation for row in rows[:num_steps]])
    return observations.reshape(-1, *observations.shape[2:]), returns.ravel()


def plain(net: nn.Module) -> None:
    """Undo the first layer's special start."""
    first = next(layer for layer in net.modules() if isinstance(layer, Conv2dSame))
    torch.manual_seed(1)
    weight = nn.init.orthogonal_(torch.empty(first.weight.shape), math.sqrt(2))
    with torch.no_grad():
        first.weight.copy_(weight)


def fit(net: nn.Module, observations: np.ndarray, returns: np.ndarray, updates: int) -> list[float]:
    """Mean squared error of each batch."""
    dtype = resolve_precision("auto", torch.device("cpu"))
    optimizer = torch.optim.Adam(net.parameters(), lr=7e-4, eps=1e-5)
    rng = np.random.default_rng(1)
    zeros = torch.zeros(1, BATCH)
    errors = []
    for _ in range(updates):
        picked = rng.integers(0, len(returns), BATCH)
        rows = torch.from_numpy(observations[picked])[None]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = net(rows, zeros, zeros.long(), zeros.bool(), ())
        values: Tensor = output[1][0]
        loss = (values - torch.from_numpy(returns[picked])).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        errors.append(loss.item())
    return errors


def main() -> None:
    """Play, fit twice, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--level_name", default="atari_pong")
    parser.add_argument("--updates", type=int, default=600)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    if not flags.level_name.startswith("atari_"):
        parser.error(f"level_name={flags.level_name!r} must be an Atari level: pixels are needed")
    try:
        observations, returns = asyncio.run(play(flags.level_name, 1000))
    except UsageError as error:
        parser.error(str(error))
    print(f"{len(returns)} rows of random {flags.level_name}, variance {returns.var():.3f}")
    points = [flags.updates * share // 4 for share in (1, 2, 3, 4)]
    print("updates".ljust(24), *(f"{point:>8}" for point in points))
    for name, change in (("blind to brightness", lambda net: None), ("plain orthogonal", plain)):
        net = make_net("shallow", env_spec(resolve(flags.level_name)), False, seed=1)
        change(net)
        errors = fit(net, observations, returns, flags.updates)
        figures = [np.mean(errors[max(0, point - 100) : point]) for point in points]
        print(name.ljust(24), *(f"{figure:8.3f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
