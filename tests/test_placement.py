"""Where threads go, decided from the number of cores."""

from __future__ import annotations

import os
import threading

import pytest

from asyncagent.config import resolve
from asyncagent.errors import ConfigError
from asyncagent.placement import last_level_cache_bytes, lower_priority, place


@pytest.mark.parametrize("num_cores", [1, 2, 8, 64])
def test_threads_follow_the_cores(num_cores: int) -> None:
    """Every core has a learning thread; environment threads do not outnumber cores by much."""
    groups = max(4, num_cores)
    placement = place(num_cores, groups, 16, in_workers=False)
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


def test_flags_override_the_placement() -> None:
    """Each value is a flag, and checked as one."""
    config = resolve("atari_pong", learner_threads=3, env_niceness=0)
    assert (config.learner_threads, config.env_niceness) == (3, 0)
    with pytest.raises(ConfigError, match=r"env_niceness=20 must be in \[0, 19\]"):
        resolve("atari_pong", env_niceness=20)
