"""Flags of a script: what is wrong with them is told in one line, with status 2."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import NoReturn

INSIDE = "ASYNCAGENT_OWN_MOUNTS"
_WAYS = (("--mount",), ("--user", "--map-root-user", "--mount"))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser of few words."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def positive(text: str) -> float:
    """A number above zero; what argparse wants where it is none."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number > 0")
    return value


def enter_own_mounts() -> bool:
    """Start this program anew with mounts of its own, /dev/shm among them, which go with it.

    False where that is not possible; where it is, the call returns only in the new program: True.
    """
    if INSIDE in os.environ:
        return os.environ.pop(INSIDE) == "yes"
    for way in _WAYS:
        command = ["unshare", *way, "--"]
        mount = ["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
        try:
            subprocess.run([*command, *mount], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        os.environ[INSIDE] = "yes"
        os.execvp("unshare", [*command, sys.executable, *sys.orig_argv[1:]])
    return False
