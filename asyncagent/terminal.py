"""A run's progress on the terminal: a live panel; plain lines in a file."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from asyncagent.metrics import Report
from asyncagent.panel import View, describe, in_ascii, panel, printable, smoothed
from asyncagent.threads import NamedThread

MAX_REPORTS = 60
"""So many reports' rates and returns are kept, for the panel's curves."""
MAX_WARNINGS = 2
MAX_PENDING = 8
"""Where the terminal takes nothing (Ctrl-S, a pager), more reports than these are never printed."""
MAX_MESSAGES = 1000
"""Likewise of what is logged."""
CLOSE_S = 2.0
"""Longest to wait, at the end, for what has not been printed yet."""

_log = logging.getLogger(__name__)


class _Console(Console):
    """Goes quiet, instead of ending the program, when nobody reads its output any more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class _Last(logging.Handler):
    """Keeps the last warnings, for the panel."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: deque[str] = deque(maxlen=MAX_WARNINGS)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            first = record.getMessage().partition("\n")[0]
        except Exception:
            self.handleError(record)  # as every handler does: a message is not worth the run
            return
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        self.lines.append(f"{clock} {first}")


class _Passing(logging.Handler):
    """Leaves what another handler writes to stderr to the terminal's thread."""

    def __init__(self, handler: logging.Handler, soon: Callable[[Callable[[], None]], None]):
        super().__init__(handler.level)
        self._handler = handler
        self._soon = soon

    def emit(self, record: logging.LogRecord) -> None:
        now = copy.copy(record)
        try:
            now.msg, now.args = record.getMessage(), None  # of arguments that may change
        except Exception:
            self.handleError(record)
            return
        self._soon(lambda: self._write(now))

    def _write(self, record: logging.LogRecord) -> None:
        try:
            self._handler.handle(record)
        except Exception:  # of an application's own handler: a message is not worth the run
            self._handler.handleError(record)


class Terminal:
    """A live panel where stdout is a terminal, plain lines elsewhere, nothing if ``quiet``.

    A context manager.  Within it a thread prints, also what is logged on stderr: who has something
    to say never waits.
    """

    def __init__(
        self, level_name: str, total_frames: int, frames: int, quiet: bool = False
    ) -> None:
        """
        Args:
          frames: learned from when the session starts.
        """
        self._view = View(level_name, total_frames, frames)
        self._rates: deque[float] = deque(maxlen=MAX_REPORTS)
        self._returns: deque[float] = deque(maxlen=MAX_REPORTS)
        self._warnings = _Last()
        self._limit = ""
        self._console = _Console(highlight=False, markup=False, quiet=quiet)
        self._live: Live | None = None
        if _is_live(self._console) and not quiet:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                auto_refresh=False,  # often enough is with every report
                redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),
                vertical_overflow="crop",
            )
        self._drawing, self._logging = contextlib.ExitStack(), contextlib.ExitStack()
        self._thread: NamedThread | None = None
        self._room = threading.Semaphore(MAX_PENDING)

    def __enter__(self) -> Terminal:
        self._thread = NamedThread("terminal")
        self._logging.callback(_set_streams, sys.stdout, sys.stderr)
        if self._live is not None:
            self._drawing.enter_context(_unwatched(self._console))
            self._drawing.enter_context(self._live)
            # A process that is killed could not show it again.
            self._console.show_cursor(True)
            self._live.refresh()
            self._logging.enter_context(_heard(self._warnings))
        self._logging.enter_context(_passed(self._write))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self.settle()
        assert self._thread is not None
        with contextlib.suppress(RuntimeError):  # the thread has died
            self._thread.submit(self._drawing.close)
        self.settle()
        self._logging.close()
        self._thread.close()

    def settle(self, timeout_s: float | None = None) -> None:
        """Wait until all is printed, or the terminal takes nothing for so long; None: CLOSE_S."""
        settled = threading.Event()
        with contextlib.suppress(RuntimeError):
            if self._thread is not None:
                self._thread.submit(settled.set)
                settled.wait(CLOSE_S if timeout_s is None else timeout_s)

    def say(self, message: str) -> None:
        """Print a message of its own line, above the panel."""
        self._draw(lambda: self._console.print(message, soft_wrap=True))

    def show(self, report: Report) -> None:
        """Show a report."""
        self._rates.append(report.frames_per_s)
        self._returns.append(report.episode_return_mean)
        self._view = self._view._replace(
            report=report, rates=tuple(self._rates), returns=tuple(self._returns)
        )
        rate = smoothed(self._view.rates)
        self._draw(self._live.refresh if self._live else lambda: self._print(report, rate))

    def _draw(self, draw: Callable[[], object]) -> None:
        def drawn() -> None:
            self._room.release()
            with _unwatched(self._console):
                if not self._console.quiet:
                    draw()

        if self._thread is not None and self._room.acquire(blocking=False):
            self._thread.submit(drawn)

    def _write(self, write: Callable[[], None]) -> None:
        if self._thread is not None and self._thread.num_pending < MAX_MESSAGES:
            with contextlib.suppress(RuntimeError):  # another thread's last words, at the very end
                self._thread.submit(write)

    def _print(self, report: Report, rate: float) -> None:
        total = self._view.total_frames
        figures = describe(report, total, rate)
        self._console.print(f"{100 * report.frames / total:5.1f}%  {figures}", soft_wrap=True)
        limit, advice = report.verdict
        if advice and limit != self._limit:
            self._limit = limit
            self._console.print(self._spelt(printable(advice)), soft_wrap=True)

    def _render(self) -> Text:
        view = self._view._replace(warnings=tuple(self._warnings.lines))
        lines = panel(view, *self._console.size)
        if self._spelt("█") != "█":
            lines = [Text(self._spelt(line.plain)) for line in lines]
        # Whatever is written past us, and a process that is killed, begin on a line of their own.
        return Text("\n").join([*lines, Text()])

    def _spelt(self, text: str) -> str:
        return text if self._console.encoding.startswith("utf") else in_ascii(text)


def _is_live(console: Console) -> bool:
    """Whether lines can be drawn anew there; rich calls a pipe a terminal where it is told to."""
    is_tty = console.is_terminal and console.is_interactive and not console.is_dumb_terminal
    try:
        return is_tty and console.file.isatty()
    except (AttributeError, ValueError):  # a program's own stdout, or one that is closed
        return False


def _set_streams(stdout: TextIO, stderr: TextIO) -> None:
    """What the panel puts in their place may never be taken away by itself."""
    sys.stdout, sys.stderr = stdout, stderr


@contextlib.contextmanager
def _unwatched(console: _Console) -> Iterator[None]:
    """A terminal that is gone, or a full disk, ends what is printed, not the run."""
    try:
        yield
    except OSError as error:
        console.on_broken_pipe()
        _log.warning("stdout: %s; no more is printed there", error.strerror)
    except Exception:
        console.on_broken_pipe()
        _log.warning("no more is printed on stdout; the run goes on", exc_info=True)


@contextlib.contextmanager
def _passed(soon: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """Within it, what is logged on stderr is written by ``soon``."""
    handlers = logging.getLogger().handlers
    passing: dict[logging.Handler, logging.Handler] = {
        handler: _Passing(handler, soon)
        for handler in handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
    }
    handlers[:] = [passing.get(handler, handler) for handler in handlers]
    real = {passed: handler for handler, passed in passing.items()}
    try:
        yield
    finally:
        handlers[:] = [real.get(handler, handler) for handler in handlers]


@contextlib.contextmanager
def _heard(warnings: _Last) -> Iterator[None]:
    """What is logged goes to ``warnings``, too, and to where sys.stderr is at entry."""
    root = logging.getLogger()
    moved = []
    for handler in root.handlers:
        real = getattr(sys.stderr, "rich_proxied_file", None)
        if isinstance(handler, logging.StreamHandler) and handler.stream is real is not None:
            moved.append((handler, handler.setStream(sys.stderr)))
    root.addHandler(warnings)
    try:
        yield
    finally:
        root.removeHandler(warnings)
        for handler, real in moved:
            handler.setStream(real)
