"""``asyncagent keys``."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from asyncagent.commands.cli import parse
from asyncagent.errors import ConfigError
from asyncagent.keys import make_keys

DESCRIPTION = """Make a key pair for a learner, or for its actor hosts.

NAME.key is public, for the other side; NAME.key_secret stays on the machine that it is for. With
them the connection is encrypted, and either side knows the other. Hosts may share a pair; with
one each, each can be shut out by deleting its NAME.key from the learner's --allowed_keys."""


@dataclass(frozen=True)
class KeysFlags:
    """Flags of ``asyncagent keys``."""

    out: str = "keys"
    """Folder to write to; made if missing, for its owner alone."""
    name: str = ""
    """Of the pair, and of a host in reports; none: this machine's."""

    def __post_init__(self) -> None:
        if not self.out:
            raise ConfigError("out='' must be the name of a folder")


def main(arguments: Sequence[str]) -> int:
    """Parse the flags, write the pair, say what to do with it; returns the exit status."""
    flags = parse(KeysFlags, arguments, prog="asyncagent keys", description=DESCRIPTION)
    public, secret = make_keys(Path(flags.out), flags.name or socket.gethostname())
    print(f"public key: {public}\nsecret key: {secret}")
    print(
        f"""
for a learner: asyncagent train --listen=tcp://0.0.0.0:5555 --secret_key={secret} \
--allowed_keys=DIR, where DIR holds the hosts' *.key; the hosts get {public.name}
for actor hosts: asyncagent actors --connect=tcp://LEARNER:5555 --secret_key={secret} \
--learner_key=LEARNER.key; {public.name} goes into the learner's DIR"""
    )
    return 0
