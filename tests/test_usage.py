"""What a run takes of its machine: its own share, its workers', and nothing where it is unknown."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from asyncagent.usage import Usage, UsageMeter

PAGE_GIB = os.sysconf("SC_PAGE_SIZE") / 2**30
TICKS = os.sysconf("SC_CLK_TCK")


def process(
    proc: Path, name: str, *, pages: tuple[int, int], cpu_s: tuple[int, int], children: str = ""
) -> None:
    """A process as Linux shows it: (resident, shared) pages, CPU seconds (own, dead children's)."""
    folder = proc / name
    (folder / "task" / "1").mkdir(parents=True, exist_ok=True)
    (folder / "task" / "1" / "children").write_text(children)
    (folder / "statm").write_text(f"9999 {pages[0]} {pages[1]} 1 0 2 0")
    own, dead = (seconds * TICKS for seconds in cpu_s)
    # Fields 14 to 17 are user, system, children's user and children's system time.
    (folder / "stat").write_text(f"7 (a) (b) S {'0 ' * 10}{own} 0 {dead} 0 20 0")


def test_own_share_and_workers(tmp_path: Path) -> None:
    """Memory, cores, threads and descriptors of a program with a worker that has one, too."""
    now_s = 100.0
    meter = UsageMeter(tmp_path, lambda: now_s)
    process(tmp_path, "self", pages=(1000, 300), cpu_s=(50, 7), children="11 ")
    process(tmp_path, "11", pages=(200, 50), cpu_s=(20, 0), children="12 ")
    process(tmp_path, "12", pages=(40, 10), cpu_s=(5, 0))
    (tmp_path / "self" / "task" / "2").mkdir()
    (tmp_path / "self" / "fd").mkdir()
    for name in "012":
        (tmp_path / "self" / "fd" / name).touch()
    first = meter.read()
    assert first.memory_gib == pytest.approx(1000 * PAGE_GIB)
    assert first.workers_memory_gib == pytest.approx(180 * PAGE_GIB)
    assert (first.threads, first.descriptors, first.workers) == (2, 3, 2)
    assert math.isnan(first.cores) and math.isnan(first.workers_cores)
    now_s = 110.0
    process(tmp_path, "self", pages=(1000, 300), cpu_s=(65, 7), children="11 ")
    # Worker 12 has ended after another 5 seconds: they are with its parent.
    process(tmp_path, "11", pages=(200, 50), cpu_s=(30, 10))
    second = meter.read()
    assert second.cores == pytest.approx(1.5)
    assert second.workers_cores == pytest.approx(1.5)
    assert second.workers == 1


def test_a_worker_that_vanishes_is_left_out(tmp_path: Path) -> None:
    """One that ended between being listed and being read spoils nothing."""
    process(tmp_path, "self", pages=(1000, 300), cpu_s=(50, 7), children="11 12 ")
    process(tmp_path, "12", pages=(40, 10), cpu_s=(5, 0))
    (tmp_path / "self" / "fd").mkdir()
    assert UsageMeter(tmp_path).read().workers == 1


def test_nothing_known(tmp_path: Path) -> None:
    """Where processes are not shown as Linux does, nothing is known, and nothing raised."""
    assert UsageMeter(tmp_path).read() == Usage()


def test_this_process() -> None:
    """Of a real process, everything is known at the second reading."""
    now_s = iter([1.0, 2.0])
    meter = UsageMeter(clock=lambda: next(now_s))
    meter.read()
    usage = meter.read()
    assert 0 < usage.memory_gib < 1000
    assert usage.threads >= 1 and usage.descriptors >= 3
    assert usage.cores >= 0 and usage.workers_cores >= 0
