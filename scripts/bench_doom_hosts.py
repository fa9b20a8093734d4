#!/usr/bin/env python3
"""Where ViZDoom's games step fastest: on threads of this process, or in worker processes.

    python scripts/bench_doom_hosts.py [--groups=2] [--games=8] [--seconds=5] [--rounds=4]

Games of doom_benchmark, action repeat 4, at random, beside a thread that computes all the time as a
learner does. Rounds are interleaved: the ratio counts, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import threading
import time

import numpy as np
import torch
import uvloop

from asyncagent.envs import doom
from asyncagent.envs.base import env_seeds
from asyncagent.envs.subproc import WorkerGroup
from asyncagent.threads import NamedThread

LEVEL, REPEATS = "doom_benchmark", 4
SPEC = doom.spec(LEVEL, REPEATS)


def step_in_turn(games: list[doom.DoomEnv], ended: list[bool], rng: np.random.Generator) -> None:
    """One step of each game, or a new episode."""
    for index, game in enumerate(games):
        if ended[index]:
            game.reset()
            ended[index] = False
            continue
        outcome = game.step(rng.integers(SPEC.actions.num_logits))
        ended[index] = outcome.terminated or outcome.truncated


async def on_threads(num_groups: int, num_games: int, seconds: float) -> float:
    """Steps per second of groups that each have a thread."""
    threads = [NamedThread(f"games-{index}") for index in range(num_groups)]
    rng = np.random.default_rng(1)

    def make(first: int) -> list[doom.DoomEnv]:
        seeds = env_seeds(1, first, num_games)
        return [
            doom.make_env(seed=seed, level_name=LEVEL, action_repeats=REPEATS)  # type: ignore[misc]
            for seed in seeds
        ]

    groups = [await thread.run(make, i * num_games) for i, thread in enumerate(threads)]
    ended = [[True] * num_games for _ in groups]
    stop_s = time.perf_counter() + seconds
    rounds = 0

    async def play(index: int) -> None:
        nonlocal rounds
        while time.perf_counter() < stop_s:
            await threads[index].run(step_in_turn, groups[index], ended[index], rng)
            rounds += 1

    await asyncio.gather(*map(play, range(num_groups)))
    for thread, games in zip(threads, groups, strict=True):
        for game in games:
            await thread.run(game.close)
        thread.close()
    return rounds * num_games / seconds


async def in_workers(num_groups: int, num_games: int, seconds: float) -> float:
    """Steps per second of groups that each have a worker process."""
    groups = [
        WorkerGroup(
            doom.recipe(LEVEL, REPEATS),
            SPEC,
            level_name=LEVEL,
            seeds=env_seeds(1, index * num_games, num_games),
            name=f"games-{index}",
            timeout_s=60.0,
            max_failures=1,
        )
        for index in range(num_groups)
    ]
    await asyncio.gather(*(group.reset() for group in groups))
    rng = np.random.default_rng(1)
    stop_s = time.perf_counter() + seconds
    rounds = 0

    async def play(group: WorkerGroup) -> None:
        nonlocal rounds
        while time.perf_counter() < stop_s:
            await group.step(rng.integers(SPEC.actions.num_logits, size=num_games))
            rounds += 1

    await asyncio.gather(*map(play, groups))
    await asyncio.gather(*(group.close() for group in groups))
    return rounds * num_games / seconds


def compute(stop: threading.Event) -> None:
    """Matrix products, and Python between them."""
    torch.set_num_threads(1)
    x = torch.randn(256, 256)
    while not stop.is_set():
        x = torch.tanh(x @ x)
        sum(range(2000))


def main() -> None:
    """Measure in turn, print medians and ranges."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=2, help="threads, or worker processes")
    parser.add_argument("--games", type=int, default=8, help="of each group")
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement")
    parser.add_argument("--rounds", type=int, default=4, help="measurements of each kind")
    flags = parser.parse_args()
    stop = threading.Event()
    computing = threading.Thread(target=compute, args=(stop,), daemon=True)
    computing.start()
    rates: dict[str, list[float]] = {"threads": [], "workers": []}
    for _ in range(flags.rounds):
        for name, host in (("threads", on_threads), ("workers", in_workers)):
            rate = uvloop.run(host(flags.groups, flags.games, flags.seconds))
            rates[name].append(rate)
            print(f"{name}: {rate:,.0f} steps/s", flush=True)
    stop.set()
    computing.join()
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name}: median {median:,.0f} steps/s ({min(values):,.0f} to {max(values):,.0f})")


if __name__ == "__main__":
    main()
