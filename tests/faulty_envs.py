"""Environments for worker processes that behave, and misbehave, on cue."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np

from asyncagent.envs.base import Outcome
from asyncagent.errors import UsageError
from asyncagent.structs import (
    ActionSpace,
    ArraySpec,
    Box,
    Discrete,
    EnvSpec,
    MultiDiscrete,
    Nest,
)

COUNTER_SPEC = EnvSpec(ArraySpec((3,), "float32"), Discrete(3), 1)
MIRROR_ACTIONS: dict[str, ActionSpace] = {
    "Discrete": Discrete(4),
    "MultiDiscrete": MultiDiscrete((3, 2)),
    "Box": Box(2),
}


class Counter:
    """Shows (steps this object took in its life, its seed % 1000, its process); pays the action.

    Episodes last ``length`` steps; the last one is a truncation if ``truncates``, and shows
    nothing if ``blind``.  ``score``, if given, is each step's score.
    """

    def __init__(
        self,
        seed: int,
        length: int = 3,
        truncates: bool = False,
        blind: bool = False,
        score: float | None = None,
        tape: str | None = None,
    ) -> None:
        self.spec = COUNTER_SPEC
        self._seed = seed
        self._length = length
        self._truncates = truncates
        self._blind = blind
        self._score = score
        self._tape = tape
        self._steps = 0
        self._in_episode = 0
        self._record("make")

    def reset(self) -> Nest:
        self._in_episode = 0
        self._record("reset")
        return self._show()

    def step(self, action: Any) -> Outcome:
        self._steps += 1
        self._in_episode += 1
        over = self._in_episode == self._length
        shown = None if over and self._blind else self._show()
        cut = over and self._truncates
        return Outcome(shown, float(action), over and not cut, cut, self._score)

    def close(self) -> None:
        self._record("close")

    def _show(self) -> Nest:
        return np.array([self._steps, self._seed % 1000, os.getpid()], np.float32)

    def _record(self, what: str) -> None:
        if self._tape is not None:
            with open(self._tape, "a") as file:
                file.write(f"{what} {self._seed}\n")


def counter(seed: int, **options: Any) -> Counter:
    """A well-behaved environment."""
    return Counter(seed, **options)


class Faulty(Counter):
    """Does something bad on cue: ``faults`` holds (seed, call, number of the call, what).

    A seed of None is every environment's.
    """

    def __init__(self, seed: int, faults: Sequence[Sequence[Any]], **options: Any) -> None:
        self._faults = faults
        self._calls = {"make": 0, "reset": 0, "step": 0, "close": 0}
        self._seed = seed
        self._meet_fate("make")
        super().__init__(seed, **options)

    def reset(self) -> Nest:
        return self._meet_fate("reset") or super().reset()

    def step(self, action: Any) -> Outcome:
        outcome: Outcome = self._meet_fate("step") or super().step(action)
        return outcome

    def close(self) -> None:
        self._meet_fate("close")
        super().close()

    def _meet_fate(self, call: str) -> Any:
        self._calls[call] += 1
        for seed, on_call, number, what in self._faults:
            if (on_call, number) == (call, self._calls[call]) and seed in (None, self._seed):
                return misbehave(what, self._seed)
        return None


def faulty(seed: int, **options: Any) -> Faulty:
    """An environment with faults."""
    return Faulty(seed, **options)


def misbehave(what: str, seed: int) -> Any:
    """Do it; what it returns is returned in place of the real thing."""
    what, _, path = what.partition(" ")
    if what == "raise":
        raise OSError(f"emulator {seed} on fire")
    if what == "usage":
        raise UsageError("no such map")
    if what == "sys.exit":
        sys.exit(7)
    if what == "exit":
        print(f"last words of {seed}")
        os._exit(3)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "segfault":
        ctypes.string_at(0)
    if what == "hang":
        Path(path).touch()
        threading.Event().wait()
    if what == "hang-with-gil":
        Path(path).touch()
        ctypes.PyDLL(None).sleep(10**6)
    if what == "wait":
        Path(path + ".waits").touch()
        while not Path(path).exists():
            threading.Event().wait(0.001)
    if what == "scribble":
        for memory in gc.get_objects():
            if isinstance(memory, mmap):
                memory[:64] = b"\xff" * 64
        os._exit(3)
    if what == "babble":
        os.write(int(sys.argv[4]), b"x" if path else b"xyz")
        threading.Event().wait()
    if what == "nonsense":
        os.write(int(sys.argv[4]), b"+")
        threading.Event().wait()
    if what == "flood":
        for line in range(20_000):
            print(f"line {line} of seed {seed} and some more words to make it long")
    if what == "engine":
        # A process of the engine's, which outlives whoever started it unless it is killed.
        engine = subprocess.Popen(["sleep", "100000"])
        Path(path).write_text(str(engine.pid))
    if what == "nan":
        return Outcome(np.zeros(3, np.float32), float("nan"), False, False)
    if what == "huge":
        return Outcome(np.zeros(3, np.float32), -1e39, False, False)
    if what == "score":
        return Outcome(np.zeros(3, np.float32), 0.0, False, False, float("inf"))
    if what == "shape":
        return Outcome(np.zeros((2, 2), np.float32), 0.0, False, False)
    if what == "dtype":
        return Outcome(np.zeros(3), 0.0, False, False)
    if what == "list":
        return Outcome([0.0, 0.0, 0.0], 0.0, False, False)
    if what == "nothing":
        return Outcome(None, 0.0, False, False)
    return None


class Mirror:
    """Shows the last action and how many steps were taken, under two names."""

    def __init__(self, space: str) -> None:
        actions = MIRROR_ACTIONS[space]
        self.spec = EnvSpec(
            {"action": actions.array, "steps": ArraySpec((), "int64")}, actions, action_repeats=2
        )
        self._steps = 0

    def reset(self) -> Nest:
        one = self.spec.actions.array
        return {"steps": np.int64(self._steps), "action": np.zeros(one.shape, one.dtype)}

    def step(self, action: Any) -> Outcome:
        self._steps += 1
        assert action.dtype == self.spec.actions.array.dtype
        shown = {"steps": np.int64(self._steps), "action": action}
        return Outcome(shown, 0.0, False, False)

    def close(self) -> None:
        pass


def mirror(seed: int, space: str) -> Mirror:
    """An environment with a dict of observations."""
    return Mirror(space)


def tell(seed: int) -> Any:
    """No environment, but what the worker process is like."""
    variables = ("OMP_NUM_THREADS", "LP_NUM_THREADS")
    facts = {
        "torch": "torch" in sys.modules,
        "pickled": "multiprocessing" in sys.modules,
        "cwd": os.getcwd(),
        "group": os.getpgid(0) == os.getpid(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        **{name: os.environ[name] for name in variables},
    }
    raise UsageError(json.dumps(facts))


def bad_spec(seed: int) -> Any:
    """An environment whose spec no group can have."""
    env = Counter(seed)
    env.spec = EnvSpec((ArraySpec((3,), "float32"),), Discrete(3), 1)
    return env


NOT_CALLABLE = 3
