"""``asyncagent dmlab-cache``."""

from __future__ import annotations

import asyncio
import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from asyncagent.commands.env_flags import parse_env_flags
from asyncagent.config import Config
from asyncagent.envs import dmlab, dmlab30, dmlab_filler, levels_of
from asyncagent.envs.base import env_seeds
from asyncagent.envs.level_cache import LevelCache
from asyncagent.envs.subproc import WorkerGroup
from asyncagent.errors import ActorLost, ConfigError, UsageError
from asyncagent.placement import cores
from asyncagent.structs import EnvStep

DESCRIPTION = """Compile DeepMind Lab's levels ahead of a run, into --level_cache.

Many levels make a new map for every episode, from the episode's seed. A run with the same
--level_name, --num_actors, --num_groups and --seed finds the maps with which the first
--num_episodes episodes of each of its environments begin; maps that are made in mid-episode,
and those of a run that is resumed, are not among them. Levels whose maps do not depend on the
seed are compiled once for all runs. The other flags are train's."""


@dataclass(frozen=True)
class CacheFlags(Config):
    """Train's flags, of which those of the environments count, and two more."""

    num_episodes: int = 10
    """Episodes of every environment to prepare."""
    num_workers: int = 0
    """Processes that compile at the same time; 0: one per core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("num_episodes", self.num_episodes >= 1, ">= 1")
        self._check("num_workers", self.num_workers >= 0, ">= 0")


class Tally:
    """What became of the resets."""

    def __init__(self) -> None:
        self.resets = self.hits = self.misses = self.writes = 0
        self.failures: list[str] = []

    def add(self, row: EnvStep) -> None:
        """Count what one row of a group of fillers tells."""
        hits, misses, writes = row.observation[row.first].sum(0).tolist()
        self.hits += hits
        self.misses += misses
        self.writes += writes
        self.failures += [
            f"{lost.level_name}, seed {lost.seed}: {lost.reason}" for lost in row.losses
        ]

    def __str__(self) -> str:
        return f"{self.misses:,} maps compiled, {self.hits:,} found in the cache"


def main(arguments: Sequence[str]) -> int:
    """Parse the flags and fill the cache; returns the exit status: 1 if something failed."""
    flags = parse_env_flags(
        CacheFlags, arguments, level_name=dmlab30.NAME,
        prog="asyncagent dmlab-cache", description=DESCRIPTION,
    )  # fmt: skip
    cache = _check(flags)
    console = Console(highlight=False)
    say = functools.partial(console.print, soft_wrap=True, markup=False)
    tally = Tally()
    levels = levels_of(flags.level_name)[: flags.num_groups]
    total = flags.num_actors * flags.num_episodes
    say(
        f"{flags.num_actors} environments of {len(levels)} level{'s' * (len(levels) > 1)}, "
        f"{flags.num_episodes} episodes each, into {cache.folder}"
    )
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TimeRemainingColumn(), TextColumn("{task.fields[tally]}")),
    )
    status = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("resets", total=total, tally=tally)

        def show() -> None:
            progress.update(task, completed=tally.resets)

        def group_done() -> None:
            if progress.disable:
                say(f"{tally.resets:,} of {total:,} resets: {tally}")

        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(fill(flags, tally, show, group_done))
        except KeyboardInterrupt:
            status = 130
    problems = _report(say, flags, cache, tally)
    return status or problems


async def fill(
    flags: CacheFlags, tally: Tally, on_row: Callable[[], None], on_group: Callable[[], None]
) -> None:
    """Reset every environment of the run that ``flags`` describe, ``num_episodes`` times.

    A level that fails again and again is left, told of in ``tally``; the others go on.

    Args:
      on_row: called as ``tally`` grows.
      on_group: called when a group of environments is done.

    Raises UsageError if DeepMind Lab does not take a level.
    """
    places = asyncio.Semaphore(flags.num_workers or cores())
    levels = levels_of(flags.level_name)

    async def fill_group(index: int) -> None:
        async with places:
            group = _group(flags, levels[index % len(levels)], index * flags.group_size)
            try:
                await _reset_all(group, flags.num_episodes, tally, on_row)
            except ActorLost as error:
                tally.failures.append(str(error))
            finally:
                await group.close()
            on_group()

    try:
        async with asyncio.TaskGroup() as tasks:
            for index in range(flags.num_groups):
                tasks.create_task(fill_group(index))
    except ExceptionGroup as failures:
        refused = failures.subgroup(UsageError)
        raise (refused or failures).exceptions[0] from None


def _group(flags: CacheFlags, level_name: str, first_env_index: int) -> WorkerGroup:
    return WorkerGroup(
        dmlab_filler.recipe(dmlab.recipe(level_name, flags, test=False)),
        dmlab_filler.SPEC,
        level_name=level_name,
        seeds=env_seeds(flags.seed, first_env_index, flags.group_size),
        name=f"cache-{first_env_index}",
        timeout_s=flags.env_timeout_s,
        max_failures=flags.max_env_failures,
        close_timeout_s=1.0,
    )


async def _reset_all(
    group: WorkerGroup, num_episodes: int, tally: Tally, on_row: Callable[[], None]
) -> None:
    action = np.zeros(group.num_envs, np.int64)
    left = np.full(group.num_envs, num_episodes)
    row = await group.reset()
    while True:
        tally.add(row)
        tally.resets += int((row.first & (left > 0)).sum())
        # What was lost is not tried again: its map may never compile.
        left -= row.first | row.lost
        on_row()
        if (left <= 0).all():
            return
        row = await group.step(action)


def _check(flags: CacheFlags) -> LevelCache:
    """The cache; UsageError for what can be told before anything starts."""
    levels = levels_of(flags.level_name)[: flags.num_groups]
    for level in levels:
        if not dmlab.is_dmlab(level):
            raise UsageError(f"level_name={level!r} is no level of DeepMind Lab")
    dmlab.check_installed()
    for level in levels:
        dmlab.check_level(level, flags.dataset_path, test=False)
    if not flags.level_cache:
        raise ConfigError("level_cache='' must be the folder to fill")
    cache = LevelCache(flags.level_cache, int(flags.level_cache_gb * 1e9))
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache.folder):
            pass
    except OSError as error:
        raise UsageError(
            f"level_cache={flags.level_cache!r} cannot be written: {error.strerror}"
        ) from None
    return cache


def _report(say: Callable[..., None], flags: CacheFlags, cache: LevelCache, tally: Tally) -> int:
    """Say what was done; the exit status."""
    total = flags.num_actors * flags.num_episodes
    say(f"{tally.resets:,} of {total:,} resets: {tally}")
    if tally.resets and not tally.misses and not tally.hits:
        say("these levels come with their maps: there is nothing to compile")
    contents = cache.contents()
    say(f"{contents.num_levels:,} maps, {contents.size / 1e6:,.1f} MB, in {cache.folder}")
    problems = list(dict.fromkeys(tally.failures))
    if tally.writes < tally.misses:
        problems.append(f"{tally.misses - tally.writes:,} compiled maps could not be kept")
    if contents.num_levels < tally.writes:
        problems.append(
            f"only {contents.num_levels:,} of {tally.writes:,} maps fit: give a larger "
            f"--level_cache_gb than {flags.level_cache_gb:g}"
        )
    for problem in problems:
        say(problem, style="red")
    return int(bool(problems))
