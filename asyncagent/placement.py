"""Who computes where: threads, their priorities, and how often Python changes threads.

Decided here, once, from the cores there are; every value is a flag (see ``Config``).

- Threads that step environments have a lower priority than learning and inference.  A batch is
  learned from as soon as it is there, with weights that are the fresher for it, and acting fills
  every gap.  With equal priorities actors run ahead until the full queue stops them, and when the
  learner's threads end at different times a core idles.  Worker processes keep the normal one:
  they answer one environment after the other, and a core idled whenever they had to wait.
- Where steps take about the same time everywhere, worker processes, with the engines they start,
  are dealt out to the cores and stay there: worker and engine take turns, and do so without
  waking another core, nor a cold cache.
- A thread that returns from an operator waits for Python's lock up to the switch interval.
- On a CPU there are as many learning threads as cores.  They share micro-batches out, each
  operator is computed by one thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import threading
from pathlib import Path
from typing import NamedTuple

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


class Placement(NamedTuple):
    """Flag values; see the fields of ``Config`` of the same names."""

    env_threads: int
    inference_threads: int
    learner_threads: int
    env_niceness: int
    pin_workers: bool
    switch_interval_ms: float


def cores() -> int:
    """CPU cores this process may use; a container's limit counts, rounded up."""
    return max(1, math.ceil(core_time()))


def core_time() -> float:
    """Seconds of processor time per second that this process can get."""
    limit = cpu_limit()
    allowed = len(os.sched_getaffinity(0))
    return allowed if limit is None else min(allowed, limit)


@functools.cache
def cpu_limit(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """Cores' worth of time that the kernel's control groups leave this process; None: no limit.

    Args:
      groups: says which control groups the process is in.
      root: where they are mounted.
    """
    found = []
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, read = root, _limit_of_v2
        elif "cpu" in controllers.split(","):
            top, read = root / "cpu", _limit_of_v1
        else:
            continue
        # In a container the path may be the host's: then the top is the container's own group.
        folder = top / path.lstrip("/")
        found += [read(place) for place in (folder, *folder.parents) if place.is_relative_to(top)]
    return min((limit for limit in found if limit is not None), default=None)


def _limit_of_v2(folder: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    return None


def _limit_of_v1(folder: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 else None
    return None


def place(
    num_cores: int, num_groups: int, group_size: int, *, in_workers: bool, even_steps: bool
) -> Placement:
    """The placement for ``num_groups`` groups of ``group_size`` environments each.

    Args:
      in_workers: whether a group is a process of its own, rather than threads of this one.
      even_steps: whether every group has as much to do as the others, resets included.
    """
    return Placement(
        env_threads=max(1, min(group_size, num_cores // num_groups)),
        inference_threads=max(1, num_cores // 8),
        learner_threads=num_cores,
        env_niceness=0 if in_workers else 10,
        pin_workers=in_workers and even_steps,
        switch_interval_ms=0.5,
    )


def core_of_worker(index: int, num_workers: int) -> int | None:
    """The core that a pinned worker keeps to; None, any, where some would get more than others."""
    allowed = sorted(os.sched_getaffinity(0))
    return None if num_workers % len(allowed) else allowed[index % len(allowed)]


def lower_priority(niceness: int) -> None:
    """Add ``niceness`` (0 to 19) to the calling thread's; no other thread is concerned."""
    if niceness:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + niceness)


def keep_freed_memory() -> None:
    """Let the C library reuse freed memory instead of giving it back to the kernel.

    An update frees and allocates the same large arrays over and over; by default each of them
    costs a page fault per 4 KB.  Best called before there are threads: those that were there keep
    an arena of their own.  Does nothing where the library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # A second arena could not hold what is larger than 64 MB, and would map it each time.
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


@functools.cache
def last_level_cache_bytes() -> int:
    """Size of the first core's last cache; 16 MB where the kernel does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = path.read_text().strip()[:-1], path.read_text().strip()[-1]
        sizes.append(int(number) * {"K": 1 << 10, "M": 1 << 20}[unit])
    return max(sizes, default=16 << 20)
