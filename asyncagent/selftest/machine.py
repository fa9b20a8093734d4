"""What a run needs of the machine: packages, descriptors, disk, shared memory, worker processes."""

from __future__ import annotations

import asyncio
import os
import platform
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from asyncagent.envs.base import EnvRecipe, Outcome
from asyncagent.envs.scratch import temporary_folder
from asyncagent.envs.subproc import WorkerGroup
from asyncagent.placement import cores
from asyncagent.selftest.outcome import Failed, require
from asyncagent.structs import ArraySpec, Discrete, EnvSpec, FloatArray

MIN_DESCRIPTORS = 1024
MIN_DISK_GB = 1.0
MIN_SHARED_MB = 64.0
"""As much as containers have that nobody has thought about; one ViZDoom game takes 1 to 2."""
NUM_STEPS = 200


def check_packages() -> str:
    """What everything needs can be imported."""
    import msgspec
    import optree
    import torch
    import uvloop
    import zmq

    modules = (torch, np, zmq, optree, msgspec, uvloop)
    said = [f"{module.__name__} {module.__version__}" for module in modules]
    return f"Python {platform.python_version()}, {', '.join(said)}, {cores()} cores"


def check_machine() -> str:
    """Limits and room."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    unlimited = descriptors == resource.RLIM_INFINITY
    require(
        unlimited or descriptors >= MIN_DESCRIPTORS,
        f"{descriptors} open files allowed, should be {MIN_DESCRIPTORS} (ulimit -n)",
    )
    said = ["open files without limit" if unlimited else f"{descriptors:,} open files"]
    with temporary_folder() as folder:
        (folder / "written").write_bytes(bytes(1 << 20))
        free_gb = shutil.disk_usage(folder).free / 1e9
    where = tempfile.gettempdir()
    require(free_gb >= MIN_DISK_GB, f"{free_gb:.1f} GB free in {where}, should be {MIN_DISK_GB:g}")
    said.append(f"{free_gb:.0f} GB free in {where}")
    shared = Path("/dev/shm")
    require(os.access(shared, os.W_OK), f"{shared} cannot be written to")
    shared_mb = shutil.disk_usage(shared).free / 1e6
    require(
        shared_mb >= MIN_SHARED_MB,
        f"{shared_mb:.0f} MB free in {shared}, should be {MIN_SHARED_MB:g}",
    )
    said.append(f"{shared_mb:,.0f} MB of shared memory")
    return ", ".join(said)


def check_workers() -> str:
    """A worker process starts, and its rows arrive in order."""
    return asyncio.run(_step())


async def _step() -> str:
    recipe = EnvRecipe("asyncagent.selftest.machine:make_counter", {})
    group = WorkerGroup(
        recipe, Counter.spec, level_name="counter", seeds=(1, 2), name="selftest", timeout_s=30.0,
        max_failures=1,
    )  # fmt: skip
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    try:
        row = await group.reset()
        start_s = loop.time() - started_s
        started_s = loop.time()
        for number in range(1, NUM_STEPS + 1):
            row = await group.step(np.full(2, number % 7))
            if row.losses:
                raise Failed(f"the worker was lost: {row.losses[0].reason}")
            wanted = number + number % 7 / 10
            shown = row.observation[:, 0].tolist()
            require(np.allclose(shown, wanted), f"row {number} shows {shown}, must {wanted}")
        step_s = (loop.time() - started_s) / NUM_STEPS
    finally:
        await group.close()
    return f"ready after {start_s:.1f} s; {1e6 * step_s:,.0f} µs per step of 2 environments"


class Counter:
    """An environment that shows its number of steps and, behind the point, its last action."""

    spec = EnvSpec(ArraySpec((1,), "float32"), Discrete(7), 1)

    def __init__(self) -> None:
        self._steps = 0

    def reset(self) -> FloatArray:
        """See ``Env``."""
        return np.zeros(1, np.float32)

    def step(self, action: Any) -> Outcome:
        """See ``Env``."""
        self._steps += 1
        shown = np.full(1, self._steps + int(action) / 10, np.float32)
        return Outcome(shown, 0.0, False, False)

    def close(self) -> None:
        """See ``Env``."""


def make_counter(seed: int) -> Counter:
    """A ``Counter``; every one is the same."""
    return Counter()
