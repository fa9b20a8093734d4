"""Checks for the selftest's runner that do what checks must not."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
import time
from typing import Any

import gymnasium
import numpy as np

from asyncagent.selftest.outcome import Absent, Failed


def good(words: str) -> str:
    """What it is told."""
    return words


def talks() -> str:
    """Prints where the answers go."""
    print('{"state": "failed", "detail": "said by an engine"}', flush=True)
    return "talked"


def fails() -> str:
    raise Failed("1 is not 2")


def misses() -> str:
    raise Absent("there is no such thing")


def raises_in_a_group() -> str:
    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(broken())

    async def broken() -> None:
        raise ValueError("a line\nand another")

    asyncio.run(main())
    return "not reached"


def exits() -> str:
    print("the last words", file=sys.stderr, flush=True)
    os._exit(7)


def crashes() -> str:
    ctypes.string_at(0)
    return "not reached"


def hangs(pids: str) -> str:
    """With a process of its own, whose number it writes to the file ``pids``."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    with open(pids, "w") as file:
        file.write(f"{process.pid} {os.getpid()}")
    time.sleep(1000)
    return "not reached"


class Dying(gymnasium.Env[Any, Any]):
    """Ends its process at the third step."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self) -> None:
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self._steps += 1
        if self._steps == 3:
            os._exit(3)
        return np.zeros(1, np.float32), 0.0, False, False, {}
