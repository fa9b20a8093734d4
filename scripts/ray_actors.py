#!/usr/bin/env python3
"""Actor hosts on the nodes of a Ray cluster, started again when they die.

    python scripts/ray_actors.py --learner=tcp://10.0.0.1:5555 --hosts=-1 --num_actors=64

Every flag that is not listed below goes to `asyncagent actors` as it is: --num_actors, --inference,
--secret_key, --learner_key and so on.  Files that they name must lie at that path on every node,
and asyncagent must be installed there.  A host that ends with status 0 has ended by itself, one
with status 2 has something that you can put right: neither is started again, anything else is.
Ctrl-C ends all hosts, then this program; hosts do not outlive it, whatever ends it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any, NoReturn

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ray_keeper import Answer, Keeper, Node, Place, State

STOP_S = 10.0
"""What a host gets to say goodbye before it is killed."""
SUMMARY_S = 60.0
NODES_S = 2.0
SAME_S = 1.0
"""Signals that follow the first so soon are the same request."""


class Refused(Exception):
    """The command line cannot be done; the message is one line that says what could be."""


# On the nodes.

# The host must die with the Ray process that holds it, and Ray blocks SIGINT in its processes.
GUARD = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("its parent died first")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Runner:
    """A Ray actor that holds one host as a child process.

    ``command``: the host's; without one, `asyncagent actors` of the node's own Python.
    """

    def __init__(self, command: list[str], flags: list[str], name: str) -> None:
        command = command or [sys.executable, "-m", "asyncagent", "actors"]
        # Ray sets it for its own workers, to 1 where no CPU is reserved.
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        environment["PYTHONUNBUFFERED"] = "1"
        # Started on the main thread: the kernel tells of the death of a thread, not of a process.
        self.process = subprocess.Popen(
            [sys.executable, "-c", GUARD, str(os.getpid()), *command, *flags,
             f"--name={name.format(hostname=platform.node())}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True,
        )  # fmt: skip
        self.line = ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def poll(self, wait_s: float) -> tuple[int, int | None, str]:
        """An ``Answer``, after at most ``wait_s``; at once when the host ends."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(wait_s)
        status = self.process.poll()
        if status is not None:
            self._clear()
        return self.process.pid, status, self.line

    def stop(self, grace_s: float) -> None:
        """End the host and all that it started."""
        with suppress(ProcessLookupError):
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(grace_s)
        self._clear()
        self.process.wait()

    def _clear(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.reader.join(1.0)

    def _read(self) -> None:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline(4096):
            print(line.decode(errors="replace"), end="", flush=True)  # into Ray's own log files
            if line.strip():
                self.line = line.decode(errors="replace").strip()[:300]


# On the machine where this was started.


class Cluster:
    """Carries out on Ray what a ``Keeper`` decides."""

    def __init__(self, ray: Any, keeper: Keeper, arguments: argparse.Namespace) -> None:
        self._ray, self._keeper, self._arguments = ray, keeper, arguments
        self._runners: dict[Place, Any] = {}
        self._polls: dict[Any, Place] = {}
        self._nodes_s = float("-inf")

    def nodes(self) -> list[Node]:
        """The living nodes."""
        return [
            Node(node["NodeID"], node["NodeManagerHostname"])
            for node in self._ray.nodes()
            if node["Alive"]
        ]

    def turn(self, wait_s: float) -> None:
        """Look at nodes and hosts, start those that are due; takes about ``wait_s``."""
        keeper = self._keeper
        if keeper.clock() - self._nodes_s >= NODES_S:
            self._nodes_s = keeper.clock()
            keeper.nodes_are(self.nodes())
        for place in [p for p in self._runners if p not in keeper.places or p.node is None]:
            self._drop(place)
        for place in keeper.due():
            self._start(place)
        if not self._polls:
            time.sleep(wait_s)
        else:
            refs = list(self._polls)
            for ref in self._ray.wait(refs, num_returns=len(refs), timeout=wait_s)[0]:
                self._take(ref)
        keeper.watch()

    def stop(self) -> None:
        """End the hosts that run, then the Ray processes that held them."""
        running = [p for p in self._runners if p.state is State.RUNNING]
        refs = [self._runners[place].stop.remote(STOP_S) for place in running]
        try:
            if refs:
                self._ray.wait(refs, num_returns=len(refs), timeout=STOP_S + 5)
        finally:
            for place in list(self._runners):
                self._drop(place)

    def _start(self, place: Place) -> None:
        self._drop(place)
        assert place.node is not None
        arguments = self._arguments
        affinity = importlib.import_module("ray.util.scheduling_strategies")
        runner = self._ray.remote(Runner).options(
            num_cpus=arguments.num_cpus,
            num_gpus=arguments.num_gpus,
            scheduling_strategy=affinity.NodeAffinitySchedulingStrategy(place.node.id, soft=False),
        )
        name = f"{arguments.name}-{{hostname}}-{place.number}"
        self._runners[place] = runner.remote(arguments.command, arguments.flags, name)
        self._ask(place, 0.2)

    def _ask(self, place: Place, wait_s: float) -> None:
        self._polls[self._runners[place].poll.remote(wait_s)] = place

    def _take(self, ref: Any) -> None:
        place = self._polls.pop(ref)
        try:
            answer = Answer(*self._ray.get(ref))
        except self._ray.exceptions.RayError as error:
            self._keeper.lost(place, f"Ray: {_first_line(error)}")
            self._drop(place)
            return
        self._keeper.answered(place, answer)
        if answer.status is None:
            self._ask(place, 1.0)
        else:
            self._drop(place)

    def _drop(self, place: Place) -> None:
        runner = self._runners.pop(place, None)
        self._polls = {ref: of for ref, of in self._polls.items() if of is not place}
        if runner is not None:
            self._ray.kill(runner)


class Screen:
    """A live table where stdout is a terminal, a line per change elsewhere."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self._live: Live | None = None
        self._said_s = time.monotonic()

    def say(self, line: str) -> None:
        """Print a line, above the table where there is one."""
        self._said_s = time.monotonic()
        self._console.print(Text(f"{time.strftime('%H:%M:%S')} {line}"))

    def show(self, keeper: Keeper) -> None:
        """Show the hosts of ``keeper`` from now on."""
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=lambda: table(keeper), console=self._console, refresh_per_second=2
            )
            self._live.start()

    def remind(self, keeper: Keeper) -> None:
        """Where there is no table, say now and then that all is well."""
        if self._live is None and time.monotonic() - self._said_s >= SUMMARY_S:
            self.say(keeper.summary())

    def close(self) -> None:
        """Leave the table as it stands."""
        if self._live is not None:
            self._live.stop()


def table(keeper: Keeper) -> Group:
    """The hosts, those that need a look first."""
    rows = Table("host", "node", "state", "for", "starts", "last line", box=None)
    for column in rows.columns:
        column.no_wrap = True
    for place in sorted(keeper.places, key=lambda p: p.state is State.RUNNING):
        node = place.node.hostname if place.node else "-"
        for_s = f"{keeper.clock() - place.since_s:.0f} s"
        row = (place.number, node, place.state.value, for_s, place.starts, place.line)
        rows.add_row(*(Text(str(cell)) for cell in row))
    return Group(rows, Text(keeper.summary()))


class Signals:
    """The first SIGINT, SIGTERM or SIGHUP asks to stop, a later one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked_s: float | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1)
                signal.signal(number, self._handle)

    def _handle(self, *_: Any) -> None:
        now = time.monotonic()
        if self.asked_s is None:
            self.asked_s = now
        elif now - self.asked_s > SAME_S:
            raise KeyboardInterrupt


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused(message)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; ``flags`` are those of `asyncagent actors`.  Raises Refused."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--learner", required=True, help="tcp://host:port, as every node reaches it")
    add("--hosts", type=int, default=-1, help="at most one per node; -1: one on every node")
    add("--address", default="auto", help="Ray's, host:port; auto: the cluster of this machine")
    add("--local", action="store_true", help="start Ray here, all hosts on this machine")
    add("--name", default="ray", help="hosts are called <name>-<hostname>-<number>")
    add("--num_cpus", type=float, default=0, help="CPUs that a host reserves in Ray")
    add("--num_gpus", type=float, default=0, help="GPUs; with 0 Ray shows none to the host")
    add("--command", type=shlex.split, default=[],
        help="what starts a host on a node, if not the Python of Ray: '/venv/bin/asyncagent actors'"
    )  # fmt: skip
    arguments, rest = parser.parse_known_args(argv)
    if arguments.hosts < -1 or arguments.hosts == 0:
        raise Refused(f"hosts={arguments.hosts} must be at least 1, or -1 for one on every node")
    scheme, _, end = arguments.learner.partition("://")
    if scheme != "tcp" or not end.rpartition(":")[0] or not end.rpartition(":")[2].isdigit():
        raise Refused(f"learner={arguments.learner!r} must be like tcp://10.0.0.1:5555")
    if rest and not rest[0].startswith("--"):
        raise Refused(f"unexpected argument {rest[0]!r}: flags are written --name=value")
    if any(flag.startswith("--connect") for flag in rest):
        raise Refused("--connect is what --learner says already")
    arguments.flags = [f"--connect={arguments.learner}", *rest]
    return arguments


def connect(arguments: argparse.Namespace) -> Any:
    """The module ``ray``, connected.  Raises Refused where it is missing or does not answer."""
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise Refused(
            "ray is not installed here; in asyncagent's folder: pip install -e '.[ray]'"
        ) from None
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    if arguments.local:
        os.environ.pop("RAY_ADDRESS", None)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local", include_dashboard=False, object_store_memory=100 * 2**20, **quiet
        )  # fmt: skip
        return ray
    address = os.environ.get("RAY_ADDRESS") or arguments.address  # Ray's own order
    if "://" in address:
        raise Refused(f"address={address!r} must be host:port: start this on a cluster's node")
    if address != "auto":
        _check_reachable(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise Refused(f"no Ray cluster at --address={address}: {_first_line(error)}") from None
    return ray


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_reachable(address: str) -> None:
    """Refuse in seconds what Ray would try for more than a minute."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise Refused(f"no Ray cluster at --address={address}: {error}") from None


def refuse_loopback(arguments: argparse.Namespace, nodes: list[Node]) -> None:
    """Hosts on several machines cannot reach a learner by an address of each one's own."""
    loopback = arguments.learner.startswith(("tcp://127.", "tcp://localhost:", "tcp://[::1]:"))
    if loopback and len(nodes) > 1:
        raise Refused(
            f"learner={arguments.learner} means another machine on each of the {len(nodes)} nodes: "
            "give the address by which they all reach it"
        )


def run(arguments: argparse.Namespace) -> int:
    """Keep hosts running until asked to stop, or all have ended; the exit status."""
    screen = Screen()
    screen.say(f"connecting to Ray ({'local' if arguments.local else arguments.address})")
    ray = connect(arguments)
    signals = Signals()  # Ray has set its own
    max_per_node = max(arguments.hosts, 1) if arguments.local else 1
    keeper = Keeper(arguments.hosts, time.monotonic, screen.say, max_per_node)
    cluster = Cluster(ray, keeper, arguments)
    try:
        refuse_loopback(arguments, cluster.nodes())
        screen.show(keeper)
        try:
            while signals.asked_s is None and not keeper.finished:
                cluster.turn(0.5)
                screen.remind(keeper)
            screen.say("ending the hosts" if signals.asked_s else "every host has ended")
        finally:
            cluster.stop()
    except KeyboardInterrupt:
        screen.say("asked again: killed what was left")
        return 130
    except ray.exceptions.RayError as error:
        print(f"ray_actors: lost the Ray cluster: {_first_line(error)}", file=sys.stderr)
        return 1
    finally:
        screen.close()
        ray.shutdown()
    return 2 if any(place.state is State.REFUSED for place in keeper.places) else 0


def main(argv: list[str]) -> int:
    """Run the command line; returns its exit status: 0, 2 for what the user can put right."""
    try:
        return run(parse(argv))
    except Refused as error:
        print(f"ray_actors: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
