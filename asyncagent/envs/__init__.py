"""Environment families: a level name gives an EnvGroup. Nothing here imports torch.

Asking for names, specs and checks imports no engine; ``make_group`` imports the one it needs.
"""

from __future__ import annotations

import dataclasses
import difflib
import re

from asyncagent.config import Config
from asyncagent.envs import atari, toy
from asyncagent.envs.base import EnvGroup
from asyncagent.envs.pool import Engine, PoolGroup
from asyncagent.errors import UsageError
from asyncagent.structs import EnvSpec

__all__ = ["check_level", "env_spec", "level_names", "levels_of", "make_group"]

_DMLAB = re.compile(
    "dmlab|contributed/|(rooms|language|lasertag|natlab|skymaze|psychlab|explore|seekavoid)_|nav_maze"
)


def level_names() -> list[str]:
    """Every level, in alphabetical order; the ancestor's other spellings are left out."""
    return sorted([*(atari.PREFIX + game for game in atari.MINIMAL_ACTIONS), *toy.SPECS])


def check_level(level_name: str) -> None:
    """UsageError, with the nearest valid choices in one line, unless the level can be played."""
    if level_name in level_names() or level_name.removeprefix(atari.PREFIX) in atari.ALIASES:
        return
    if level_name.startswith("doom_"):
        raise UsageError(f"level_name={level_name!r}: this version does not support ViZDoom levels")
    if _DMLAB.match(level_name):
        raise UsageError(
            f"level_name={level_name!r}: this version does not support DeepMind Lab levels"
        )
    near = _nearest(level_name)
    if near:
        raise UsageError(f"unknown level_name={level_name!r}: did you mean {' or '.join(near)}?")
    raise UsageError(
        f"unknown level_name={level_name!r}: choose {', '.join(toy.SPECS)} or atari_<game>, "
        "for instance atari_breakout"
    )


def _nearest(level_name: str) -> list[str]:
    # What all Atari levels share tells nothing; and people write breakout, Breakout, Breakout-v5.
    def core(name: str) -> str:
        name = re.sub(r"[^a-z0-9]", "", name.lower().removeprefix(atari.PREFIX))
        return re.sub(r"(noframeskip)?v\d$", "", name)

    names = {core(name): name for name in level_names()}
    near = difflib.get_close_matches(core(level_name), names, n=3, cutoff=0.7)
    return [names[name] for name in near]


def env_spec(config: Config) -> EnvSpec:
    """What a policy must know of the level; asks no engine.

    Raises:
      UsageError: unknown level, or action repeats where there are no frames to repeat.
    """
    check_level(config.level_name)
    if config.level_name.startswith(atari.PREFIX):
        game = atari.game_of(config.level_name)
        return atari.atari_spec(game, config.atari_protocol, config.num_action_repeats)
    if config.num_action_repeats != 1:
        raise UsageError(
            f"num_action_repeats={config.num_action_repeats} must be 1: "
            f"{config.level_name} has no frames to repeat"
        )
    return toy.SPECS[config.level_name]


def levels_of(level_name: str) -> tuple[str, ...]:
    """The levels that ``level_name`` stands for: those of a list with commas."""
    return tuple(level_name.split(","))


def make_group(
    config: Config, *, level_name: str, num_envs: int, first_env_index: int, seed: int,
    name: str | None = None, test: bool = False,
) -> EnvGroup:  # fmt: skip
    """A group of ``num_envs`` environments of the configured level.

    Making many emulators takes seconds; any thread may do it.  Group i of a run of groups of E
    environments has ``first_env_index = i * E``: every environment's seed is derived from
    ``seed`` and its index in the whole run (see ``base.env_seeds``).

    Args:
      name: of the group's thread; ``env-<first_env_index>`` if None.

    Raises:
      UsageError: unknown level, impossible action repeats, or the engine's package is missing;
        the message is one line that says what to do.
    """
    spec = env_spec(dataclasses.replace(config, level_name=level_name))
    engine: Engine
    if level_name.startswith(atari.PREFIX):
        engine = atari.make_engine(
            atari.game_of(level_name),
            config.atari_protocol,
            backend=config.atari_backend,
            num_envs=num_envs,
            first_env_index=first_env_index,
            seed=seed,
            action_repeats=spec.action_repeats,
            num_threads=config.env_threads,
        )
    else:
        engine = toy.make_engine(
            level_name,
            num_envs=num_envs,
            first_env_index=first_env_index,
            seed=seed,
            num_threads=config.env_threads,
        )
    return PoolGroup(engine, level_name=level_name, name=name or f"env-{first_env_index}")
