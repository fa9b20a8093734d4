"""``asyncagent train``."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from asyncagent.commands.cli import value_of
from asyncagent.commands.env_flags import overlay
from asyncagent.config import PRESETS, Config, resolve
from asyncagent.envs import check_level
from asyncagent.errors import ConfigError, UsageError

DESCRIPTION = """Train an IMPALA agent, or resume the run found in --logdir.

Flags left out take the values of the run that is resumed, else those of the level's preset."""


def main(arguments: Sequence[str]) -> int:
    """Parse the flags and train; returns the exit status."""
    config = configure(arguments)
    if config.preset == "paper" and config.level_name.startswith("atari_") and not config.quiet:
        print("preset paper: made for 200 M frames; --preset=workstation is for half an hour")
    return run(config)


def configure(arguments: Sequence[str]) -> Config:
    """The configuration that the flags, the run in --logdir and the preset make together."""
    level_name = value_of(arguments, "level_name")
    preset = value_of(arguments, "preset")
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"preset={preset!r} must be one of {', '.join(PRESETS)}")
    logdir = value_of(arguments, "logdir")
    if level_name is not None:
        check_level(level_name)
    level = level_name or "atari_breakout"
    base = resolve(level, preset or "paper")
    before = _recorded(Path(logdir or base.logdir))
    if before is not None and level_name in (None, before.level_name):
        if preset is not None and preset != before.preset:
            raise UsageError(
                f"the run in {logdir or base.logdir} was started with --preset={before.preset}: "
                "leave --preset out to resume it, or use another --logdir"
            )
        base = before
    return overlay(Config, arguments, base, prog="asyncagent train", description=DESCRIPTION)


def run(config: Config) -> int:
    """Check what can be checked cheaply, train, say how it ended; returns the exit status."""
    check_level(config.level_name)
    if config.listen:
        from asyncagent.remote import make_listener

        make_listener(config)
    _check_writable(Path(config.logdir))
    level = logging.WARNING if config.quiet else logging.INFO
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    if not config.quiet:
        print(
            f"{config.level_name}: {config.num_actors} environments in {config.num_groups} groups, "
            f"net {config.net}{' + LSTM' if config.use_lstm else ''}, logdir {config.logdir}"
        )
    from asyncagent.loop import train

    result = train(config)
    done = "done" if result.frames >= config.total_environment_frames else "stopped"
    print(
        f"{done}: {result.frames:,} frames, {result.updates:,} updates, mean return of the last "
        f"games {result.episode_return_mean:.2f}, {result.time_s / 60:.1f} minutes"
        + ("" if result.save_failure else f"; checkpoint in {config.logdir}")
    )
    if result.save_failure:
        print(
            f"asyncagent train: the last checkpoint could not be written to {config.logdir} "
            f"({result.save_failure}): what was learned since the one before it is lost",
            file=sys.stderr,
        )
        return 1
    return 0


def _recorded(logdir: Path) -> Config | None:
    path = logdir / "config.json"
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not JSON: remove it, and give the run's flags again") from None
    return dataclasses.replace(Config.from_json(text, path), logdir=str(logdir), quiet=False)


def _check_writable(logdir: Path) -> None:
    try:
        logdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=logdir, buffering=0) as file:
            file.write(bytes(1 << 16))  # a full disk still takes empty files
    except OSError as error:
        raise UsageError(
            f"logdir={str(logdir)!r} cannot be written: {error.strerror}; give another --logdir"
        ) from None
    if not os.access(logdir, os.X_OK):
        raise UsageError(f"logdir={str(logdir)!r} cannot be entered; give another --logdir")
