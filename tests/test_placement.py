"""Where threads go, decided from the number of cores."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

import asyncagent.placement as placement_module
from asyncagent.config import resolve
from asyncagent.errors import ConfigError
from asyncagent.placement import (
    core_of_worker,
    cpu_limit,
    last_level_cache_bytes,
    lower_priority,
    place,
)


@pytest.mark.parametrize("num_cores", [1, 2, 8, 64])
def test_threads_follow_the_cores(num_cores: int) -> None:
    """Every core has a learning thread; environment threads do not outnumber cores by much."""
    groups = max(4, num_cores)
    placement = place(num_cores, groups, 16, in_workers=False, even_steps=True)
    assert placement.learner_threads == num_cores
    assert 1 <= placement.inference_threads <= num_cores
    assert placement.env_threads * groups <= max(groups, num_cores)


def test_one_threads_priority_is_lowered() -> None:
    """The thread that asks becomes nicer, its process does not."""
    before, inside = os.getpriority(os.PRIO_PROCESS, 0), []

    def work() -> None:
        lower_priority(3)
        inside.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [min(19, before + 3)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_cache_size_is_plausible() -> None:
    """Between a quarter of a megabyte and a gigabyte."""
    assert 1 << 18 <= last_level_cache_bytes() <= 1 << 30


def test_workers_are_dealt_out_to_the_cores_there_are() -> None:
    """In turn, and only where every core gets as many; a flag has its way."""
    allowed = sorted(os.sched_getaffinity(0))
    count = 2 * len(allowed)
    assert [core_of_worker(index, count) for index in range(count)] == allowed * 2
    if len(allowed) > 1:
        assert core_of_worker(0, count + 1) is None
    assert place(4, 4, 16, in_workers=True, even_steps=True).pin_workers
    assert not place(4, 4, 16, in_workers=True, even_steps=False).pin_workers
    assert not place(4, 4, 16, in_workers=False, even_steps=True).pin_workers
    assert resolve("doom_basic").pin_workers
    assert not resolve("doom_basic", pin_workers=False).pin_workers
    assert not resolve("doom_basic,doom_corridor").pin_workers


def test_doom_infers_two_groups_together() -> None:
    """Half of the actors there are, whatever their number, where that leaves two to step."""
    assert resolve("doom_basic", num_actors=32, num_groups=4).min_inference_rows == 16
    assert resolve("doom_basic", num_actors=32, num_groups=2).min_inference_rows == 1
    assert resolve("doom_basic", min_inference_rows=5).min_inference_rows == 5


def test_flags_override_the_placement() -> None:
    """Each value is a flag, and checked as one."""
    config = resolve("atari_pong", learner_threads=3, env_niceness=0)
    assert (config.learner_threads, config.env_niceness) == (3, 0)
    with pytest.raises(ConfigError, match=r"env_niceness=20 must be in \[0, 19\]"):
        resolve("atari_pong", env_niceness=20)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {}, None),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        ("0::/of/the/host", {"cpu.max": "400000 100000"}, 4.0),
        (
            "3:cpuset:/\n1:cpu,cpuacct:/job",
            {"cpu/job/cpu.cfs_quota_us": "300000", "cpu/job/cpu.cfs_period_us": "100000"},
            3.0,
        ),
        (
            "1:cpu:/",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("0::/", {"cpu.max": "no number"}, None),
        (None, {"cpu.max": "150000 100000"}, None),
    ],
)
def test_a_containers_limit_counts(
    tmp_path: Path, groups: str | None, files: dict[str, str], expected: float | None
) -> None:
    """The smallest of the limits of all control groups around the process, of either version."""
    root = tmp_path / "cgroup"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    if groups is not None:
        (tmp_path / "groups").write_text(groups + "\n")
    assert cpu_limit(tmp_path / "groups", root) == expected


@pytest.mark.parametrize(("limit", "expected"), [(None, 6), (1.5, 2), (0.1, 1), (64.0, 6)])
def test_cores_are_those_allowed_within_the_limit(
    monkeypatch: pytest.MonkeyPatch, limit: float | None, expected: int
) -> None:
    """A limit is rounded up, and adds no core."""
    monkeypatch.setattr(placement_module, "cpu_limit", lambda: limit)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert placement_module.cores() == expected
    assert placement_module.core_time() == (6 if limit is None else min(limit, 6))
