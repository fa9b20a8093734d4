"""Checks for the selftest's runner that do what checks must not."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
import time
from typing import Any

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


def goes_quiet() -> str:
    """Closes what it would answer to, and lives on."""
    print("the last words", file=sys.stderr, flush=True)
    os.closerange(3, 100)
    time.sleep(1000)
    return "not reached"


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


def dying() -> Any:
    """An environment that ends its process at the third step."""
    import gymnasium  # not where a check that hangs is timed

    class Dying(gymnasium.Env[Any, Any]):
        observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            self.steps = 0
            return self.observation_space.sample(), {}

        def step(self, action: Any) -> Any:
            self.steps += 1
            if self.steps == 3:
                os._exit(3)
            return self.observation_space.sample(), 0.0, False, False, {}

    return Dying()
