"""An environment each fault of which happens once per run, whichever process gets there first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from asyncagent.envs.base import Outcome
from tests.faulty_envs import Counter, misbehave

FOLDER = "ASYNCAGENT_BREAKING_FOLDER"
"""Environment variable: where every fault that happened leaves a file of its name."""
FAULTS = {"raise": 20, "kill": 40, "segfault": 60, "hang": 80}
"""By step of an environment's life."""
FAILED_STARTS = ("start0", "start1")


class Breaking(Counter):
    """Episodes of seven steps; see ``Counter`` for what it shows."""

    def __init__(self, seed: int) -> None:
        # The first of all is made to ask for its spec.
        if not _happens("probe"):
            for start in FAILED_STARTS:
                if _happens(start):
                    os._exit(3)
        super().__init__(seed, length=7)

    def step(self, action: Any) -> Outcome:
        for what, step in FAULTS.items():
            if self._steps == step and _happens(what):
                misbehave(f"{what} {_folder() / 'hangs'}", self._seed)
        return super().step(action)


def _folder() -> Path:
    return Path(os.environ[FOLDER])


def _happens(what: str) -> bool:
    try:
        (_folder() / what).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Hopeless(Counter):
    """Its third step always fails."""

    def step(self, action: Any) -> Outcome:
        if self._steps == 2:
            print("the emulator's last words")
            raise OSError("broken for good")
        return super().step(action)
