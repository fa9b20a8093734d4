"""The fault and soak trials: what they plan, and that what is wrong does not go unseen."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import chaos
import soak
from endurance import counted_env, leaks, report
from endurance.accounts import (
    Column,
    Line,
    Session,
    Tail,
    compare,
    learned_twice,
    read_line,
)
from endurance.counted_net import columns_of, learned
from endurance.faults import INJECT, damage
from endurance.leaks import Sample, Watch, files_in, growth, left_behind
from endurance.plan import HOLDS_S, KINDS, Fault, plan
from endurance.processes import MARK, Held, Seen, held, look, strays, workers_of
from endurance.recovery import Recovery, judge
from endurance.report import Outcome

RUNS = {"a": {"workers"}, "b": {"hosts"}, "c": {"workers", "hosts"}}


def first(count: int, seed: int = 1) -> list[Fault]:
    return list(itertools.islice(plan(seed, RUNS), count))


# What is planned.


def test_plan_is_the_seeds() -> None:
    """The same seed gives the same faults, another one others."""
    assert first(100) == first(100)
    assert [one.kind for one in first(100)] != [one.kind for one in first(100, seed=2)]


@pytest.mark.parametrize("seed", range(5))
def test_every_kind_comes_often_enough(seed: int) -> None:
    """No kind is ever more than one ahead of another; sixty faults have each three times."""
    for count in (1, 17, 60, 200):
        tried = Counter({kind: 0 for kind in KINDS})
        tried.update(fault.kind for fault in first(count, seed))
        assert max(tried.values()) - min(tried.values()) <= 1
    assert min(Counter(fault.kind for fault in first(60, seed)).values()) >= 3
    assert len(KINDS) >= 10


def test_faults_fit_their_runs() -> None:
    """A fault strikes a run that has what it takes away, and each such run in its turn."""
    struck: dict[str, set[str]] = {}
    for fault in first(2000):
        struck.setdefault(fault.kind, set()).add(fault.run)
    for kind, names in struck.items():
        needs = KINDS[kind].needs
        assert names == {name for name, has in RUNS.items() if not needs or needs in has}


def test_a_kind_that_fits_no_run_is_left_out() -> None:
    """The others come all the same."""
    kinds = {one.kind for one in itertools.islice(plan(1, {"a": set()}), 50)}
    assert kinds == {name for name, kind in KINDS.items() if not kind.needs}


def test_every_kind_has_its_doing() -> None:
    """What is planned can be done, and what can be done is planned."""
    assert INJECT.keys() == KINDS.keys()
    assert HOLDS_S.keys() <= KINDS.keys()


@pytest.mark.parametrize("seed", range(50))
def test_damage_is_damage(seed: int) -> None:
    """A damaged file is never what it was, zeros and single bytes included."""
    for whole in (bytes(10_000), b"x", random.Random(seed).randbytes(5000)):
        assert damage(whole, random.Random(seed)) != whole


# Accounts.


def report_line(frames: int, updates: int, **hosts: float) -> str:
    values = {name.replace("_", "#"): {"frames_per_s": rate} for name, rate in hosts.items()}
    figures = {"frames": frames, "updates": updates, "episode_return_mean": None, "hosts": values}
    return json.dumps(figures)


def test_lines_are_read() -> None:
    """Hosts that act are told by their names, also while a lost one still stands beside them."""
    line = read_line(report_line(80, 2, one=0.0, one_2=5.0, two=0.0))
    assert line == Line(80, 2, frozenset({"one"}), None)


@pytest.mark.parametrize("text", ["", "\0\0", '{"frames": 8', "[]", '{"frames": 8}', "null"])
def test_torn_lines_are_passed_over(text: str) -> None:
    """Nothing that a crash leaves of a line is taken for one."""
    assert read_line(text) is None


def test_tail_follows_a_file_that_is_replaced(tmp_path: Path) -> None:
    """Whole lines come once, those of the file's successor from its beginning."""
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text("1\n2\n3")
    assert tail.read() == ["1", "2"]
    with path.open("a") as file:
        file.write("3\n")
    assert tail.read() == ["33"]
    assert tail.read() == []
    (tmp_path / "other").write_text("1\n2\n33\n4\n")
    (tmp_path / "other").replace(path)
    assert tail.read() == ["1", "2", "33", "4"]
    path.write_text("torn")
    tail.skip()
    assert tail.read() == []


def session(resumed: int, *lines: tuple[int, int]) -> tuple[Session, list[str]]:
    """Of updates of at most 80 frames; with what is wrong."""
    made = Session(resumed, 80)
    wrong = [made.add(Line(*figures, frozenset(), None)) for figures in lines]
    return made, [words for words in wrong if words]


def test_good_reports_are_good() -> None:
    """Frames that grow by no more than the updates allow."""
    made, wrong = session(160, (160, 2), (240, 3), (240, 3), (400, 5))
    assert wrong == []
    assert made.frames == 400


@pytest.mark.parametrize(
    "lines",
    [
        [(100, 2)],
        *([(240, 3), later] for later in ((160, 4), (321, 4), (241, 3), (250, 2))),
    ],
)  # fmt: skip
def test_impossible_reports_are_seen(lines: list[tuple[int, int]]) -> None:
    """Frames below the checkpoint's, frames or updates that fall, frames from nowhere."""
    assert session(160, *lines)[1]


def test_frames_are_what_was_learned_from() -> None:
    """Compared report by report, whatever number of updates the session began with."""
    made, _ = session(160, (160 + 70, 13), (160 + 210, 15))
    assert compare(made, [70, 60, 80, 80]) == ""
    assert compare(session(160)[0], []) == ""


@pytest.mark.parametrize(
    "steps", [[70, 60, 79], [70, 60, 81], [70, 60], [71, 60, 79], [70, 59, 1, 80], []]
)
def test_a_frame_too_many_or_too_few_is_seen(steps: list[int]) -> None:
    """Steps that the reports have and the net has not, and the other way round."""
    made, _ = session(160, (160 + 70, 13), (160 + 210, 15))
    assert "frames" in compare(made, steps)


def test_steps_learned_twice_are_seen() -> None:
    """In the same column again, or where two of one environment overlap; others are others."""
    good = [Column(7, 1, 20), Column(7, 21, 20), Column(8, 1, 20), Column(7, 50, 1)]
    assert learned_twice(good) == []
    assert len(learned_twice([*good, Column(8, 1, 20)])) == 1
    assert learned_twice([*good, Column(7, 40, 2)]) == [
        "environment 7: step 40 was learned from twice"
    ]


def test_columns_tell_which_steps_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from an episode's last row to the next one's first, nor to or from a lost row."""
    monkeypatch.setattr(counted_env, "STEP_S", 0.0)
    monkeypatch.setattr(counted_env, "EPISODE", 4)
    env, other = counted_env.Counted(), counted_env.Counted()
    rows = [env.reset()[0]]
    for _ in range(6):
        row, _, _, truncated, _ = env.step(np.int64(0))
        rows.append(row)
        if truncated:
            rows.append(env.reset()[0])
    rows += [np.zeros(3, np.float32), other.reset()[0], other.step(np.int64(0))[0]]
    columns = list(columns_of(np.array(rows).astype(np.int64)))
    assert [column[1:] for column in columns] == [(1, 4), (5, 2), (1, 1)]
    assert columns[0].number == columns[1].number != columns[2].number
    assert list(columns_of(np.array([[0, 7, 4], [0, 8, 5]]))) == []


def test_a_torn_record_is_read(tmp_path: Path) -> None:
    """A line that the end of the process cut off is not there; an empty column is."""
    path = tmp_path / "1"
    path.write_text("7:1:20 9:1:2\n\n7:21:2")
    assert learned(path) == [[Column(7, 1, 20), Column(9, 1, 2)], []]
    assert learned(tmp_path / "2") == []


# Leaks.


def seen(pid: int, parent: int, state: str = "S", command: str = "x") -> Seen:
    return Seen(pid, parent, state, 10 * pid, command)


def test_strays_are_those_of_nobody() -> None:
    """Descendants of a program belong to it; what lost its parent, or is dead, to nobody."""
    worker = seen(12, 10, command="python -m asyncagent.envs.worker env-0 1 2 3 4")
    there = [seen(10, 1), worker, seen(13, 12), seen(20, 1), seen(14, 10, "Z")]
    by_pid = {one.pid: one for one in there}
    assert [one.pid for one in strays(by_pid, [10])] == [20, 14]
    assert workers_of(10, by_pid) == [worker]


def test_processes_carry_their_mark() -> None:
    """Those of one trial are seen, with what they hold; others are not."""
    sleeper = [sys.executable, "-c", "input()"]
    environment = {MARK: "this-one"}
    with subprocess.Popen(sleeper, stdin=subprocess.PIPE, env=environment) as process:
        # The mark is there once the child is no longer a copy of us.
        while process.pid not in look("this-one"):
            assert process.poll() is None
        assert look("this-one")[process.pid].parent == os.getpid()
        assert look("this") == {}
        found = held(process.pid)
        assert found is not None and found.descriptors >= 3 and found.memory_mb > 1
        process.communicate(b"\n")
    assert held(process.pid) is None


def test_strays_may_take_their_time() -> None:
    """A process is told of once it has been nobody's for long, and only once; not its namesake."""
    watch = Watch()
    stray = seen(20, 1)
    assert watch.stray(0.0, [stray]) == []
    assert watch.stray(leaks.STRAY_S - 1, [stray]) == []
    assert watch.stray(leaks.STRAY_S, [stray]) == [stray]
    assert watch.stray(leaks.STRAY_S + 1, [stray]) == []
    namesake = stray._replace(started=7)
    assert watch.stray(leaks.STRAY_S + 2, [namesake]) == []


def samples(descriptors: float, mb: float) -> list[Sample]:
    """Five minutes of a program that grows by so much in a minute."""
    minutes = np.arange(0, 5, 0.25)
    return [Sample(60 * m, Held(int(20 + descriptors * m), 300 + mb * m)) for m in minutes]


@pytest.mark.parametrize(
    ("descriptors", "mb", "leaks"), [(0, 0, False), (1, 10, False), (5, 0, True), (0, 50, True)]
)
def test_growth_is_seen(descriptors: float, mb: float, leaks: bool) -> None:
    """Descriptors or memory that grow and grow; not what a program needs at first."""
    young = [Sample(at_s, Held(3, 20.0)) for at_s in (-40.0, -35.0, -30.0, -25.0)]
    grown = growth("learner", [*young, *samples(descriptors, mb)])
    assert grown is not None
    assert grown.leaks == leaks


def test_short_lives_say_nothing() -> None:
    """A program that was soon killed has no growth."""
    assert growth("learner", samples(5, 0)[:4]) is None


def test_what_is_left_behind_is_named() -> None:
    """New files; not those that were there."""
    before, after = {"tmp": {"a"}, "shm": {"b"}}, {"tmp": {"a", "c"}, "shm": set[str]()}
    assert left_behind(before, after) == ["tmp: c"]


# Reports.


@pytest.mark.parametrize(
    ("kind", "pause_s", "whole_s", "recovery_s", "survived"),
    [
        ("kill_worker", 1.0, 14.0, 14.0, True),
        ("kill_worker", 16.0, 2.0, 16.0, False),
        ("kill_learner", 16.0, 2.0, 16.0, True),
        ("kill_learner", 31.0, 2.0, 31.0, False),
        ("cut_host", None, 2.0, None, False),
        ("cut_host", 2.0, None, None, False),
    ],
)
def test_judgement(
    kind: str,
    pause_s: float | None,
    whole_s: float | None,
    recovery_s: float | None,
    survived: bool,
) -> None:
    """Frames must go on and everything must be back, in time."""
    seconds, problem = judge(kind, pause_s, whole_s)
    assert (seconds, problem == "") == (recovery_s, survived)


def test_recovery_of_a_worker_that_is_held() -> None:
    """It is due from the beginning: replaced, or let go, after 7 s; frames stood still for 4."""
    recovery = Recovery(100.0, 500)
    for now_s, progress, whole in [
        (100.2, 500, True),  # not yet stopped
        (100.4, 500, False),
        (104.0, 600, False),
        (106.0, 650, False),
        (107.0, 700, True),
        (108.0, 700, True),
    ]:
        recovery.see(now_s, progress, whole)
        assert not recovery.complete
    recovery.over(110.0, restart=False)
    recovery.see(110.0, 800, True)
    assert not recovery.complete
    recovery.see(112.0, 900, True)
    assert recovery.complete
    assert (recovery.pause_s, recovery.whole_s) == (4.0, 7.0)


def test_recovery_that_does_not_last() -> None:
    """What is gone again was not back."""
    recovery = Recovery(0.0, 0)
    recovery.see(1.0, 10, True)
    recovery.see(2.0, 20, False)
    recovery.over(3.0, restart=False)
    recovery.see(3.0, 30, False)
    assert not recovery.complete
    recovery.see(9.0, 30, True)
    assert (recovery.pause_s, recovery.whole_s) == (2.0 - 1.0, 9.0)


def test_recovery_of_a_host_begins_when_the_fault_is_over() -> None:
    """Nothing can be back before; frames that stood still meanwhile count all the same."""
    recovery = Recovery(0.0, 0)
    recovery.see(5.0, 0, True)
    recovery.over(12.0, restart=True)
    recovery.see(12.0, 0, False)
    assert not recovery.complete
    recovery.see(14.5, 10, True)
    assert recovery.complete
    assert (recovery.pause_s, recovery.whole_s) == (14.5, 2.5)


OUTCOMES = [
    Outcome(1, "kill_host", "a", 1.0, 4.0, ""),
    Outcome(2, "kill_worker", "a", 9.0, None, "no more frames"),
    Outcome(3, "kill_host", "b", 20.0, 16.0, "after 16.0 s, later than 15"),
    Outcome(4, "kill_host", "b", 50.0, 5.0, ""),
]


def test_table() -> None:
    """A row for each kind that was tried, in Markdown, with a last one for all."""
    lines = report.as_markdown(report.rows(OUTCOMES)).splitlines()
    what = KINDS["kill_host"].what
    assert lines[2].endswith("| 1 | 0 | never | never | 15 s |")
    assert lines[3] == f"| kill_host | {what} | 3 | 2 | 5.0 s | 16.0 s | 15 s |"
    assert lines[4:] == ["| 2 kinds |  | 4 | 2 |  |  |  |"]
    assert len({line.count("|") for line in lines}) == 1


def test_text_stands_in_columns() -> None:
    """As wide as the widest."""
    lines = report.as_text(report.rows(OUTCOMES)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["kill_worker", "1", "0", "never", "never", "15", "s"]


def test_figures_are_json() -> None:
    """All of them, with what others add."""
    figures = json.loads(json.dumps(report.as_json(OUTCOMES, report.rows(OUTCOMES), seed=3)))
    assert figures["seed"] == 3
    assert len(figures["faults"]) == 4
    assert figures["kinds"][1]["survived"] == 2


# Programs.


@pytest.mark.parametrize(
    "flags",
    ["--minutes=0", "--minutes=soon", "--seed=x", "--only=kill_all", "--json=/no/where", "--what"],
)
def test_wrong_flags_of_chaos(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, status 2."""
    with pytest.raises(SystemExit) as ended:
        chaos.parse([flags])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flags", ["--minutes=1", "--minutes=nan", "--out=/no/where", "--preset=x"])
def test_wrong_flags_of_soak(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, status 2."""
    with pytest.raises(SystemExit) as ended:
        soak.parse([flags])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_workers_files_can_be_taken_away() -> None:
    """SIGUSR1 closes the descriptors of a worker, by its command line, and of nothing else."""
    code = (
        "import os, signal\n"
        "descriptor, _ = os.pipe()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "try: os.fstat(descriptor)\n"
        "except OSError: print('gone')\n"
    )
    hook = Path(chaos.__file__).parent / "endurance" / "hook"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", "-c", f"import sitecustomize\n{code}", *words]
        environment = {"PYTHONPATH": str(hook)}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    assert run("asyncagent.envs.worker").stdout == "gone\n"
    assert run("asyncagent").returncode < 0


def soaked(frames_per_s: float = 0.0, mb: float = 0.0, descriptors: float = 0.0) -> soak.Verdict:
    """An hour that changes by so much in all; it begins with a start that is slow and small."""
    made = []
    frames = 0.0
    for at_s in range(0, 3600, 10):
        share = at_s / 3600
        frames += 10 * (10_000 + frames_per_s * share) * (0.1 if at_s < 200 else 1.0)
        held = (400.0 + mb * share, int(30 + descriptors * share))
        made.append(soak.Sample(at_s, int(frames), *held if at_s >= 200 else (100.0, 5)))
    return soak.judge(made)


def test_a_level_soak_passes() -> None:
    """Warm-up is of no account; a little up and down is none."""
    assert soaked().failed == ()
    assert soaked(frames_per_s=-200, mb=10, descriptors=2).failed == ()
    assert soaked().frames_per_s == pytest.approx((10_000, 10_000))


def test_a_soak_that_is_not_level_fails() -> None:
    """Each of speed, memory and descriptors on its own."""
    assert soaked(frames_per_s=-500).failed == ("speed",)
    assert soaked(mb=100).failed == ("memory",)
    assert soaked(descriptors=10).failed == ("descriptors",)
    with pytest.raises(ValueError, match="too few"):
        soak.judge([soak.Sample(0.0, 0, 1.0, 1)])


def test_a_soak_says_what_failed() -> None:
    """A line for each run."""
    text = soak.as_text({"atari": soaked(mb=100), "doom": soaked()})
    assert [line.split()[-1] for line in text.splitlines()] == ["memory", "pass"]


def test_what_is_left_behind_is_told(tmp_path: Path) -> None:
    """But not caches, nor the file with which Python tries a folder."""
    before = files_in({"folder": tmp_path})
    (tmp_path / "abcdef_1").write_bytes(b"blat")
    (tmp_path / "torchinductor_me").mkdir()
    assert left_behind(before, files_in({"folder": tmp_path})) == []
    (tmp_path / "abcdef_2").write_bytes(b"data")
    (tmp_path / "vizdoom-1").mkdir()
    assert left_behind(before, files_in({"folder": tmp_path})) == ["folder: abcdef_2, vizdoom-1"]
