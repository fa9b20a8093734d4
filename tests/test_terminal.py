"""The terminal: what the panel says, that it fits, and what it leaves behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import itertools
import logging
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

import asyncagent.terminal as terminal_module
from asyncagent.metrics import (
    NO_HOSTS,
    Counters,
    HostReport,
    LearnerStatistics,
    LevelReport,
    Report,
)
from asyncagent.panel import (
    MAX_HEIGHT,
    View,
    describe_briefly,
    in_ascii,
    pack,
    panel,
    spark,
    stage_bar,
    stage_parts,
)
from asyncagent.stages import Stages, Verdict
from asyncagent.terminal import MAX_PENDING, Terminal

WATCHDOG_S = 60.0
ROOT = Path(__file__).resolve().parent.parent
STAGES = Stages(0.71, 0.2, 0.09, 0.4, 0.05, 0.55, 0.9, 0.02, 0.08, 0.34, 0.98, 0.03)
ADVICE = (
    "environments limit: cores 98% busy; more cores or remote actor hosts help, a faster GPU "
    "does not"
)


def report(frames: int = 250_000, **fields: Any) -> Report:
    """A report of a run that learns; ``fields`` replace the made-up ones."""
    figures = LearnerStatistics(
        *(frames, 900, 10, 1.0, 2.0, 3.0, 4.0, 5.0, 0.6, 12.7, 20, 0.9, 1e-4, None)
    )
    made = Counters(4, 0, 0, 0.0).report(figures, 16.0, 96, NO_HOSTS)
    values: dict[str, Any] = {
        "time_s": 312.0, "frames_per_s": 1000.0, "updates_per_s": 12.5, "episodes": 3201,
        "episode_return_mean": -17.32,
    }  # fmt: skip
    return made._replace(**(values | fields))


def full(levels: int = 1, hosts: int = 0, name: str = "level") -> Report:
    """A report with everything in it."""
    return report(
        stages=STAGES,
        verdict=Verdict("environments", ADVICE),
        loop_lag_ms=0.3,
        skipped_updates=3,
        env_losses=14,
        levels={f"{name}_{index}": LevelReport(9, 8, 12.5) for index in range(levels)},
        hosts={
            f"host-{index}": HostReport(32, 3200.0, 4.1, 1e6, 1e5, 1.2, 0) for index in range(hosts)
        },
    )


def lines_of(view: View, width: int = 100, height: int = 40) -> list[str]:
    return [line.plain for line in panel(view, width, height)]


def view_of(made: Report | None, **fields: Any) -> View:
    return View("atari_pong", 500_000, 0, made)._replace(**fields)


class Tty(io.StringIO):
    """A stdout that may be a terminal, and may be gone."""

    terminal = True
    gone = False

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


@contextlib.contextmanager
def streams(columns: int = 80, term: str = "xterm", terminal: bool = True) -> Iterator[Tty]:
    """stdout and stderr of a terminal, or of none."""
    tty = Tty()
    tty.terminal = terminal
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TERM": term, "COLUMNS": str(columns), "LINES": "24"}.items():
            patch.setenv(name, value)
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        patch.setattr(sys, "stdout", tty)
        patch.setattr(sys, "stderr", tty)
        patch.setattr(os, "dup2", lambda source, target: os.close(source))  # not pytest's stdout
        yield tty


def screen(written: str) -> list[str]:
    """What stands on an endless terminal after ``written``; knows what rich.live writes."""
    rows = [""]
    row = column = 0
    for code, text in re.findall(r"(\x1b\[[\d;?]*[A-Za-z])|([^\x1b])", written):
        if code.endswith("A"):
            row = max(0, row - int(code[2:-1]))
        elif code == "\x1b[2K":
            rows[row] = ""
        elif code in ("\x1b[?25l", "\x1b[?25h") or code.endswith("m"):
            pass
        elif code:
            pytest.fail(f"unexpected {code!r}")
        elif text == "\n":
            row, column = row + 1, 0
            rows += [""] * (row == len(rows))
        elif text == "\r":
            column = 0
        else:
            rows[row] = rows[row].ljust(column)[:column] + text + rows[row][column + 1 :]
            column += 1
    return rows


def cursor_shown(written: str) -> bool:
    return written.rfind("\x1b[?25h") >= written.rfind("\x1b[?25l")


def test_panel_says_what_a_person_wants_to_know() -> None:
    """Progress, time left, speed, return, lag, queue, shares of the stages, advice, warnings."""
    made = full()
    text = "\n".join(lines_of(view_of(made, rates=(1000.0,), warnings=("12:00:00 beware",))))
    for part in (
        "atari_pong", "50.0% of 500,000 frames", "left 0:04:10", "1,000 frames/s",
        "12.5 updates/s", "after 0:05:12", "-17.32 after 3,201 games", "12.7 updates, max 20",
        "queue 96", "skipped 3 updates", "environments lost 14",
        "steps 71%, awaits actions 20%, learner 9%", "computes 40%, copies 5%, waits 55%",
        "computes 90%, copies 2%, waits 8%", "cores 98% busy, event loop 34% busy, loop lag 0.3 ms",
        "12:00:00 beware",
    ):  # fmt: skip
        assert part in text
    assert ADVICE in " ".join(text.split())


def test_before_the_first_report_it_starts() -> None:
    """There is one line, with the progress of a resumed run."""
    (line,) = lines_of(view_of(None, frames=50_000))
    assert "10.0%" in line and "starting" in line


def test_what_is_not_known_is_left_out() -> None:
    """Without stages, verdict, hosts or games there are no lines about them, and no nan."""
    made = report(episode_return_mean=math.nan, policy_lag_mean=math.nan, entropy=math.nan)
    text = "\n".join(lines_of(view_of(made, rates=(math.nan,), returns=(math.nan, math.nan))))
    labels = [line.split()[0] for line in text.splitlines()]
    assert labels == ["atari_pong", "speed", "return", "lag"]
    assert "nan" not in text
    some = made._replace(stages=Stages(env_steps=0.5, env_waits_learner=0.25, loop_busy=0.1))
    text = "\n".join(lines_of(view_of(some)))
    assert "steps 50%, learner 25%" in text and "event loop 10% busy" in text
    assert "actions" not in text and "computes" not in text and "cores" not in text


@pytest.mark.parametrize("levels", [1, 30])
@pytest.mark.parametrize("name", ["a", "長い名前", "x" * 300])
def test_panel_fits(levels: int, name: str) -> None:
    """No line is wider than the terminal, the panel and an empty line no higher."""
    made = full(levels, 5, name)
    rates = tuple(float(index % 7) for index in range(60))
    seen = view_of(made, level_name=name, rates=rates, returns=rates, warnings=("b" * 300,) * 2)
    for width, height in itertools.product([1, 20, 59, 60, 80, 250], [1, 9, 10, 12, 24, 80]):
        lines = lines_of(seen, width, height)
        assert all(cell_len(line) <= min(width, 100) for line in lines)
        if width < 60 or height < 10:
            assert len(lines) == 1
            continue
        assert 8 <= len(lines) < min(height, MAX_HEIGHT)
        for part in ("speed", "return", "limit", "warning"):
            assert any(line.startswith(part) for line in lines), part


def test_of_many_levels_the_rest_is_counted() -> None:
    """Levels take two lines at most, hosts one; how many are not shown is said."""
    lines = lines_of(view_of(full(30, 9)), 60)
    (first,) = [index for index, line in enumerate(lines) if line.startswith("levels")]
    shown = " ".join(lines[first : first + 2])
    assert shown.endswith(f"and {30 - shown.count('level_')} more")
    assert lines[first + 2].startswith("lag")
    (hosts,) = [line for line in lines if line.startswith("hosts")]
    assert "9 with 288 actors, await the learner 3%" in hosts
    (hosts,) = [line for line in lines_of(view_of(full(1, 9))) if line.startswith("hosts")]
    assert hosts.endswith("3%  host-0 3,200/s lag 4.1  and 8 more")
    assert "level_0" not in "\n".join(lines_of(view_of(full(1)))), "the return line says it"


def test_pack() -> None:
    """As many entries as fit stand side by side; of the rest there is the number."""
    entries = [f"e{index}" for index in range(30)]
    assert pack(entries[:3], 10, 1) == ["e0  e1  e2"]
    assert pack(entries, 20, 2) == ["e0  e1  e2  e3  e4", "e5  e6  and 23 more"]
    assert pack(entries[:6], 10, 2) == ["e0  e1  e2", "e3  e4  e5"]
    assert pack([], 10, 2) == []


def test_bars_are_as_long_as_the_shares() -> None:
    """Each part's length is its share, rounded so that the sum is right, and never too long."""
    envs = stage_parts(STAGES)["envs"]
    assert stage_bar(envs, 20).plain == "█" * 14 + "▒" * 4 + "░" * 2
    half = stage_parts(Stages(env_steps=0.3, env_waits_actions=0.2))["envs"]
    assert stage_bar(half, 10).plain == "███▒▒     "
    over = stage_parts(Stages(learner_computes=0.9, learner_waits=0.4))["learner"]
    assert stage_bar(over, 10).plain == "█████████░"
    assert stage_parts(Stages()) == {}


def test_spark() -> None:
    """Heights are by value between the bound and the largest; gaps where no number is."""
    assert spark([0.0, 50.0, 100.0], 0.0) == "▁▅█"
    assert spark([-2.0, math.nan, 2.0], -2.0) == "▁ █"
    assert spark([3.0, 3.0], 3.0) == "▁▁"
    assert spark([1.0], 0.0) == spark([math.nan, math.nan], 0.0) == ""


def test_text_from_outside_is_only_text() -> None:
    """Square brackets stay, and nothing reaches the terminal that it would obey."""
    made = full(2, 0, "[red]le[/]\x1b[2Jvel")._replace(verdict=Verdict("learner", "[b]a\nb[/b]"))
    seen = view_of(made, level_name="[blink]\x1b]0;x\x07", warnings=("[link=x]y\r\nz",))
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, markup=False, highlight=False)
    for line in panel(seen, 100, 40):
        console.print(line)
    written = re.sub(r"\x1b\[[\d;]*m", "", file.getvalue())
    for part in ("[blink] ]0;x ", "[red]le[/] [2Jvel_0", "[b]a b[/b]", "[link=x]y  z"):
        assert part in written
    assert "\x1b" not in written and "\x07" not in written and "\r" not in written


def test_ascii_terminals() -> None:
    """Bars have letters there, and what has none is a question mark."""
    assert in_ascii("█▓▒░━─… é") == "#+-.=-~ ?"


def test_live_panel_replaces_itself() -> None:
    """One panel stands there at any time; messages, warnings and prints stand above it."""
    root = logging.getLogger()
    before = root.handlers[:]
    with streams() as tty:
        handler = logging.StreamHandler(sys.stderr)
        root.addHandler(handler)
        try:
            with Terminal("catch", 500_000, 0) as terminal:
                for frames in (100_000, 200_000, 250_000):
                    terminal.show(full()._replace(frames=frames))
                    terminal.settle(WATCHDOG_S)
                    logging.getLogger("x").warning("[bold]careful\nsecond line")
                    terminal.settle(WATCHDOG_S)
                    print(f"printed [{frames}]")
                    print("and on stderr", file=sys.stderr)
                terminal.say("stopping [now]")
                terminal.show(full())
                terminal.settle(WATCHDOG_S)
                assert cursor_shown(tty.getvalue()), "a killed process leaves a cursor"
                assert screen(tty.getvalue())[-1] == "", "what comes next begins on its own line"
            assert handler.stream is tty
            assert sys.stdout is tty
            assert sys.stderr is tty
        finally:
            root.removeHandler(handler)
    assert root.handlers == before
    written = tty.getvalue()
    assert cursor_shown(written) and "?1049" not in written
    rows = screen(written)
    (panel_row,) = [index for index, row in enumerate(rows) if row.startswith("catch")]
    above, below = rows[:panel_row], rows[panel_row:]
    said = ["[bold]careful", "second line", "printed [{}]", "and on stderr"]
    expected = [line.format(frames) for frames in (100_000, 200_000, 250_000) for line in said]
    assert above == [*expected, "stopping [now]"]
    assert "50.0%" in below[0]
    assert next(row for row in below if "[bold]careful" in row).startswith("warning")
    assert len(below) <= MAX_HEIGHT + 2


def test_an_error_leaves_the_terminal_in_order() -> None:
    """The cursor, stdout and stderr are as before, and the traceback follows the panel."""
    with streams() as tty:
        with pytest.raises(RuntimeError), Terminal("catch", 500_000, 0) as terminal:
            terminal.show(full())
            raise RuntimeError("broken")
        assert sys.stdout is tty and sys.stderr is tty
        print("Traceback")
    assert cursor_shown(tty.getvalue())
    rows = screen(tty.getvalue())
    assert rows[-2:] == ["Traceback", ""]
    assert "awaits actions" in "\n".join(rows)


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_dumb_terminals_get_plain_lines(term: str) -> None:
    """Without cursor movements there is a line per report."""
    with streams(term=term) as tty, Terminal("catch", 500_000, 0) as terminal:
        terminal.show(full())
        terminal.show(full())
    assert "\x1b" not in tty.getvalue()
    assert tty.getvalue().count("250,000 frames") == 2


def test_tiny_terminals_get_one_line() -> None:
    """There the figures that matter most stand on a line that replaces itself."""
    with streams(columns=59) as tty, Terminal("catch", 500_000, 0) as terminal:
        terminal.show(report())
        terminal.show(report())
    (line,) = filter(None, screen(tty.getvalue()))
    assert "50.0% 0.25M 1,000/s return -17.32 left 0:04:10" in line
    assert "hosts 2" in describe_briefly(full(1, 2), 1000, 10.0)


def test_plain_lines_tell_a_new_limit_once() -> None:
    """The doctor's sentence has a line of its own when what limits has changed."""
    learner = report(verdict=Verdict("learner", "learner limits: 99% busy"))
    reports = [report(), full(), full(), report(), full(), learner, full()]
    with streams(terminal=False) as out, Terminal("catch", 500_000, 0) as terminal:
        for made in reports:
            terminal.show(made)
    lines = out.getvalue().splitlines()
    told = [index for index, line in enumerate(lines) if "frames/s" not in line]
    assert [lines[index] for index in told] == [ADVICE, "learner limits: 99% busy", ADVICE]
    assert told == [2, 7, 9]


@pytest.mark.parametrize("live", [True, False])
def test_quiet(live: bool) -> None:
    """Nothing is printed, on a terminal or elsewhere."""
    with streams(terminal=live) as tty, Terminal("catch", 500_000, 0, quiet=True) as terminal:
        terminal.show(full())
        terminal.say("stopping")
    assert tty.getvalue() == ""


@pytest.mark.parametrize("live", [True, False])
def test_a_terminal_that_is_gone_ends_no_run(live: bool) -> None:
    """Where stdout can no longer be written to, the run goes on in silence."""
    with streams(terminal=live) as tty, Terminal("catch", 500_000, 0) as terminal:
        terminal.show(full())
        terminal.settle(WATCHDOG_S)
        tty.gone = True
        terminal.show(full())
        terminal.say("stopping")


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_pipe_is_no_terminal_whatever_it_is_called(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Where colours are asked for, a pipe still gets a line per report, and no cursor moves."""
    with streams(terminal=False) as out:
        monkeypatch.setenv(variable, "1")
        with Terminal("catch", 500_000, 0) as terminal:
            terminal.show(full())
            terminal.show(full())
    assert out.getvalue().count("250,000 frames") == 2
    assert not re.search(r"\x1b\[[\d;?]*[^m\d;?]", out.getvalue())


def test_without_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program may be started without one."""
    with streams() as tty:
        monkeypatch.setattr(sys, "stderr", None)
        with Terminal("catch", 500_000, 0) as terminal:
            terminal.show(full())
    assert "awaits actions" in tty.getvalue()


class Held(Tty):
    """Takes nothing until it is let go, as a terminal after Ctrl-S."""

    def __init__(self) -> None:
        super().__init__()
        self.terminal = False
        self.asked = threading.Event()
        self.go = threading.Event()

    def write(self, text: str) -> int:
        self.asked.set()
        assert self.go.wait(WATCHDOG_S)
        return super().write(text)


def test_a_terminal_that_takes_nothing_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports and messages go on, what does not fit is dropped, and the end does not hang."""
    held = Held()
    with streams():
        monkeypatch.setattr(sys, "stdout", held)
        with Terminal("catch", 500_000, 0) as terminal:
            terminal.show(full())
            assert held.asked.wait(WATCHDOG_S)
            for _ in range(10 * MAX_PENDING):
                terminal.show(full())
                terminal.say("stopping")
            terminal.settle(0.01)
            held.go.set()
            terminal.settle(WATCHDOG_S)
    assert 1 <= held.getvalue().count("250,000 frames") <= MAX_PENDING


def test_who_logs_does_not_wait_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages on stderr are written by the terminal's thread, in order, as they were when said."""
    held = Held()
    root = logging.getLogger()
    with streams():
        monkeypatch.setattr(sys, "stderr", held)
        root.addHandler(logging.StreamHandler())
        before = root.handlers[:]
        changing = ["first"]
        with Terminal("catch", 500_000, 0) as terminal:
            logging.getLogger("x").warning("%s", changing)
            assert held.asked.wait(WATCHDOG_S)
            changing.append("later")
            logging.getLogger("x").warning("second")
            assert held.getvalue() == ""
            held.go.set()
            terminal.settle(WATCHDOG_S)
            assert held.getvalue() == "['first']\nsecond\n"
        assert root.handlers == before
        root.removeHandler(root.handlers[-1])


def test_a_terminal_that_takes_nothing_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A live panel whose terminal is held: the end comes, and everything is as it was before."""
    monkeypatch.setattr(terminal_module, "CLOSE_S", 0.05)
    held = Held()
    held.go.set()
    held.terminal = True
    root = logging.getLogger()
    with streams() as tty:
        monkeypatch.setattr(sys, "stdout", held)
        handler = logging.StreamHandler()
        root.addHandler(handler)
        before = root.handlers[:]
        with Terminal("catch", 500_000, 0) as terminal:
            terminal.settle(WATCHDOG_S)
            held.asked.clear()
            held.go.clear()
            terminal.show(full())
            assert held.asked.wait(WATCHDOG_S)
        assert (sys.stdout, sys.stderr) == (held, tty)
        assert root.handlers == before and handler.stream is tty
        root.removeHandler(handler)
        held.go.set()
        assert terminal._thread is not None
        assert terminal._thread.join(WATCHDOG_S)  # what it has left behind ends, too


class Strange(logging.StreamHandler[Any]):
    """An application's own, that fails."""

    def emit(self, record: logging.LogRecord) -> None:
        raise ValueError("a handler's own fault")

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing."""


def test_a_handler_that_fails_hides_no_error() -> None:
    """What the run raises comes out, and the handlers are as before."""
    root = logging.getLogger()
    with streams():
        root.addHandler(Strange())
        before = root.handlers[:]
        with (
            pytest.raises(ZeroDivisionError),
            Terminal("catch", 500_000, 0) as terminal,
        ):
            logging.getLogger("x").warning("careful")
            terminal.settle(WATCHDOG_S)
            logging.getLogger("x").warning("careful")
            raise ZeroDivisionError
        assert root.handlers == before
        root.removeHandler(before[-1])


@pytest.mark.parametrize("stdout", ["tee", "closed"])
def test_a_stdout_of_another_kind(monkeypatch: pytest.MonkeyPatch, stdout: str) -> None:
    """A program may have put anything there that takes text, or nothing more."""

    class Tee:
        written = ""

        def write(self, text: str) -> None:
            self.written += text

        def flush(self) -> None:
            """Nothing."""

    closed = io.StringIO()
    closed.close()
    tee = Tee()
    with streams():
        monkeypatch.setattr(sys, "stdout", {"tee": tee, "closed": closed}[stdout])
        with Terminal("catch", 500_000, 0) as terminal:
            terminal.show(full())
    assert stdout == "closed" or "250,000 frames" in tee.written


def test_a_panel_that_cannot_be_drawn_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The traceback is a warning; nothing is printed from then on."""

    def broken(*figures: Any) -> str:
        raise ZeroDivisionError("of nothing")

    monkeypatch.setattr(terminal_module, "describe", broken)
    with streams(terminal=False) as out, Terminal("catch", 500_000, 0) as terminal:
        terminal.show(full())
        terminal.settle(WATCHDOG_S)
        terminal.show(full())
    (warning,) = caplog.records
    assert "of nothing" in caplog.text and warning.levelno == logging.WARNING
    assert out.getvalue() == ""


PROGRAM = """
import os, sys
sys.path[:0] = [{tests!r}, {root!r}]
from test_terminal import full
from asyncagent.terminal import Terminal
with Terminal("catch", 500_000, 0) as terminal:
    terminal.show(full())
    terminal.settle(60.0)
    print("go on?", flush=True)
    sys.stdin.readline()
    terminal.show(full())
    terminal.settle(60.0)
    os._exit(130)
"""


def test_in_a_pseudo_terminal() -> None:
    """The panel follows a new size, and a process that is killed leaves a usable terminal."""
    ours, theirs = pty.openpty()
    settings = termios.tcgetattr(theirs)
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 90, 0, 0))
    environ = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    program = PROGRAM.format(tests=str(ROOT / "tests"), root=str(ROOT))
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    written = ""
    try:
        while "go on?" not in written or written.count("limit ") < 2:
            written += os.read(ours, 65536).decode(errors="replace")
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 62, 0, 0))
        os.write(ours, b"\n")
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while data := os.read(ours, 65536):
                written += data.decode(errors="replace")
    finally:
        process.kill()
        os.close(ours)
    assert process.wait() == 130
    rows = screen(written)
    (top,) = [index for index, row in enumerate(rows) if row.startswith("catch")]
    assert max(map(len, rows[top:])) <= 62
    assert rows[-1] == "" and cursor_shown(written)
