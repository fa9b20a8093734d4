"""Flags from dataclasses, with every mistake told in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from asyncagent.commands.flags import flags_of, print_help
from asyncagent.errors import ConfigError

C = TypeVar("C")


def parse(
    kind: type[C],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str,
    default: C | None = None,
) -> C:
    """Parse ``--flag=value`` (also ``--flag value``, ``_`` or ``-``) into dataclass ``kind``.

    ``--help`` prints and exits with 0. Raises ConfigError, one line, for what does not parse.
    """
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    if {"-h", "--help"} & set(arguments):
        print_help(prog, description, flags_of(kind, default))
        raise SystemExit(0)
    check_names(arguments, [field.name for field in fields])
    switches = {field.name for field in fields if field.type in (bool, "bool")}
    options: dict[str, Any] = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config: C = tyro.cli(
                kind,
                prog=prog,
                description=description,
                args=[_switch(argument, switches) for argument in arguments],
                config=(tyro.conf.FlagConversionOff,),
                **options,
            )
            return config
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(_one_line(said.getvalue())) from None


def _switch(argument: str, switches: set[str]) -> str:
    """A switch may be written --use_lstm, --use_lstm=true or --no_use_lstm."""
    name, equals, value = argument.partition("=")
    name = name.removeprefix("--").replace("-", "_")
    if not argument.startswith("--"):
        return argument
    if name in switches:
        spelt = {"true": "True", "1": "True", "false": "False", "0": "False"}
        return f"--{name}={spelt.get(value.lower(), value) if equals else 'True'}"
    if name.removeprefix("no_") in switches and not equals:
        return f"--{name.removeprefix('no_')}=False"
    return argument


def check_names(arguments: Sequence[str], known: Sequence[str]) -> None:
    """ConfigError with the nearest flags for a flag that does not exist."""
    for argument in arguments:
        if not argument.startswith("--") or argument == "--":
            continue
        name = argument[2:].split("=", 1)[0].replace("-", "_")
        if name not in known and name.removeprefix("no_") not in known and name != "help":
            near = difflib.get_close_matches(name, known, 3, 0.5)
            hint = f"did you mean --{', --'.join(near)}?" if near else "--help lists the flags"
            raise ConfigError(f"no flag --{name}: {hint}")


def value_of(arguments: Sequence[str], name: str) -> str | None:
    """The last value given to a flag, read before the flags are parsed."""
    value = None
    for position, argument in enumerate(arguments):
        flag, equals, rest = argument.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            if equals:
                value = rest
            elif position + 1 < len(arguments):
                value = arguments[position + 1]
    return value


def is_on(arguments: Sequence[str], name: str) -> bool | None:
    """The last value given to a switch, read before the flags are parsed; None if there is none."""
    value = None
    for argument in arguments:
        flag, _, said = _switch(argument, {name}).partition("=")
        if flag == f"--{name}":
            value = said == "True"
    return value


def _one_line(text: str) -> str:
    words = re.sub(r"[─-╿]|-{5,}", " ", text).split()  # frames, as the terminal can draw them
    line = " ".join(words)
    line = re.sub(r"^Value error Error parsing (--\S+) (.*?) Argument helptext:.*$", r"\1 \2", line)
    line = re.sub(r"^(Parsing error|Required options|Unrecognized options)\s*", "", line)
    line = re.sub(r"^Invalid choice (?=invalid choice )", "", line)
    line = re.sub(r"\s*For full helptext,.*$", "", line)
    line = re.sub(r"^Missing from .*?: (--\S+) \S+ (.*?) \(required\)$", r"\1 is missing: \2", line)
    return line or "the flags cannot be parsed"
