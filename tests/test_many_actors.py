"""The ancestor's distributed run: a learner and single-environment actors, each a process."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).resolve().parent.parent

START = """
import os, sys
sys.path[:0] = [{root!r}, {scripts!r}]
import experiment
experiment.restart_in_venv = lambda argv: None
status = experiment.main()
loaded = {{name.partition(".")[0] for name in sys.modules}}
print(" ".join(["loaded", *loaded]), flush=True)
os._exit(status)
""".format(root=str(ROOT), scripts=str(ROOT / "scripts"))
"""scripts/experiment.py in the Python that runs the tests; at the end it says what it loaded."""

NUM_ACTORS = 150
WAVE = 15
"""Actors that start at once."""


class Run:
    """Processes that are gone when the test is over, whatever became of it."""

    def __init__(self, logdir: Path, watchdog_s: float) -> None:
        self.logdir = logdir
        self.log = logdir.with_name("actors.log")
        self.actors: list[subprocess.Popen[str]] = []
        self._processes: list[subprocess.Popen[str]] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._watchdog = threading.Timer(watchdog_s, self.kill)
        self._watchdog.start()

    def start_learner(self, *flags: str) -> None:
        """What it prints is in ``learner.stdout``."""
        self.learner = self._start(
            subprocess.PIPE, "--job_name=learner", "--task=0", f"--logdir={self.logdir}", *flags
        )

    def start_actor(self, task: int, *flags: str) -> None:
        """What the actors print is in the file ``log``."""
        with self.log.open("a") as log:
            self.actors.append(self._start(log, "--job_name=actor", f"--task={task}", *flags))

    def _start(self, output: int | IO[str], *flags: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", START, f"--port={self._port}", *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.logdir.parent,
        )
        self._processes.append(process)
        return process

    def read_until(self, found: Callable[[str], bool]) -> str:
        """The learner's next line of which ``found`` is true."""
        assert self.learner.stdout is not None
        seen = []
        for line in self.learner.stdout:
            if found(line):
                return line
            seen.append(line)
        raise AssertionError("the learner ended:\n" + "".join(seen[-20:]) + self.log.read_text())

    def interrupt(self, *processes: subprocess.Popen[str]) -> list[int]:
        """Ctrl-C; their exit statuses."""
        for process in processes:
            process.send_signal(signal.SIGINT)
        for process in processes:
            process.communicate()
        return [process.returncode for process in processes]

    def kill(self) -> None:
        """End every process that is still there."""
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """Leave nothing behind."""
        self._watchdog.cancel()
        self.kill()
        for process in self._processes:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    """A distributed run to be."""
    slow = request.node.get_closest_marker("slow") is not None
    run = Run(tmp_path / "run", 1200 if slow else 300)
    try:
        yield run
    finally:
        run.close()


def test_actor_of_a_learner_that_infers_loads_no_torch(run: Run) -> None:
    """With --inference=learner an actor plays a whole run without torch or what parses flags."""
    small = ["--level_name=catch", "--num_action_repeats=1", "--num_actors=1", "--batch_size=2"]
    run.start_learner(*small, "--unroll_length=5", "--total_environment_frames=500")
    run.start_actor(0, "--num_actors=1", "--inference=learner", "--level_name=catch")
    run.read_until(lambda line: line.startswith("done: "))
    assert run.interrupt(run.actors[0]) == [0]
    loaded = set(run.log.read_text().partition("loaded ")[2].split())
    assert {"asyncagent", "zmq", "envpool"} <= loaded
    assert not loaded & {"torch", "tyro", "rich", "tensorboard", "matplotlib"}


def pss_mb(process: subprocess.Popen[str]) -> float:
    """Resident memory, shared pages divided among those who share them."""
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.M)
    assert found
    return int(found[1]) / 1024


@pytest.mark.slow
def test_a_hundred_and_fifty_actors(run: Run) -> None:
    """150 single-environment actors of about 35 MB each join, train for a while, and all end."""
    run.start_learner(f"--num_actors={NUM_ACTORS}", "--level_name=catch", "--num_action_repeats=1")
    run.read_until(lambda line: "actor hosts may connect" in line)
    for first in range(0, NUM_ACTORS, WAVE):
        for task in range(first, first + WAVE):
            run.start_actor(task, f"--num_actors={NUM_ACTORS}", "--inference=learner")
        for _ in range(WAVE):
            run.read_until(lambda line: " joins: 1 environments" in line)
    for _ in range(7):  # reports, of five seconds each
        report = run.read_until(lambda line: " frames/s " in line)
    print(report)
    memory = [pss_mb(actor) for actor in run.actors]
    print(f"actors: {sum(memory) / NUM_ACTORS:.1f} MB each (Pss), the largest {max(memory):.1f}")
    assert max(memory) < 40
    assert run.interrupt(*run.actors, run.learner) == [0] * (NUM_ACTORS + 1), run.log.read_text()
    rows = [json.loads(row) for row in (run.logdir / "metrics.jsonl").read_text().splitlines()]
    all_there = [row for row in rows if len(row.get("hosts", {})) == NUM_ACTORS]
    assert len(all_there) >= 3
    assert all_there[-1]["frames"] > all_there[0]["frames"]
    assert all(host["frames_per_s"] > 0 for host in all_there[-1]["hosts"].values())
