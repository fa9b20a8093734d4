"""The flags of a command, read off the dataclass that they are parsed into, and its ``--help``."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import os
import re
import textwrap
import types
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.text import Text

WIDTH = 100
"""Columns of ``--help``, where neither a terminal nor COLUMNS has fewer."""
_LEFT = 32
_STACKED_BELOW = 72
"""In fewer columns a flag's text stands below its name."""
_OWN = "Options"
"""Title of the fields above which none is written."""
_UNITS = {"s": "s", "seconds": "s", "ms": "ms", "gb": "GB", "minutes": "min"}
_UNITS |= {"width": "pixels", "height": "pixels"}
_METAVARS = {
    "level_name": "LEVEL", "logdir": "DIR", "dataset_path": "DIR", "level_cache": "DIR",
    "allowed_keys": "DIR", "secret_key": "FILE", "learner_key": "FILE", "file": "FILE",
    "tuned": "FILE", "out": "PATH", "listen": "ADDRESS", "connect": "ADDRESS", "device": "DEVICE",
    "learner_device": "DEVICE", "inference_device": "DEVICE", "net": "NET", "override": "FLAGS",
    "name": "NAME",
}  # fmt: skip
"""Where the type says too little."""


class Flag(NamedTuple):
    """One flag, as --help and the documentation tell it."""

    group: str
    """Title of the group that it belongs to."""
    name: str
    """As it is written after the two dashes."""
    metavar: str
    """What follows: N, X, a unit, choices as a|b; empty for a switch."""
    default: str
    """With its unit; ``required`` where it has to be given."""
    description: str
    """One line."""
    details: str
    """Further paragraphs; mostly empty."""


class Source(NamedTuple):
    """What a dataclass's source says about one field."""

    group: str
    text: str


def flags_of(kind: type, default: Any = None) -> list[Flag]:
    """The flags of dataclass ``kind``, group after group, its own before those that it inherits.

    A comment between two fields opens a group: its title ends at the first colon or full stop.
    Fields above the first such comment are ``Options``. A string below a field describes it.

    Args:
      default: an instance whose values are the defaults, else those of the fields.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    flags = {}
    for owner in kind.__mro__:
        if not dataclasses.is_dataclass(owner):
            continue
        for name, source in _read(owner):
            if name in flags or name not in fields:
                continue
            first, _, rest = source.text.partition("\n\n")
            value = _value(fields[name], default)
            flags[name] = Flag(
                source.group,
                name,
                _metavar(name, hints[name]),
                _spell(name, value),
                " ".join(first.split()),
                rest,
            )
    return list(flags.values())


def _read(owner: type) -> Iterator[tuple[str, Source]]:
    """Names of the fields that a class itself declares, and what is written about them."""
    text = textwrap.dedent(inspect.getsource(owner))
    lines = text.splitlines()
    [definition] = ast.parse(text).body
    assert isinstance(definition, ast.ClassDef)
    group, end = _OWN, definition.lineno
    for node, after in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            said = [line.strip() for line in lines[end : node.lineno - 1]]
            comment = " ".join(line.lstrip("# ") for line in said if line.startswith("#"))
            group = re.split("[:.]", comment)[0] or group
            below = after.value if isinstance(after, ast.Expr) else None
            doc = str(below.value) if isinstance(below, ast.Constant) else ""
            yield node.target.id, Source(group, inspect.cleandoc(doc))
        end = node.end_lineno or end


def _value(field: dataclasses.Field[Any], default: Any) -> Any:
    if default is not None:
        return getattr(default, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _metavar(name: str, hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        hint, *_ = [part for part in get_args(hint) if part is not types.NoneType]
    if get_origin(hint) in (tuple, list):
        return f"{_metavar(name, get_args(hint)[0])} ..."
    if get_origin(hint) is Literal:
        return "|".join(str(choice) for choice in get_args(hint) if choice not in ("", None))
    if hint is bool:
        return ""
    plain = {int: "N", float: "X"}.get(hint, "TEXT")
    return _unit(name).upper() or _METAVARS.get(name, plain)


def _unit(name: str) -> str:
    return _UNITS.get(name.rpartition("_")[2], "")


def _spell(name: str, value: Any) -> str:
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int | float):
        exact = f"{value:,}" if isinstance(value, int) else f"{value:.15g}"
        plain = f"{value:g}"
        short = plain if isinstance(value, float) and math.isclose(float(plain), value) else exact
        return f"{short} {_unit(name)}".strip()
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "none"
    return str(value) if value not in (None, "") else "none"


def print_help(prog: str, description: str, flags: list[Flag]) -> None:
    """Print what a command does and its flags, one line each where that fits the terminal."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    width = WIDTH
    if console.is_terminal or "COLUMNS" in os.environ:
        width = min(WIDTH, console.width)
    for line in help_lines(prog, description, flags, width):
        console.print(line)


def help_lines(prog: str, description: str, flags: list[Flag], width: int) -> Iterator[Text]:
    """The lines of ``--help``, none of more than ``width`` columns (at least 40)."""
    usage = f"usage: {prog} [--flag=value ...]"
    for paragraph in [usage, *re.split(r"\n\s*\n", description.strip())]:
        yield from map(Text, textwrap.wrap(" ".join(paragraph.split()), width))
        yield Text()
    for group in dict.fromkeys(flag.group for flag in flags):
        yield Text(group, "bold")
        for flag in flags:
            if flag.group == group:
                yield from _flag_lines(flag, width)
        yield Text()
    if any(not flag.metavar for flag in flags):
        yield from map(
            Text, textwrap.wrap("A switch is turned on by --flag and off by --no_flag.", width)
        )


def _flag_lines(flag: Flag, width: int) -> Iterator[Text]:
    choices = f"{flag.metavar}: " if "|" in flag.metavar else ""
    name = f"--{flag.name} {flag.metavar}" if flag.metavar and not choices else f"--{flag.name}"
    stacked = width < _STACKED_BELOW
    indent = 6 if stacked else _LEFT
    default = flag.default.replace(" ", "\xa0")  # a number and its unit stay together
    text = f"{choices}{flag.description} [{default}]"
    lines = textwrap.wrap(text, width - indent, break_on_hyphens=False)
    first, *others = (line.replace("\xa0", " ") for line in lines)
    styled = Text.assemble("  ", (name, "cyan"))
    if stacked or len(styled) + 1 >= indent:
        yield styled
        others = [first, *others]
    else:
        styled.append(" " * (indent - len(styled)) + first)
        yield styled
    for line in others:
        yield Text(" " * indent + line)
