"""Folders of runs on the command line, however they are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


def gathered(kind: type, arguments: Sequence[str], name: str = "logdir") -> list[str]:
    """``arguments`` with every path behind one ``--logdir``, as ``cli.parse`` takes it.

    ``A B``, ``--logdir A B``, ``--logdir=A --logdir=B`` and mixtures of these are the same.

    Args:
      kind: dataclass of the command's flags.
    """
    switches = {f.name for f in dataclasses.fields(kind) if f.type in (bool, "bool")}
    others: list[str] = []
    paths: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        said = flag.removeprefix("--").replace("-", "_")
        if not word.startswith("-"):
            paths.append(word)
        elif said == name:
            paths += [value] if equals else []  # its values follow, as those without it
        else:
            others.append(word)
            if not equals and said.removeprefix("no_") not in switches and said != "help":
                others += [follower for follower in [next(words, None)] if follower is not None]
    return [*others, f"--{name}", *paths] if paths else others
