"""A learner and three actor hosts as processes, each on a network of its own: cut off, and killed.

Needs network namespaces (root, and ``ip`` of iproute2) where it says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncagent.checkpoint import checkpoint_paths, load_checkpoint
from asyncagent.evaluation import evaluate
from asyncagent.keys import make_keys
from tests.counting import FOLDER, learned

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
WATCHDOG_S = 600
MARK = "ASYNCAGENT_TEST"
PORT = 5555
HOSTS = {"one": "host", "two": "host", "three": "learner"}
"""Name of a host: where it infers."""
REPEATS = 1
COLUMN = 20
"""Steps of an unroll."""


def until(found: Callable[[], Any], within_s: float = WATCHDOG_S) -> None:
    """Wait for what other processes do."""
    deadline_s = time.monotonic() + within_s
    while not found():
        assert time.monotonic() < deadline_s, "nothing happens"
        time.sleep(0.1)


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True)


class Site:
    """Processes, and the networks between them; all gone when the test is over."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logdir = folder / "run"
        self.learned = folder / "learned"
        self.learned.mkdir()
        self.mark = uuid.uuid4().hex
        self.there: dict[str, subprocess.Popen[str]] = {}
        self.networks: list[str] = []
        self._prefix = f"aa{os.getpid()}"

    def lay_networks(self) -> None:
        """A network for the learner, and a cable from it to each host's own."""
        if shutil.which("ip") is None:
            pytest.skip("needs ip of iproute2")
        try:
            self._add("learner")
            for number, name in enumerate(HOSTS, 1):
                self._add(name)
                here, there = f"{self._prefix}l{number}", f"{self._prefix}h{number}"
                ip(f"link add {here} type veth peer name {there}")
                for network, link, end in (("learner", here, 1), (name, there, 2)):
                    ip(f"link set {link} netns {self._prefix}{network}")
                    ip(f"-n {self._prefix}{network} addr add 10.77.{number}.{end}/24 dev {link}")
                    ip(f"-n {self._prefix}{network} link set {link} up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces: {error.stderr.strip()}")

    def _add(self, name: str) -> None:
        ip(f"netns add {self._prefix}{name}")
        self.networks.append(name)
        ip(f"-n {self._prefix}{name} link set lo up")

    def set_cable(self, name: str, state: str) -> None:
        """Plug a host's cable in (up) or out (down)."""
        number = [*HOSTS].index(name) + 1
        ip(f"-n {self._prefix}learner link set {self._prefix}l{number} {state}")

    def start(self, name: str, *arguments: str, network: str = "") -> subprocess.Popen[str]:
        """A process of that name, its errors in ``log(name)``."""
        inside = ["ip", "netns", "exec", self._prefix + network] if self.networks else []
        self.there[name] = process = subprocess.Popen(
            [*inside, sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if arguments[0] == "tests.relay" else subprocess.DEVNULL,
            stderr=(self.folder / f"{name}.log").open("a"),
            text=True,
            cwd=ROOT,
            env=os.environ
            | {
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                FOLDER: str(self.learned),
                MARK: self.mark,
            },
        )
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def reports(self) -> list[dict[str, Any]]:
        path = self.logdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def active(self, since: int = 0) -> set[str]:
        """Hosts that acted, by any of the reports from the ``since``-th on."""
        hosts = [report["hosts"].items() for report in self.reports()[since:]]
        return {name for items in hosts for name, host in items if host["frames_per_s"] > 0}

    def silence_s(self, name: str) -> int:
        """Wait until the learner misses a host; for how long it had not been heard then."""
        found = rf"actor host {name} is lost: silent for (\d+) s"
        until(lambda: re.search(found, self.log("learner")))
        return int(re.findall(found, self.log("learner"))[-1])

    def await_hosts(self, *names: str) -> None:
        """Until these have acted, from now on."""
        since = len(self.reports())
        until(lambda: self._alive() and set(names) <= self.active(since))

    def _alive(self) -> bool:
        for name, process in self.there.items():
            assert process.poll() is None, f"{name} has ended: {self.log(name)[-2000:]}"
        return True

    def kill(self, name: str) -> None:
        process = self.there.pop(name)
        process.kill()
        process.communicate()

    def interrupt(self, *names: str) -> None:
        """Ctrl-C, and wait for an end in good order."""
        for name in names:
            self.there[name].send_signal(signal.SIGINT)
        for name in names:
            process = self.there.pop(name)
            process.communicate(timeout=WATCHDOG_S)
            assert process.returncode == 0, self.log(name)[-2000:]

    def left_over(self) -> list[int]:
        """Processes of this site that still run."""
        mark = f"{MARK}={self.mark}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    found.append(int(path.parent.name))
        return found

    def clean_up(self) -> None:
        for process in self.there.values():
            process.kill()
            process.communicate()
        for pid in self.left_over():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for name in self.networks:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip(f"netns del {self._prefix}{name}")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Cleaned up at the end."""
    site = Site(tmp_path)
    try:
        yield site
    finally:
        site.clean_up()


def resident_mb(pid: int) -> float:
    """Memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Story:
    """A learner, three hosts with keys, and what becomes of them."""

    def __init__(self, site: Site, weather: list[str]) -> None:
        self.site = site
        self.weather = weather
        site.lay_networks()
        keys = site.folder / "keys"
        (keys / "allowed").mkdir(parents=True)
        make_keys(keys, "learner")
        for name in HOSTS:
            public, _ = make_keys(keys, name)
            shutil.copy(public, keys / "allowed")
        self.keys = keys
        self.port = PORT
        if weather:
            relay = site.start(
                "relay",
                "tests.relay",
                f"--to=127.0.0.1:{PORT}",
                "--host=0.0.0.0",
                *weather,
                network="learner",
            )
            assert relay.stdout is not None
            self.port = int(relay.stdout.readline())

    def start_learner(self) -> None:
        self.site.start(
            "learner",
            "asyncagent",
            "train",
            "--level_name=tests.counting:Counting",
            "--net=tests.counting:build",
            f"--listen=tcp://0.0.0.0:{PORT}",
            "--num_actors=0",
            f"--secret_key={self.keys / 'learner.key_secret'}",
            f"--allowed_keys={self.keys / 'allowed'}",
            f"--logdir={self.site.logdir}",
            f"--unroll_length={COLUMN}",
            "--batch_size=8",
            "--epochs_per_batch=1",
            "--precision=float32",
            "--total_environment_frames=100000000",
            "--report_interval_s=1",
            "--checkpoint_interval_s=5",
            network="learner",
        )

    def start_host(self, name: str) -> None:
        number = [*HOSTS].index(name) + 1
        self.site.start(
            name,
            "asyncagent",
            "actors",
            f"--connect=tcp://10.77.{number}.1:{self.port}",
            f"--name={name}",
            "--num_actors=8",
            "--num_groups=2",
            f"--inference={HOSTS[name]}",
            f"--secret_key={self.keys / name}.key_secret",
            f"--learner_key={self.keys / 'learner.key'}",
            network=name,
        )


BAD_WEATHER = [
    "--delay_s=0.05",
    "--bytes_per_s=2e6",
    "--stalls=0.01",
    "--stall_s=0.2",
    "--reset_s=5",
]


@pytest.mark.parametrize("weather", [[], BAD_WEATHER], ids=["clear", "bad_weather"])
def test_hosts_and_learner_come_and_go(site: Site, weather: list[str]) -> None:
    """Cut off, killed, resumed: no step is learned from twice, and all of them add up."""
    story = Story(site, weather)
    story.start_learner()
    for name in HOSTS:
        story.start_host(name)
    site.await_hosts(*HOSTS)

    # One host is cut off for 30 s; the others go on.
    cut_s = time.monotonic()
    site.set_cable("one", "down")
    assert site.silence_s("one") <= 10
    site.await_hosts("two", "three")
    until(lambda: time.monotonic() - cut_s >= 30)
    site.set_cable("one", "up")
    site.await_hosts(*HOSTS)

    # Another is killed and started anew.
    site.kill("two")
    assert site.silence_s("two") <= 10
    story.start_host("two")
    site.await_hosts(*HOSTS)

    # The learner is killed, in the middle of something, and resumed from its checkpoint.
    seen = checkpoint_paths(site.logdir)
    until(lambda: checkpoint_paths(site.logdir) not in (seen, []))
    first = site.there["learner"].pid
    site.kill("learner")
    found = load_checkpoint(site.logdir)
    assert found is not None
    resumed_from = found[1]["frames"]
    story.start_learner()
    site.await_hosts(*HOSTS)
    memory_mb = []
    began_s = time.monotonic()
    while (spent_s := time.monotonic() - began_s) < 40:
        memory_mb.append((spent_s, resident_mb(site.there["learner"].pid)))
        time.sleep(1)
    second = site.there["learner"].pid
    site.await_hosts(*HOSTS)
    site.interrupt("learner", *HOSTS)

    columns = [*learned(site.learned / str(first)), *learned(site.learned / str(second))]
    twice = {key: n for key, n in Counter(columns).items() if n > 1}
    assert not twice
    by_number: dict[int, list[int]] = {}
    for column in columns:
        assert column.steps == COLUMN
        by_number.setdefault(column.number, []).append(column.first_step)
    assert all(step % COLUMN == 0 for steps in by_number.values() for step in steps)
    # Within what one learner took from a group nothing is missing, up to what it was killed with.
    resumed = [*learned(site.learned / str(second))]
    starts: dict[int, list[int]] = {}
    for column in resumed:
        starts.setdefault(column.number, []).append(column.first_step)
    assert all(
        sorted(steps) == [COLUMN * n for n in range(len(steps))] for steps in starts.values()
    )
    assert len(starts) >= 24
    frames = site.reports()[-1]["frames"]
    assert frames == resumed_from + REPEATS * COLUMN * len(resumed)

    half = [mb for spent_s, mb in memory_mb if spent_s >= 20]
    grown_mb = sum(half[-5:]) / 5 - sum(half[:5]) / 5
    print(f"frames {frames}, columns {len(columns)}, memory grew by {grown_mb:.1f} MB")
    assert grown_mb < 8
    if weather:
        site.kill("relay")
    until(lambda: not site.left_over(), 30)


def test_catch_is_learnt_from_hosts_alone(site: Site) -> None:
    """By hosts of both kinds as by local actors; actions are learned from under 20 updates late."""
    frames = 250_000
    port = PORT + 1
    learner = site.start(
        "learner",
        "asyncagent",
        "train",
        "--level_name=catch",
        f"--listen=tcp://127.0.0.1:{port}",
        "--num_actors=0",
        "--seed=1",
        f"--logdir={site.logdir}",
        f"--total_environment_frames={frames}",
        "--report_interval_s=1",
    )
    for name, inference in HOSTS.items():
        site.start(
            name,
            "asyncagent",
            "actors",
            f"--connect=tcp://127.0.0.1:{port}",
            f"--name={name}",
            f"--inference={inference}",
            "--num_actors=16",
        )
    site.await_hosts(*HOSTS)
    assert learner.wait(2 * WATCHDOG_S) == 0
    del site.there["learner"]
    reports = site.reports()
    lags = [report["policy_lag_max"] for report in reports if report["policy_lag_max"] is not None]
    print(f"largest lag {max(lags)}, mean of the last {reports[-1]['policy_lag_mean']}")
    assert max(lags) < 20
    assert evaluate(site.logdir, 500).mean >= 0.9
    site.interrupt(*HOSTS)
    until(lambda: not site.left_over(), 30)
