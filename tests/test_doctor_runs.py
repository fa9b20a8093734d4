"""Runs that are bound by one stage each, built of parts that know how long they slept.

What the accounts say is compared with what the parts know.  Whoever is woken on a busy machine is
late: the parts sleep so long that this does not matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncagent import building, conversation, envs
from asyncagent.accounting import Accounts
from asyncagent.config import resolve
from asyncagent.cpu_times import CpuTimes
from asyncagent.doctor import mean_stages
from asyncagent.host import ActorHost, HostFlags
from asyncagent.loop import train
from asyncagent.metrics import HostReport
from asyncagent.stages import Stages
from tests import sleepy, sleepy_net
from tests.relay import Relay, Weather

WATCHDOG_S = 900
POINTS = 0.05

pytestmark = (
    pytest.mark.slow
)  # parts sleep for real, long enough that a busy machine does not matter


class Taken:
    """All that a run's accounts have said, and when."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.stages: list[Stages] = []

    def mean(self, since: int = 1) -> Stages:
        """Over everything from the ``since``-th on; it begins where the one before ends."""
        seconds = [
            b - a for a, b in zip(self.times_s[since - 1 :], self.times_s[since:], strict=False)
        ]
        return mean_stages(zip(seconds, self.stages[since:], strict=True))


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    import faulthandler

    faulthandler.dump_traceback_later(WATCHDOG_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """What the next run's accounts will say."""
    taken = Taken()
    take = Accounts._take

    def noted(
        self: Accounts, cpu: CpuTimes | None, hosts: Iterable[HostReport]
    ) -> tuple[Stages, float]:
        stages, lag_ms = take(self, cpu, hosts)
        taken.times_s.append(time.perf_counter())
        taken.stages.append(stages)
        return stages, lag_ms

    monkeypatch.setattr(Accounts, "_take", noted)
    return taken


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[float, float]]]:
    """When each group of the next run was asked for a row, and when it had it: its own clock."""
    groups: list[list[tuple[float, float]]] = []
    make = envs.make_group

    def timed(times: list[tuple[float, float]], method: Any) -> Any:
        async def call(*args: Any) -> Any:
            times.append((time.perf_counter(), float("inf")))  # until now, for ever
            row = await method(*args)
            times[-1] = (times[-1][0], time.perf_counter())
            return row

        return call

    def make_timed(*args: Any, **flags: Any) -> Any:
        group: Any = make(*args, **flags)
        groups.append([])
        group.step, group.reset = timed(groups[-1], group.step), timed(groups[-1], group.reset)
        return group

    monkeypatch.setattr(building, "make_group", make_timed)
    return groups


@pytest.fixture
def unit_s() -> float:
    """Thirty times as long as a thread is late here, now, when it is woken."""
    late_s = []
    for _ in range(20):
        begin_s = time.perf_counter()
        time.sleep(0.005)
        late_s.append(time.perf_counter() - begin_s - 0.005)
    return max(0.06, 30 * sum(late_s) / len(late_s))


@pytest.fixture
def slept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the environments write."""
    folder = tmp_path / "slept"
    folder.mkdir()
    monkeypatch.setenv(sleepy.FOLDER, str(folder))
    for intervals in sleepy_net.SLEPT.values():
        intervals.clear()
    return folder


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_s: float,
    sleeps: tuple[float, float, float], frames: int, **flags: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train on what sleeps so many units per step, inference and update; the last report."""
    env_s, infer_s, learn_s = (unit_s * units for units in sleeps)
    monkeypatch.setenv(sleepy.SECONDS, str(env_s))
    monkeypatch.setitem(sleepy_net.SLEEPS, "inference", infer_s)
    monkeypatch.setitem(sleepy_net.SLEEPS, "learner", learn_s)
    values: dict[str, Any] = {
        "level_name": "tests.sleepy:Sleepy",
        "logdir": str(tmp_path / "run"),
        "net": "tests.sleepy_net:build",
        "num_actors": 2,
        "num_groups": 2,
        "batch_size": 2,
        "unroll_length": 2,
        "learner_threads": 1,
        "inference_threads": 1,
        "micro_batch_rows": 1000,
        "num_action_repeats": 1,
        "total_environment_frames": frames,
        "report_interval_s": 8 * unit_s,
    }
    train(resolve(**(values | flags)))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    report: dict[str, Any] = json.loads(lines[-1])
    return report


@pytest.mark.parametrize(
    ("limit", "sleeps"),
    [("environments", (5, 1, 2)), ("inference", (2, 6, 2)), ("learner", (2, 0.4, 8))],
)
def test_the_slow_stage_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: Taken, slept: Path, unit_s: float,
    stepped: list[list[tuple[float, float]]], limit: str, sleeps: tuple[float, float, float],
) -> None:  # fmt: skip
    """A run bound by a stage says so, and its shares are what the parts themselves have seen."""
    report = run(tmp_path, monkeypatch, unit_s, sleeps, 36)
    assert report["verdict"]["limit"] == limit, report["stages"]
    assert report["verdict"]["advice"].startswith(("the ", limit))
    found = taken.mean()
    window = (taken.times_s[0], taken.times_s[-1])
    seconds = window[1] - window[0]
    # What a step takes beyond the sleep, where no core is free at once, is a step's time, too.
    stepping = sum(sleepy.slept_s(times, *window) for times in stepped) / seconds / 2
    asleep = [sleepy.slept_s(times, *window) for times in sleepy.environments(slept)]
    assert 0 < sum(asleep) / seconds / 2 <= stepping
    inferring = sleepy.slept_s(sleepy_net.SLEPT["inference"], *window) / seconds
    learning = sleepy.slept_s(sleepy_net.SLEPT["learner"], *window) / seconds
    assert found.env_steps == pytest.approx(stepping, abs=POINTS)
    assert found.inference_computes == pytest.approx(inferring, abs=POINTS)
    assert found.learner_computes == pytest.approx(learning, abs=POINTS)
    assert found.inference_waits == pytest.approx(1 - inferring, abs=POINTS)
    assert found.learner_waits == pytest.approx(1 - learning, abs=POINTS)
    waiting = found.env_waits_actions + found.env_waits_learner
    assert waiting == pytest.approx(1 - stepping, abs=POINTS)
    assert 0 < found.cores_busy <= 1 and 0 < found.loop_busy < 0.5
    parts = (found.env_cpu, found.inference_cpu, found.learner_cpu)
    assert all(0 <= part <= found.cores_busy + 0.01 for part in parts)
    assert math.isnan(found.hosts_wait)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextlib.contextmanager
def host_behind(port: int, weather: Weather, **flags: Any) -> Iterator[None]:
    """A host, on a thread with a loop of its own, that reaches the port through a relay."""
    ready = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []
    ended = asyncio.Event()

    async def live() -> None:
        async with Relay(("127.0.0.1", port), weather).running() as relay:
            host = ActorHost(HostFlags(f"tcp://127.0.0.1:{relay.port}", **flags))
            loops.append(asyncio.get_running_loop())
            ready.set()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(host.run())
                await ended.wait()
                host.stop()

    def host() -> None:
        try:
            asyncio.run(live())
        except BaseException:
            os.kill(os.getpid(), signal.SIGINT)  # the run would wait for ever
            raise

    thread = threading.Thread(target=host, name="a host", daemon=True)
    thread.start()
    ready.wait(WATCHDOG_S)
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # it has failed
            loops[0].call_soon_threadsafe(ended.set)
        thread.join(WATCHDOG_S)
        assert not thread.is_alive()


@pytest.mark.parametrize("inference", ["host", "learner"])
def test_the_slow_network_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: Taken, slept: Path, unit_s: float,
    inference: str,
) -> None:  # fmt: skip
    """Behind a slow link a host waits, and so does the learner; both say how long."""
    monkeypatch.setattr(conversation, "PING_S", 4 * unit_s)
    port = free_port()
    weather = Weather(bytes_per_s=20_000 / unit_s)
    with host_behind(port, weather, num_actors=2, num_groups=1, inference=inference):
        report = run(
            tmp_path, monkeypatch, unit_s, (0.8, 0.0, 0.2), 40,
            listen=f"tcp://127.0.0.1:{port}", num_actors=0, num_groups=0,
            level_name="tests.sleepy:Wide",  # an unroll of 2 has 240 KB
        )  # fmt: skip
    assert report["verdict"]["limit"] == "network", report["stages"]
    told = [index for index, stages in enumerate(taken.stages) if stages.hosts_wait > 0]
    since, last = told[0] + 1, told[-1]
    window = (taken.times_s[since - 1], taken.times_s[last])
    stages = taken.mean(since)
    groups = [times for times in sleepy.environments(slept) if times]
    stepping = sum(sleepy.slept_s(times, *window) for times in groups) / (window[1] - window[0])
    assert stages.hosts_step == pytest.approx(stepping, abs=POINTS)
    assert stages.hosts_wait == pytest.approx(1 - stepping, abs=POINTS)
    assert math.isnan(stages.env_steps)
    assert stages.learner_waits > 0.9
