#!/usr/bin/env python3
"""Hundreds of actor hosts at one learner, coming and going: is it fair, bounded, and attentive?

The hosts are light (see ``light_hosts``), their sockets, handshakes, pings, weights and credits are
real, and so is the learner's RemoteBridge, whose queue takes fewer unrolls than the hosts would
send.  Reported, and the exit status is 1 unless all of it holds:

- fair: of the hosts that were there for long enough, none had fewer unrolls accepted than half of
  what it would have had, if at every moment of its presence all had had the same (so that a
  machine with other work, which makes all slower for a while, makes nobody look unfair);
- memory: the learner's at the end is what it was once all hosts had joined, or a quarter more;
- heartbeats: no host was lost that had not left, none was left without an answer;
- membership: every join, every Bye and, within 10 s, every host that vanished was noticed.

    python scripts/simulate_hosts.py [--hosts=500] [--minutes=5] [--join_leave_per_s=5] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from light_hosts import Flags
from remote_traffic import make_key_folder, running

WATCHDOG_S = 60.0
NOTICED_S = 10.0
"""Longest until the learner says that a host has vanished."""
SETTLE_S = NOTICED_S + 1
"""Waited in the end, for what vanished last."""
GROWTH, SLACK_MB = 1.25, 16.0
"""Memory may grow by so much; the second for simulations of few hosts."""
LEAST_PRESENCE_S = 20.0
"""Hosts that were there for a shorter time say little about fairness."""


class Process:
    """One process of ``light_hosts`` and what it tells, as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.told: list[dict[str, Any]] = []
        self._process = process
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def listen(self, seconds: float, until: str = "") -> None:
        """For so long, or until it tells of ``until``, or has ended."""
        due_s = time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while (line := self._lines.get(timeout=max(0.0, due_s - time.monotonic()))) is not None:
                self.told.append(line)
                if until in line:
                    return

    def end(self) -> None:
        """Ask it to, and hear what it has to say."""
        assert self._process.stdin is not None
        self._process.stdin.write("end\n")
        self._process.stdin.flush()
        self.listen(WATCHDOG_S)
        if self._process.wait(WATCHDOG_S):
            raise SystemExit(f"a process of the simulation ended with {self._process.returncode}")

    def of(self, key: str) -> list[dict[str, Any]]:
        """All that was told with such a key."""
        return [line for line in self.told if key in line]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)


@contextlib.contextmanager
def started(role: str, flags: Flags) -> Iterator[Process]:
    """A process of ``light_hosts``."""
    arguments = [role, json.dumps(flags._asdict())]
    with running("light_hosts", *arguments, stdout=subprocess.PIPE, text=True) as process:
        yield Process(process)


def simulate(
    hosts: int, seconds: float, join_leave_per_s: float, unrolls_per_s: float, processes: int,
    curve: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Run it; the figures, and under ``failed`` what did not hold.

    Args:
      seconds: with all hosts there.
      unrolls_per_s: what the learner takes.
      processes: to spread the hosts over.
    """
    with contextlib.ExitStack() as stack:
        keys = ""
        if curve:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            keys = str(make_key_folder(Path(folder) / "keys"))
        flags = Flags(
            "tcp://127.0.0.1:*", keys, unrolls_per_s, hosts, 0, processes, join_leave_per_s, 100.0
        )
        learner = stack.enter_context(started("learner", flags))
        learner.listen(WATCHDOG_S, until="endpoint")
        if not learner.told:
            raise SystemExit("the learner has not started")
        flags = flags._replace(
            endpoint=learner.told[-1]["endpoint"],
            join_leave_per_s=join_leave_per_s / processes,
            joins_per_s=100 / processes,
        )
        crews = [
            stack.enter_context(
                started(
                    "hosts", flags._replace(first=index, hosts=hosts_of(index, hosts, processes))
                )
            )
            for index in range(processes)
        ]
        while (learner.of("hosts") or [{"hosts": 0}])[-1]["hosts"] < 0.95 * hosts:
            before = len(learner.told)
            learner.listen(WATCHDOG_S, until="hosts")
            if len(learner.told) == before:
                raise SystemExit("the learner says nothing")
        full = len(learner.told)
        learner.listen(seconds)
        for crew in crews:
            crew.end()
        end = len(learner.told)
        learner.listen(SETTLE_S)
        learner.end()
    found = [line for crew in crews for line in crew.told]
    return judge(learner, full, end, found, min(LEAST_PRESENCE_S, seconds / 2))


def hosts_of(index: int, hosts: int, processes: int) -> int:
    """Of process ``index``: shares differ by one at most."""
    return len(range(index, hosts, processes))


def judge(
    learner: Process, full: int, end: int, found: list[dict[str, Any]], least_s: float
) -> dict[str, Any]:
    """Figures of what the learner (from line ``full`` on with all hosts) and the hosts told."""
    left = {line["left"]: line for line in found if "left" in line}
    counts = [line["hosts"] for line in learner.told[full:end] if "hosts" in line]
    seconds = [line for line in learner.told[full:end] if "memory_mb" in line]
    memory = [line["memory_mb"] for line in seconds]
    judged = [host for host in left.values() if host["present_s"] >= least_s]
    equal = equal_shares(learner.of("taken"))
    shares = [
        host["accepted"] / max(equal(host["at_s"]) - equal(host["at_s"] - host["present_s"]), 1e-9)
        for host in judged
    ]
    events = learner.of("event")
    joined = [line["host"] for line in events if line["event"].startswith("joins")]
    said_bye = {line["host"] for line in events if line["event"] == "leaves"}
    lost = {line["host"]: line["at_s"] for line in events if line["event"].startswith("is lost")}
    vanished = {name: line["at_s"] for name, line in left.items() if not line["politely"]}
    wrongly = sorted(name for name, at_s in lost.items() if at_s < vanished.get(name, float("inf")))
    noticed_s = [lost[name] - at_s for name, at_s in vanished.items() if name in lost]
    # A host may vanish before it was welcomed.
    missing = sorted((vanished.keys() & set(joined)) - lost.keys())
    polite = {name for name, line in left.items() if line["politely"]} & set(joined)
    last = learner.of("memory_mb")[-1]
    result: dict[str, Any] = {
        "hosts_present": [min(counts), max(counts)],
        "seconds": len(seconds),
        "joins": len(joined),
        "left_with_bye": len(said_bye),
        "vanished": len(vanished),
        "accepted": sum(line["accepted"] for line in left.values()),
        "hosts_judged": len(judged),
        "of_equal_share_least": round(min(shares), 3),
        "who_had_least": judged[shares.index(min(shares))],
        "of_equal_share_median": round(statistics.median(shares), 3),
        "of_equal_share_most": round(max(shares), 3),
        "memory_mb_start": round(memory[0], 1),
        "memory_mb_end": round(memory[-1], 1),
        "memory_mb_max": round(max(memory), 1),
        "learner_cores": round(
            (seconds[-1]["cpu_s"] - seconds[0]["cpu_s"]) / max(1, len(seconds) - 1), 2
        ),
        "worst_round_trip_ms_median": round(
            statistics.median(line["round_trip_ms"] for line in left.values()), 1
        ),
        "worst_round_trip_ms_max": round(max(line["round_trip_ms"] for line in left.values()), 1),
        "noticed_s_max": round(max(noticed_s, default=0.0), 1),
        "lost_wrongly": wrongly,
        "silences": sum(line["silences"] for line in left.values()),
        "unknown": sum(line["unknown"] for line in left.values()),
        "rejected": last["rejected"],
        "refused": last["refused"],
        "warnings": sorted({line["warning"] for line in (*learner.told, *found)
                            if "warning" in line})[:10],
    }  # fmt: skip
    bounded = memory[-1] <= GROWTH * memory[0] + SLACK_MB
    held = {
        "fair": min(shares) >= 0.5,
        "memory": bounded and max(memory) <= 2 * memory[0] + SLACK_MB,
        "heartbeats": not (wrongly or result["silences"] or result["unknown"]),
        "membership": set(joined) >= {name for name, h in left.items() if h["present_s"] > 0}
        and said_bye == polite
        and not missing
        and result["noticed_s_max"] <= NOTICED_S
        and not learner.of("left_over")[-1]["left_over"],
        "nothing rejected": not (result["rejected"] or result["refused"] or result["warnings"]),
    }
    return result | {"failed": [name for name, holds in held.items() if not holds]}


def equal_shares(moments: list[dict[str, Any]]) -> Callable[[float], float]:
    """f(time): unrolls that a host there from the beginning would have had accepted by then, if
    at every moment all the hosts present had had the same."""
    times, sums = [moments[0]["at_s"]], [0.0]
    for before, after in pairwise(moments):
        times.append(after["at_s"])
        sums.append(sums[-1] + (after["taken"] - before["taken"]) / max(1, after["hosts"]))
    return lambda at_s: float(np.interp(at_s, times, sums))


def main() -> int:
    """Simulate and print; 1 if something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--join_leave_per_s", type=float, default=5.0, help="so many of each")
    parser.add_argument("--unrolls_per_s", type=float, default=500.0, help="the learner takes")
    parser.add_argument("--processes", type=int, default=4, help="that the hosts share")
    parser.add_argument("--curve", action="store_true", help="with keys")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = vars(parser.parse_args())
    as_json = given.pop("json")
    figures = simulate(seconds=60 * given.pop("minutes"), **given)
    if as_json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:32s} {value}")
    return 1 if figures["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
