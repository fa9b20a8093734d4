"""Actor hosts on a Ray cluster: which start where, which start again, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

import ray_actors
from ray_keeper import SILENT_S, STEADY_S, Answer, Keeper, Node, Place, State, backoff_s

ROOT = Path(__file__).resolve().parent.parent
WATCHDOG_S = 120
A, B, C = (Node(letter * 8, f"node-{letter}") for letter in "abc")
RUNS, KILLED = Answer(7, None, "100 frames/s"), Answer(7, -9, "")


class Bench:
    """A keeper with a clock that tests move and a tape of what it reported."""

    def __init__(self, hosts: int, max_per_node: int = 1) -> None:
        self.now_s = 100.0
        self.tape: list[str] = []
        self.keeper = Keeper(hosts, lambda: self.now_s, self.tape.append, max_per_node)

    def start(self, *nodes: Node) -> list[Place]:
        """The hosts that are due on these nodes, answered for as running."""
        self.keeper.nodes_are(nodes)
        due = self.keeper.due()
        for place in due:
            self.keeper.answered(place, RUNS)
        return due

    def states(self) -> list[State]:
        return [place.state for place in self.keeper.places]


def hosts_of(places: list[Place]) -> dict[int, str]:
    return {place.number: place.node.hostname if place.node else "" for place in places}


def test_backoff_doubles_up_to_a_minute() -> None:
    """Waits grow from a second to a minute and stay there, however long it goes on."""
    waits = [backoff_s(failures) for failures in range(1, 9)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert backoff_s(10**9) == 60


def test_one_host_per_node() -> None:
    """Each node gets one host; a host without a node waits for one, which starts it at once."""
    bench = Bench(hosts=3)
    assert hosts_of(bench.start(A, B)) == {0: "node-a", 1: "node-b"}
    assert bench.states() == [State.RUNNING, State.RUNNING, State.NO_NODE]
    assert bench.start(A, B) == []
    assert hosts_of(bench.start(A, B, C)) == {2: "node-c"}


def test_a_host_on_every_node() -> None:
    """With hosts=-1 nodes that join get a host, and hosts of nodes that left are gone for good."""
    bench = Bench(hosts=-1)
    assert not bench.keeper.finished
    assert hosts_of(bench.start(A, B)) == {0: "node-a", 1: "node-b"}
    assert hosts_of(bench.start(B, C)) == {2: "node-c"}
    assert hosts_of(bench.keeper.places) == {1: "node-b", 2: "node-c"}
    assert "host 0 on node-a: the node is gone" in bench.tape


def test_several_hosts_on_the_only_node() -> None:
    """Where a node may have several hosts, they spread evenly over the nodes there are."""
    bench = Bench(hosts=3, max_per_node=3)
    assert sorted(hosts_of(bench.start(A, B)).values()) == ["node-a", "node-a", "node-b"]


def test_a_killed_host_starts_again_after_its_wait() -> None:
    """A host that was killed is due again on its node after the backoff, and not before."""
    bench = Bench(hosts=1)
    (place,) = bench.start(A)
    bench.keeper.answered(place, KILLED)
    assert place.state is State.BACKOFF
    bench.now_s += 0.9
    assert bench.keeper.due() == []
    bench.now_s += 0.2
    assert bench.keeper.due() == [place]
    assert bench.keeper.due() == []
    assert bench.tape[-2:] == [
        "host 0 on node-a: waits to start again in 1 s (ended with signal 9)",
        "host 0 on node-a: starting (ended with signal 9)",
    ]
    assert place.starts == 2


def test_the_backoff_grows_until_a_host_was_steady() -> None:
    """Failures in quick succession double the wait; a minute's run puts it back to a second."""
    bench = Bench(hosts=1)
    waits = []
    for ran_s in (0, 1, 1, STEADY_S - 1, STEADY_S, 1):
        (place,) = bench.start(A)
        bench.now_s += ran_s
        bench.keeper.answered(place, Answer(7, 1, "Traceback"))
        waits.append(place.retry_s - bench.now_s)
        bench.now_s = place.retry_s
    assert waits == [1, 2, 4, 8, 1, 2]


def test_a_lost_ray_process_counts_as_a_failure() -> None:
    """A host whose Ray process died is started again, with the reason shown."""
    bench = Bench(hosts=1)
    (place,) = bench.start(A)
    bench.keeper.lost(place, "Ray: the worker died")
    assert "Ray: the worker died" in bench.tape[-1]
    bench.now_s += 1
    assert bench.keeper.due() == [place]


def test_a_dead_node_gives_its_host_to_a_free_one() -> None:
    """The host of a dead node starts at once on a free node, else waits until there is one."""
    bench = Bench(hosts=2)
    bench.start(A, B)
    assert hosts_of(bench.start(B, C)) == {0: "node-c"}
    assert bench.start(B) == []
    assert bench.states() == [State.NO_NODE, State.RUNNING]
    assert hosts_of(bench.start(A, B)) == {0: "node-a"}


def test_status_0_and_2_are_not_started_again() -> None:
    """A host that ended by itself, or that the user must put right, rests; all so: finished."""
    bench = Bench(hosts=2)
    first, second = bench.start(A, B)
    bench.keeper.answered(first, Answer(7, 0, "gave up"))
    assert not bench.keeper.finished
    bench.keeper.answered(second, Answer(8, 2, "no key file /k"))
    assert bench.keeper.finished
    bench.now_s += 1000
    assert bench.start(A, B, C) == []
    assert bench.tape[-2:] == [
        "host 0 on node-a: ended by itself (gave up)",
        "host 1 on node-b: refused (no key file /k)",
    ]


def test_a_silent_node_is_told_and_may_come_back() -> None:
    """A host nothing is heard of is reported once; it runs on as soon as its node answers."""
    bench = Bench(hosts=1)
    (place,) = bench.start(A)
    bench.now_s += SILENT_S - 1
    bench.keeper.watch()
    assert place.state is State.RUNNING
    bench.now_s += 1
    bench.keeper.watch()
    told = len(bench.tape)
    bench.now_s += 1000
    bench.keeper.watch()
    assert (place.state, len(bench.tape)) == (State.SILENT, told)
    assert bench.keeper.due() == []
    bench.keeper.answered(place, RUNS)
    assert place.state is State.RUNNING
    assert bench.keeper.summary() == "1 of 1 hosts running"


def test_other_flags_go_to_the_hosts() -> None:
    """Flags that are not the script's own reach `asyncagent actors` unchanged and in order."""
    arguments = ray_actors.parse(
        ["--learner=tcp://10.0.0.1:5555", "--hosts=2", "--num_actors=8", "--secret_key", "/k/h"]
    )
    assert arguments.hosts == 2
    assert arguments.flags == [
        "--connect=tcp://10.0.0.1:5555", "--num_actors=8", "--secret_key", "/k/h"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--learner"),
        (["--learner=10.0.0.1:5555"], "tcp://10.0.0.1:5555"),
        (["--learner=tcp://a:1", "--hosts=0"], "hosts=0 must be"),
        (["--learner=tcp://a:1", "--hosts=x"], "invalid int value: 'x'"),
        (["--learner=tcp://a:1", "--connect=tcp://b:1"], "--learner says already"),
        (["--learner=tcp://a:1", "nonsense"], "'nonsense'"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong flag ends with status 2 and one line that says what is wrong."""
    assert ray_actors.main(flags) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_without_ray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where ray is not installed, one line says how to install it."""
    monkeypatch.setitem(sys.modules, "ray", None)
    assert ray_actors.main(["--learner=tcp://10.0.0.1:5555"]) == 2
    assert "pip install -e '.[ray]'" in capsys.readouterr().err


def test_a_loopback_learner_is_refused_on_several_nodes() -> None:
    """Loopback is another machine on each node: refused, but for a cluster of one node."""
    arguments = ray_actors.parse(["--learner=tcp://127.0.0.1:5555"])
    ray_actors.refuse_loopback(arguments, [A])
    with pytest.raises(ray_actors.Refused, match="of the 2 nodes"):
        ray_actors.refuse_loopback(arguments, [A, B])


# Stands for a host: its worker, like a host's, ends when it reads the end of its parent's pipe.
STUB = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
print("stub", *sys.argv[1:], flush=True)
time.sleep(1000)
"""


def processes_with(marker: str) -> list[int]:
    """Living processes whose environment has ``marker``: all that the test started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue  # ended meanwhile, or not ours to look at
    return found


def alive(pid: int) -> bool:
    """Whether ``pid`` runs; one that is dead and not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WATCHDOG_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.slow
def test_on_a_local_ray(tmp_path: Path) -> None:
    """A killed host and a killed Ray process give a new host; Ctrl-C leaves no process behind."""
    pytest.importorskip("ray")
    (tmp_path / "stub.py").write_text(STUB)
    marker = f"asyncagent-test-{uuid.uuid4().hex}"
    script = subprocess.Popen(
        [
            sys.executable, str(ROOT / "scripts" / "ray_actors.py"), "--local", "--hosts=2",
            "--learner=tcp://127.0.0.1:5555", "--num_actors=4",
            f"--command={sys.executable} {tmp_path / 'stub.py'}",
        ],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"MARKER": marker},
        start_new_session=True,
    )  # fmt: skip
    lines: list[str] = []

    def next_pid(number: int) -> int:
        """Of the next host of this number that is said to be running."""
        assert script.stdout is not None
        for line in script.stdout:
            lines.append(line)
            if f"host {number} " in line and "running (pid" in line:
                return int(line.rpartition("pid ")[2].split(")")[0])
        raise AssertionError("the program ended by itself:\n" + "".join(lines))

    watchdog = threading.Timer(WATCHDOG_S, script.kill)
    watchdog.start()
    try:
        first = next_pid(0)
        os.kill(first, signal.SIGKILL)
        second = next_pid(0)
        assert second != first
        os.kill(int(Path(f"/proc/{second}/stat").read_text().rpartition(")")[2].split()[1]), 9)
        third = next_pid(0)
        assert third not in (first, second)
        assert not alive(second)
        assert any("ended with signal 9" in line for line in lines)
        script.send_signal(signal.SIGINT)
        rest, _ = script.communicate(timeout=WATCHDOG_S)
        assert script.returncode == 0, rest
        assert "ending the hosts" in rest
        wait_until(lambda: not any(alive(pid) for pid in processes_with(marker)))
    finally:
        watchdog.cancel()
        for pid in processes_with(marker):
            os.kill(pid, signal.SIGKILL)
        script.wait()
