"""How flags, tune's file and a preset make a run's configuration, for every command with Config."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from asyncagent.commands.cli import is_on, parse, value_of
from asyncagent.config import (
    DETERMINISTIC,
    PRESETS,
    TUNED_FLAGS,
    Config,
    resolve,
    rows_worth_a_batch,
    split_groups,
)
from asyncagent.envs import check_level
from asyncagent.errors import ConfigError
from asyncagent.files import parse_json

TUNED_FOR = ("level_name", "preset", "net", "use_lstm", "batch_size")
"""What tune's file says it was made for."""

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
    base = resolve(level_name, preset)
    flags = overlay(kind, arguments, base, prog=prog, description=description)
    if flags.num_actors == 0:
        raise ConfigError(f"num_actors=0 must be >= 1: {prog} needs environments of its own")
    return flags


def overlay(
    kind: type[F], arguments: Sequence[str], base: Config, *, prog: str, description: str
) -> F:
    """``base``, what --tuned and --deterministic change of it, and over them the flags given.

    Groups follow from actors given alone, min_inference_rows from both. A file of --tuned that was
    made for another level or net is warned of, on stderr. Raises ConfigError, in one line.
    """
    tuned = value_of(arguments, "tuned")
    made_for: dict[str, Any] = {}
    if tuned:
        base, made_for = read_tuned(Path(tuned), base)
    if is_on(arguments, "deterministic"):
        base = dataclasses.replace(base, deterministic=True, **DETERMINISTIC)
    num_actors = value_of(arguments, "num_actors")
    if num_actors and num_actors.isdigit() and not value_of(arguments, "num_groups"):
        count = int(num_actors)
        if count == 0:
            arguments = [*arguments, "--num_groups=0"]
        if count >= 1:
            # Config checks that groups are equal; the flags below would be judged one by one.
            groups = split_groups(base.level_name, count, base.num_groups)
            arguments = [*arguments, f"--num_groups={groups}"]
    default = kind(**dataclasses.asdict(base))
    config = parse(kind, arguments, prog=prog, description=description, default=default)
    shape = (config.num_actors, config.num_groups)
    if shape != (base.num_actors, base.num_groups) and not value_of(
        arguments, "min_inference_rows"
    ):
        rows = rows_worth_a_batch(config.level_name, *shape)
        config = dataclasses.replace(config, min_inference_rows=rows)
    others = [name for name, value in made_for.items() if value != getattr(config, name)]
    if others:
        there = ", ".join(f"{name}={made_for[name]!r}" for name in others)
        here = ", ".join(f"{name}={getattr(config, name)!r}" for name in others)
        print(
            f"{prog}: tuned={tuned!r} was made for {there}, this is {here}: "
            "asyncagent tune finds what is fastest here",
            file=sys.stderr,
        )
    return config


def read_tuned(path: Path, base: Config) -> tuple[Config, dict[str, Any]]:
    """``base`` with the flags that ``asyncagent tune`` found, and what it found them for.

    The latter by the names of ``TUNED_FOR``, as far as the file says. ConfigError if flags do not
    fit.
    """
    try:
        found = parse_json(path.read_text())
    except OSError as error:
        raise ConfigError(f"tuned={str(path)!r}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(
            f"tuned={str(path)!r} is not JSON: make it with asyncagent tune"
        ) from None
    flags = found.get("flags") if isinstance(found, dict) else None
    if not isinstance(flags, dict) or not set(flags) <= set(TUNED_FLAGS):
        raise ConfigError(
            f"tuned={str(path)!r} must have an object 'flags' with some of {', '.join(TUNED_FLAGS)}"
        )
    whole = dataclasses.asdict(base) | flags
    made_for = {name: found[name] for name in TUNED_FOR if isinstance(found.get(name), str | int)}
    return Config.from_json(json.dumps(whole), path), made_for
