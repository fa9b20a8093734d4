"""Environment families: a level name gives an EnvGroup. Nothing here imports torch.

Asking for names and checks imports no engine.  ``make_group`` imports the one it needs, or leaves
that to a worker process.
"""

from __future__ import annotations

import difflib
import functools
import json
import re

from asyncagent.config import Config
from asyncagent.envs import atari, dmlab, dmlab30, doom, gym, subproc, toy
from asyncagent.envs.base import EnvGroup, EnvRecipe, env_seeds
from asyncagent.envs.pool import Engine, PoolGroup
from asyncagent.errors import ActorLost, UsageError
from asyncagent.placement import core_of_worker
from asyncagent.structs import EnvSpec

__all__ = [
    "check_level",
    "env_spec",
    "family_of",
    "level_names",
    "levels_of",
    "make_group",
    "usable_spec",
]


def level_names() -> list[str]:
    """Every level with a name of its own, in alphabetical order; without the ancestor's spellings.

    Beyond these: ``doom:<cfg>``, ``dmlab:<level>``, ``gym:<id>`` and ``module:callable``.
    """
    games = (atari.PREFIX + game for game in atari.MINIMAL_ACTIONS)
    return sorted([*games, *toy.SPECS, *doom.LEVELS, *dmlab30.TRAIN_LEVELS, dmlab30.NAME])


def levels_of(level_name: str) -> tuple[str, ...]:
    """The levels that ``level_name`` stands for: those of DMLab-30, or of a list with commas."""
    levels: list[str] = []
    for level in level_name.split(","):
        levels += dmlab30.TRAIN_LEVELS if level == dmlab30.NAME else [level]
    return tuple(levels)


def family_of(level_name: str) -> str:
    """atari, toy, doom, dmlab or gym (which includes own environments); UsageError for none."""
    prefix, colon, _ = level_name.partition(":")
    if level_name in toy.SPECS:
        return "toy"
    if colon and prefix not in ("doom", "dmlab"):
        gym.check(level_name)
        return "gym"
    if level_name.startswith(atari.PREFIX):
        game = level_name.removeprefix(atari.PREFIX)
        if game in atari.MINIMAL_ACTIONS or game in atari.ALIASES:
            return "atari"
    elif level_name.startswith(("doom_", "doom:")):
        doom.check(level_name)
        return "doom"
    elif dmlab.is_dmlab(level_name) and level_name != dmlab.PREFIX:
        return "dmlab"
    raise _unknown(level_name)


def check_level(level_name: str) -> None:
    """UsageError, with the nearest valid choices in one line, unless all its levels are known."""
    for level in levels_of(level_name):
        family_of(level)


def _unknown(level_name: str) -> UsageError:
    near = _nearest(level_name)
    if near:
        return UsageError(f"unknown level_name={level_name!r}: did you mean {' or '.join(near)}?")
    return UsageError(
        f"unknown level_name={level_name!r}: choose {', '.join(toy.SPECS)}, atari_<game>, "
        "doom_<scenario>, dmlab:<level>, gym:<id> or your own module:callable"
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
    """What a policy must know of the levels, which must be the same for all of them.

    Asks no engine, except for ``doom:<cfg>``, ``gym:<id>`` and ``module:callable``: these are made
    once in a worker process, which takes about a second.

    Raises:
      UsageError: unknown level, action repeats where there are no frames to repeat, an environment
        that cannot be made, or levels that differ.
    """
    first, *others = levels_of(config.level_name)
    spec = _spec(config, first)
    for level in others:
        other = _spec(config, level)
        if other != spec:
            raise UsageError(
                f"{first} and {level} cannot be learnt together: {_differ(spec, other)}"
            )
    return spec


def usable_spec(config: Config) -> EnvSpec:
    """``env_spec``, but an environment that dies as it is made is a UsageError of one line, too."""
    try:
        return env_spec(config)
    except ActorLost as error:
        first, *_, last = [*str(error).splitlines(), ""]
        words = f"; its last words: {last}" if last else ""
        raise UsageError(
            f"level_name={config.level_name!r} cannot be made: {first}{words}"
        ) from None


def _differ(spec: EnvSpec, other: EnvSpec) -> str:
    for name in ("observation", "actions", "action_repeats"):
        mine, others = getattr(spec, name), getattr(other, name)
        if mine != others:
            return f"their {name} are {mine} and {others}"
    return "their specs differ"


def _spec(config: Config, level_name: str) -> EnvSpec:
    family = family_of(level_name)
    repeats = config.num_action_repeats
    if family == "atari":
        return atari.atari_spec(atari.game_of(level_name), config.atari_protocol, repeats)
    if family == "toy":
        if repeats != 1:
            raise UsageError(
                f"num_action_repeats={repeats} must be 1: {level_name} has no frames to repeat"
            )
        return toy.SPECS[level_name]
    if family == "dmlab":
        return dmlab.spec(config.width, config.height, repeats)
    if level_name in doom.LEVELS:
        return doom.spec(level_name, repeats)
    recipe = _recipe(config, level_name, test=False)
    return _probed(recipe.maker, json.dumps(dict(recipe.options)), config.env_timeout_s)


@functools.cache
def _probed(maker: str, options: str, timeout_s: float) -> EnvSpec:
    return subproc.probe_spec(EnvRecipe(maker, json.loads(options)), timeout_s=timeout_s)


def _recipe(config: Config, level_name: str, test: bool) -> EnvRecipe:
    family = family_of(level_name)
    if family == "dmlab":
        dmlab.check_installed()
        return dmlab.recipe(level_name, config, test=test)
    if family == "doom":
        return doom.recipe(level_name, config.num_action_repeats)
    return gym.recipe(level_name, config.num_action_repeats)


def make_group(
    config: Config, *, level_name: str, num_envs: int, first_env_index: int, seed: int,
    name: str | None = None, test: bool = False,
) -> EnvGroup:  # fmt: skip
    """A group of ``num_envs`` environments of one level.

    Making many emulators takes seconds; any thread may do it, and those that step them inherit
    its priority.  Group i of a run of groups of E
    environments has ``first_env_index = i * E``: every environment's seed is derived from
    ``seed`` and its index in the whole run (see ``base.env_seeds``).

    Args:
      level_name: one of ``levels_of(config.level_name)``.
      name: of the group's thread or worker; ``env-<first_env_index>`` if None.
      test: play by the rules of the test, where the family has some (DMLab's test levels).

    Raises:
      UsageError: unknown level, impossible action repeats, or the engine's package is missing;
        the message is one line that says what to do.
    """
    spec = _spec(config, level_name)
    name = name or f"env-{first_env_index}"
    engine: Engine
    if family_of(level_name) == "atari":
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
        return PoolGroup(engine, level_name=level_name, name=name)
    if level_name in toy.SPECS:
        engine = toy.make_engine(
            level_name,
            num_envs=num_envs,
            first_env_index=first_env_index,
            seed=seed,
            num_threads=config.env_threads,
        )
        return PoolGroup(engine, level_name=level_name, name=name)
    core = None
    if config.pin_workers:
        core = core_of_worker(first_env_index // num_envs, config.num_groups)
    return subproc.WorkerGroup(
        _recipe(config, level_name, test),
        spec,
        level_name=level_name,
        seeds=env_seeds(seed, first_env_index, num_envs),
        name=name,
        timeout_s=config.env_timeout_s,
        max_failures=config.max_env_failures,
        niceness=config.env_niceness,
        core=core,
    )
