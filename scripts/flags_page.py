#!/usr/bin/env python3
"""Writes docs/flags.md: every flag of training as Config has it, and what presets change.

    python scripts/flags_page.py

A test says when the page is out of date.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from asyncagent.commands.flags import Flag, flags_of
from asyncagent.config import Config
from asyncagent.presets import PRESETS, Preset, preset_values

PAGE = Path(__file__).resolve().parent.parent / "docs" / "flags.md"
FAMILIES = {
    "Atari": "atari_breakout",
    "ViZDoom": "doom_basic",
    "DeepMind Lab": "rooms_collect_good_objects_train",
    "Gymnasium, own": "gym:CartPole-v1",
    "catch, cartpole, memory": "catch",
}
"""Whose presets are shown, and a level of each."""
DERIVED = {"logdir": "logdir/<level>"}
"""Defaults that no run has: what is made of the level's name, whatever the preset."""
INTRODUCTION = """# Every flag of training

<!-- written by scripts/flags_page.py from asyncagent/config.py: change that -->

Flags of `asyncagent train` and `./scripts/train`; `asyncagent bench`, `tune`, `check-env` and
`dmlab-cache` take them as well. A value follows as `--flag=value` or `--flag value`, `_` and `-`
are the same in names; a switch is turned on by `--flag` and off by `--no_flag`. What a value must
be is checked before anything starts. Other commands have few flags: `asyncagent COMMAND --help`.

The defaults here are those of `Config` itself, but for `--logdir`, which follows from the level
(`:` and the like become `_`). What a level's preset changes is [below](#presets); numbers of
actors, groups and threads are chosen by the machine's cores. `asyncagent train --help` shows what
comes of that on yours.
"""
PRESETS_TEXT = """
## Presets

Flags left out take the values of the level's family and preset; here are those that differ from the
tables above, on every machine.
"""


def text() -> str:
    """The page, as Markdown."""
    flags = [
        flag._replace(default=DERIVED.get(flag.name, flag.default)) for flag in flags_of(Config)
    ]
    return "\n".join([INTRODUCTION, *_groups(flags), PRESETS_TEXT, *_presets(), ""])


def _groups(flags: list[Flag]) -> Iterator[str]:
    for group in dict.fromkeys(flag.group for flag in flags):
        yield f"## {group}\n"
        yield from _row("flag", "value", "default", "")
        yield from _row("---", "---", "---", "---")
        for flag in flags:
            if flag.group == group:
                said = " ".join(f"{flag.description} {flag.details}".split())
                value = " ".join(f"`{choice}`" for choice in flag.metavar.split("|") if choice)
                yield from _row(f"`--{flag.name}`", value, flag.default, said)
        yield ""


def _presets() -> Iterator[str]:
    yield from _row("levels", *(f"`--preset={preset}`" for preset in PRESETS))
    yield from _row("---", *("---" for _ in PRESETS))
    for family, level in FAMILIES.items():
        yield from _row(family, *(_changes(level, preset) for preset in PRESETS))


def _changes(level_name: str, preset: Preset) -> str:
    """What a preset makes of flags on any number of cores, where that is not Config's default."""
    few, many = (preset_values(level_name, preset, num_cores) for num_cores in (2, 64))
    defaults: dict[str, Any] = dataclasses.asdict(Config())
    changed = {
        name: value
        for name, value in few.items()
        if value == many[name] != defaults[name] and name not in ("level_name", "preset", "logdir")
    }
    return ", ".join(f"`{name}={_spell(value)}`" for name, value in changed.items()) or "nothing"


def _spell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _escape(cell: str) -> str:
    return cell.replace("|", "&#124;").replace("<", "&lt;")


def _row(*cells: str) -> Iterator[str]:
    yield f"| {' | '.join(_escape(cell) for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(text(), "utf-8")
