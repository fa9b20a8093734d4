"""``asyncagent actors``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from asyncagent.host import HostFlags, run_host

DESCRIPTION = """Run environments for a learner elsewhere (asyncagent train --listen=...).

Levels, network and everything else that is not a flag here come from the learner. Ends with Ctrl-C;
a learner that goes away is waited for, and gone on with when it is back."""


def main(arguments: Sequence[str]) -> int:
    """Parse the flags and act; returns the exit status."""
    from asyncagent.commands.cli import parse

    return run(parse(HostFlags, arguments, prog="asyncagent actors", description=DESCRIPTION))


def run(flags: HostFlags) -> int:
    """Act, until it has ended; returns the exit status. Loads no library that parses flags."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        run_host(flags)
    except TimeoutError as error:
        print(f"asyncagent actors: {error}", file=sys.stderr)
        return 1
    return 0
