"""Flags of the commands that make a run's environments without the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from asyncagent.commands.cli import parse, value_of
from asyncagent.config import PRESETS, Config, resolve
from asyncagent.envs import check_level
from asyncagent.errors import ConfigError

F = TypeVar("F", bound=Config)


def parse_env_flags(
    kind: type[F], arguments: Sequence[str], *, level_name: str, prog: str, description: str
) -> F:
    """A ``kind`` of Config: train's flags, which mean what they mean there, and the kind's own.

    Flags left out are those of the level's preset.

    Args:
      level_name: where ``--level_name`` is not given.

    Raises ConfigError or UsageError, in one line.
    """
    level_name = value_of(arguments, "level_name") or level_name
    preset = value_of(arguments, "preset") or "paper"
    if preset not in PRESETS:
        raise ConfigError(f"preset={preset!r} must be one of {', '.join(PRESETS)}")
    check_level(level_name)
    flags = {}
    num_actors = value_of(arguments, "num_actors")
    if num_actors and num_actors.isdigit() and not value_of(arguments, "num_groups"):
        flags["num_actors"] = int(num_actors)
    base = resolve(level_name, preset, **flags)
    default = kind(**dataclasses.asdict(base))
    return parse(kind, arguments, prog=prog, description=description, default=default)
