"""What a run takes of its machine: its own share, its workers', and nothing where it is unknown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from asyncagent.usage import Usage, read_usage

PAGE_GIB = os.sysconf("SC_PAGE_SIZE") / 2**30


def process(proc: Path, name: str, *, pages: tuple[int, int], children: str = "") -> None:
    """A process as Linux shows it: (resident, shared) pages."""
    folder = proc / name
    (folder / "task" / "1").mkdir(parents=True, exist_ok=True)
    (folder / "task" / "1" / "children").write_text(children)
    (folder / "statm").write_text(f"9999 {pages[0]} {pages[1]} 1 0 2 0")


def test_own_share_and_workers(tmp_path: Path) -> None:
    """Memory, threads and descriptors of a program with a worker that has one, too."""
    process(tmp_path, "self", pages=(1000, 300), children="11 ")
    process(tmp_path, "11", pages=(200, 50), children="12 ")
    process(tmp_path, "12", pages=(40, 10))
    (tmp_path / "self" / "task" / "2").mkdir()
    (tmp_path / "self" / "fd").mkdir()
    for name in "012":
        (tmp_path / "self" / "fd" / name).touch()
    usage = read_usage(tmp_path)
    assert usage.memory_gib == pytest.approx(1000 * PAGE_GIB)
    assert usage.workers_memory_gib == pytest.approx(180 * PAGE_GIB)
    assert (usage.threads, usage.descriptors, usage.workers) == (2, 3, 2)


def test_a_worker_that_vanishes_is_left_out(tmp_path: Path) -> None:
    """One that ended between being listed and being read spoils nothing."""
    process(tmp_path, "self", pages=(1000, 300), children="11 12 ")
    process(tmp_path, "12", pages=(40, 10))
    (tmp_path / "self" / "fd").mkdir()
    assert read_usage(tmp_path).workers == 1


def test_nothing_known(tmp_path: Path) -> None:
    """Where processes are not shown as Linux does, nothing is known, and nothing raised."""
    assert read_usage(tmp_path) == Usage()


def test_this_process() -> None:
    """Of a real process, everything is known."""
    usage = read_usage()
    assert 0 < usage.memory_gib < 1000
    assert usage.threads >= 1 and usage.descriptors >= 3
