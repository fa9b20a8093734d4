"""Runs checks in a process of their own, and takes another where one crashes or hangs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from asyncagent.bench.children import start
from asyncagent.envs.scratch import sweep
from asyncagent.selftest.outcome import Outcome, State
from asyncagent.selftest.registry import Check

COMMAND = (sys.executable, "-P", "-m", "asyncagent.selftest.child")
START_S = 120.0
"""Longest that the process may take to start."""


class Result(NamedTuple):
    """One check, and what came of it."""

    check: Check
    state: State
    detail: str
    """One line."""
    seconds: float


def run(
    checks: Sequence[Check],
    begin: Callable[[Check], None],
    tell: Callable[[Result], None],
    command: Sequence[str] = COMMAND,
) -> list[Result]:
    """One result per check, in their order.

    Nothing that a check does, or does not do, keeps the next one from its turn.

    Args:
      begin: called before each check.
      tell: called after each check.
    """
    results = []
    child: _Child | None = None
    try:
        for check in checks:
            begin(check)
            if child is None or child.is_gone:
                child = _Child(command)
            started_s = time.perf_counter()
            outcome = child.ask(check)
            results.append(Result(check, *outcome, time.perf_counter() - started_s))
            tell(results[-1])
    finally:
        if child is not None:
            child.end()
        sweep()  # what a process that was killed has left behind
    return results


class _Child:
    def __init__(self, command: Sequence[str]) -> None:
        self._process, self._words = start(command)
        self.is_gone = False
        with self._limit(START_S):
            self._started = self._hear()

    def ask(self, check: Check) -> Outcome:
        """Run ``check`` there; what ends the process is a failure of the check."""
        if not self._started:  # nor would another one
            return Outcome("failed", f"the checks' process does not start: {self._last_words(0)}")
        before = os.fstat(self._words.fileno()).st_size
        assert self._process.stdin is not None
        job = {"function": check.function, "arguments": check.arguments}
        with self._limit(check.limit_s) as limit:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(job) + "\n")
                self._process.stdin.flush()
                if (line := self._hear()).endswith("\n"):
                    return Outcome(**json.loads(line))
            # What answers no more may live on.
            status = self._process.wait()
        words = self._last_words(before)
        self.end()
        if limit.is_set():
            how = f"hung: it was ended after {check.limit_s:g} s"
        elif status < 0:
            how = f"crashed: its process was killed, {signal.strsignal(-status)}"
        else:
            how = f"crashed: its process exited with status {status}"
        return Outcome("failed", f"{how}; last words: {words}" if words else how)

    def end(self) -> None:
        """The process and its group are no more; harmless when repeated."""
        if not self.is_gone:
            self.is_gone = True
            self._kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
            self._words.close()

    def _hear(self) -> str:
        """One line; "" once the process is gone, or will say no more."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    @contextlib.contextmanager
    def _limit(self, seconds: float) -> Iterator[threading.Event]:
        """Within it the process is killed, and the event set, after so long."""
        over = threading.Event()

        def give_up() -> None:
            over.set()
            self._kill()

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield over
        finally:
            timer.cancel()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _last_words(self, start: int) -> str:
        """The last line said since ``start``, a position in the file."""
        self._words.seek(start)
        lines = self._words.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]
