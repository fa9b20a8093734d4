"""The measuring processes, seen from their parent."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import IO, Any

from asyncagent.bench.job import Job
from asyncagent.errors import AsyncAgentError, UsageError

TIMEOUT_S = 180.0
"""Longest that a job may take, beyond the time it measures."""
END_S = 5.0
"""Longest to wait for processes to end by themselves."""
COMMAND = (sys.executable, "-P", "-m", "asyncagent.bench.child")
LAST_LINES = 5
"""Lines of what a process said that an error quotes."""


class ChildLost(AsyncAgentError):
    """A measuring process failed; the message has its last words."""


class Children:
    """``count`` processes that do the same job at the same time; a context manager.

    They start at once; entering waits until they are there, so that no measurement meets the start
    of another's.  Nothing outlives the block.  After an error none of them can be used any more.
    """

    def __init__(
        self, count: int, timeout_s: float = TIMEOUT_S, command: Sequence[str] = COMMAND
    ) -> None:
        """``timeout_s``: longest that a job may take, beyond the time it measures."""
        self._timeout_s = timeout_s
        self._children = [_Child([*command, str(index)]) for index in range(count)]

    def __enter__(self) -> Children:
        try:
            with self._limit(self._timeout_s, self._children):
                for child in self._children:
                    child.expect("started")
        except BaseException:
            self._end(0.0)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self._end(END_S if error is None else 0.0)

    def measure(self, job: Job, count: int | None = None) -> float:
        """Steps per second of the first ``count`` processes (all if None) together.

        Raises:
          UsageError: what a process found wrong with the configuration.
          ChildLost: one failed, died, or took too long.
        """
        children = self._children[:count]
        with self._limit(job.seconds + self._timeout_s, children):
            for child in children:
                child.say(job.encode())
            for child in children:
                child.expect("ready")
            for child in children:
                child.say("go")
            rates = [float(child.expect("rate")) for child in children]
            for child in children:
                child.say("stop")
            for child in children:
                child.expect("stopped")
        return sum(rates)

    @contextlib.contextmanager
    def _limit(self, seconds: float, children: list[_Child]) -> Iterator[None]:
        """Whoever is waited for longer than this is killed, which its ``expect`` sees."""

        def give_up() -> None:
            for child in children:
                child.give_up()

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end(self, timeout_s: float) -> None:
        for child in self._children:
            child.hang_up()
        for child in self._children:
            child.end(timeout_s)


class _Child:
    def __init__(self, command: list[str]) -> None:
        self._process, self._words = start(command)
        self._gave_up = False

    def say(self, words: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # ``expect`` tells what it died of
            self._process.stdin.write(json.dumps(words) + "\n")
            self._process.stdin.flush()

    def expect(self, name: str) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildLost(self._last_words())
        answer = json.loads(line)
        if "usage_error" in answer:
            raise UsageError(answer["usage_error"])
        if "error" in answer:
            raise ChildLost(f"a measuring process failed: {answer['error']}")
        return answer[name]

    def give_up(self) -> None:
        self._gave_up = True
        self._process.kill()

    def hang_up(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def end(self, timeout_s: float) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._words.close()

    def _last_words(self) -> str:
        status = self._process.wait()
        how = "took too long and was killed" if self._gave_up else f"died with status {status}"
        words = " / ".join(last_words(self._words))
        return f"a measuring process {how}; its last words: {words}"


def start(command: Sequence[str]) -> tuple[subprocess.Popen[str], IO[bytes]]:
    """A process with lines of text to and from it, and the file with its other words.

    It finds the modules that this process finds.
    """
    # A file: a pipe that nobody reads would hold the process up.
    words = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=words,
        text=True,
        env=environment(),
        process_group=0,  # Ctrl-C is the parent's
    )
    return process, words


def environment() -> dict[str, str]:
    """Ours, with our import path."""
    path = [os.path.abspath(entry) for entry in (*sys.path, os.getcwd())]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def last_words(output: IO[bytes]) -> list[str]:
    """The last lines, at least one, of what a process said."""
    output.seek(0)
    lines = output.read().decode(errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()][-LAST_LINES:] or ["none"]
