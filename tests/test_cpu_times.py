"""Processor times out of a /proc that the test has written."""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path

import pytest

from asyncagent import cpu_times
from asyncagent.accounting import Accounts
from asyncagent.cpu_times import SCAN_S, CpuClock, IdleClock
from asyncagent.placement import cores
from asyncagent.tracks import Track

TICKS = os.sysconf("SC_CLK_TCK")


class Machine:
    """A /proc folder, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now_s = 0.0
        self.machine(0.0)
        self.process(os.getpid(), 1, 0.0)
        self.thread(0.0)

    def process(self, pid: int, parent: int, used_s: float, ended_s: float = 0.0) -> None:
        """One that has used so much, and its children that have ended so much."""
        self._write(str(pid), f"{pid} (a (strange) name) S {parent}", used_s, ended_s)

    def gone(self, pid: int) -> None:
        (self.folder / str(pid) / "stat").unlink()

    def thread(self, used_s: float) -> None:
        """This thread."""
        tid = threading.get_native_id()
        self._write(f"self/task/{tid}", f"{tid} (python) R 1", used_s, 0.0)

    def machine(
        self, used_s: float, idle_s: float = 0.0, waiting_s: float = 0.0,
        idle_elsewhere_s: float = 0.0,
    ) -> None:  # fmt: skip
        """All cores together have worked so long, each that we may use has idled so long."""

        def line(core: int, used_s: float, idle_s: float, waiting_s: float) -> str:
            used, idle, waiting = (round(s * TICKS) for s in (used_s, idle_s, waiting_s))
            return f"cpu{core} {used} 0 0 {777 + idle} {5 + waiting} 0 0 0 0 0"

        first, *others = ours = sorted(os.sched_getaffinity(0))
        lines = [line(first, used_s, idle_s, waiting_s)]
        lines += [line(index, 0.0, idle_s, waiting_s) for index in others]
        lines += [line(ours[-1] + 1, 0.0, idle_elsewhere_s, 0.0)]
        (self.folder / "stat").write_text("\n".join(["cpu 1 2 3 4 5 6 7 8", *lines, "intr 1 2"]))

    def _write(self, name: str, begin: str, used_s: float, ended_s: float) -> None:
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        times = [round(used_s * TICKS / 2)] * 2 + [round(ended_s * TICKS / 2)] * 2
        fields = [begin, *"123456789", *map(str, times), "20", "0"]
        (self.folder / name / "stat").write_text(" ".join(fields))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(cpu_times, "cpu_limit", lambda: None)
    return Machine(tmp_path)


def clock_of(machine: Machine) -> CpuClock:
    return CpuClock(machine.folder, lambda: machine.now_s)


def test_a_run_is_all_that_it_has_started(machine: Machine) -> None:
    """Workers and the games that they start count, other programs do not."""
    me = os.getpid()
    machine.process(900001, me, 5.0)
    machine.process(900002, 900001, 7.0)
    machine.process(900003, 1, 9.0)
    clock = clock_of(machine)
    machine.now_s = 10.0
    machine.process(me, 1, 1.0)
    machine.process(900001, me, 7.0)
    machine.process(900002, 900001, 11.0)
    machine.process(900003, 1, 19.0)
    machine.machine(18.0)
    machine.thread(0.5)
    read = clock.read()
    assert read.run == pytest.approx(0.7)
    assert read.taken == pytest.approx(1.1)
    assert read.threads[threading.current_thread().name] == pytest.approx(0.05)
    assert read.num_cores == cores()


def test_a_worker_that_has_ended_is_not_lost(machine: Machine) -> None:
    """What it had used is its parent's once that has waited for it: no jump, up or down."""
    me = os.getpid()
    machine.process(900001, me, 50.0)
    clock = clock_of(machine)
    machine.now_s = 1.0
    machine.gone(900001)
    machine.process(me, 1, 0.5, ended_s=50.2)
    assert clock.read().run == pytest.approx(0.7)


def test_a_new_worker_is_found(machine: Machine) -> None:
    """One that was started meanwhile counts from when it is found, with nothing of its past."""
    me = os.getpid()
    clock = clock_of(machine)
    machine.process(900001, me, 50.0)
    machine.now_s = SCAN_S + 1
    assert clock.read().run == 0.0
    machine.now_s += 2.0
    machine.process(900001, me, 51.0)
    assert clock.read().run == pytest.approx(0.5)


def test_nothing_can_be_read_for_a_while(machine: Machine) -> None:
    """A program that may open no file just now: nothing is known, nothing raised, nothing jumps."""
    me = os.getpid()
    machine.process(me, 1, 70.0)
    machine.thread(30.0)
    clock = clock_of(machine)
    away = machine.folder.with_name("away")
    machine.folder.rename(away)
    for _ in range(2):
        machine.now_s += SCAN_S + 1
        read = clock.read()
        assert read.run == 0.0 and math.isnan(read.taken) and not any(read.threads.values())
    away.rename(machine.folder)
    machine.process(me, 1, 71.0)
    machine.thread(30.5)
    machine.now_s += 1.0
    read = clock.read()
    assert read.run == pytest.approx(1.0)
    assert sum(read.threads.values()) == pytest.approx(0.5)


def test_names_that_are_no_text(machine: Machine) -> None:
    """The kernel cuts names at 15 bytes, in the middle of a letter: others' names are no reason to
    fail."""
    machine.process(900001, os.getpid(), 5.0)
    stat = machine.folder / "900001" / "stat"
    stat.write_bytes(stat.read_bytes().replace(b"strange", "Проводник".encode()[:15]))
    clock = clock_of(machine)
    machine.now_s = 1.0
    assert clock.read().run == 0.0
    machine.now_s = 2.0
    machine.process(900001, os.getpid(), 6.0)
    assert clock.read().run == pytest.approx(1.0)


def test_rationed_cores_say_nothing_of_others(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container with a limit, what the machine does beside it is not known to matter."""
    monkeypatch.setattr(cpu_times, "cpu_limit", lambda: 2.0)
    clock = clock_of(machine)
    machine.now_s = 1.0
    machine.machine(5.0)
    assert math.isnan(clock.read().taken)


def test_only_cores_that_we_may_use_idle_for_us(machine: Machine) -> None:
    """Of 10 s this process's cores idle 4 each, a core of other programs all the time."""
    clock = IdleClock(machine.folder, lambda: machine.now_s)
    machine.now_s = 10.0
    machine.machine(0.0, idle_s=3.0, waiting_s=1.0, idle_elsewhere_s=10.0)
    assert clock.share() == pytest.approx(0.4)


def test_how_rationed_cores_idle_is_not_known(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container with a limit of time has cores that idle for others too; nor without a file."""
    clock = IdleClock(machine.folder, lambda: machine.now_s)
    machine.now_s = 10.0
    (machine.folder / "stat").rename(machine.folder / "away")
    assert clock.share() is None
    (machine.folder / "away").rename(machine.folder / "stat")
    assert clock.share() == 0.0
    monkeypatch.setattr(cpu_times, "cpu_limit", lambda: 2.0)
    assert clock.share() is None


def test_the_real_proc_is_read() -> None:
    """This machine's own /proc has what is looked for."""
    clock = CpuClock()
    total = sum(number * number for number in range(2_000_000))
    read = clock.read()
    assert total and read.run > 0
    assert read.threads[threading.current_thread().name] > 0


def test_times_that_cannot_be_read_end_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever goes wrong is told once, and the figures are not known."""

    def broken(clock: CpuClock) -> None:
        raise ValueError("no such field")

    accounts = Accounts(1, Track(3), Track(3))
    assert accounts.read_cpu() is None
    assert accounts.read_cpu() is not None
    monkeypatch.setattr(CpuClock, "read", broken)
    assert accounts.read_cpu() is None and accounts.read_cpu() is None
    (warning,) = caplog.records
    assert "no such field" in caplog.text and "goes on" in warning.getMessage()
