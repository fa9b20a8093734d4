"""WorkerProcess: one worker process, from its start to its end, as the event loop sees it.

The loop watches three descriptors: the pipe of answers (a row is there), the process itself (it
ended, however that came) and its output.  Nothing polls and nothing needs a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from mmap import mmap

from asyncagent.envs.shared import (
    MAX_REASON,
    Doing,
    Hello,
    Mark,
    marks_in,
    memory_size,
    write_message,
)

MAX_OUTPUT = 8192
"""Bytes of a worker's last output that are kept."""

_TICKS = 8
"""Ticks of the watch per timeout: a program that was suspended comes back to one late tick."""

_AGAIN_S = 0.05
"""Between looks at a process that has exited and cannot be waited for yet."""
_REAP_S = 1.0
"""Longest wait for a killed process: one that hangs in the kernel is left behind."""

REQUESTS = [bytes((number,)) for number in range(256)]

_ONE_THREAD = ("OMP", "OPENBLAS", "MKL", "NUMEXPR")
_DOING = {
    Doing.MAKING: "being made",
    Doing.RESETTING: "resetting",
    Doing.STEPPING: "stepping",
    Doing.CLOSING: "closing",
}


class WorkerDied(Exception):
    """The worker process is no more, or is given up; the message says why, in one line."""

    def __init__(self, reason: str, env_index: int | None) -> None:
        super().__init__(reason)
        self.env_index = env_index
        """The environment that was at work then; None if none was."""


class WorkerProcess:
    """A process with a block of shared memory, which answers one request at a time."""

    def __init__(
        self, name: str, hello: Hello, timeout_s: float, on_started: Callable[[], None]
    ) -> None:
        """Start it; from a running loop.

        Args:
          name: shown by ``ps``.
          hello: what it finds in the memory.
          timeout_s: longest time in one call of one environment, while an answer is awaited.
          on_started: called once, with the first answer or the end.

        Raises OSError if the system will not have it.
        """
        self._loop = asyncio.get_running_loop()
        self._num_envs = len(hello.seeds)
        self._tick_s = timeout_s / _TICKS
        self._timeout_s = timeout_s
        self._on_started: Callable[[], None] | None = on_started
        self._answer: bytes | None = None
        self._awaited = False
        self._num_asked = 0
        self._waiter: asyncio.Future[None] | None = None
        self._death: tuple[str, int | None] | None = None
        self._output = bytearray()
        self._seen: tuple[int, ...] = ()
        self._still = 0
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            memory_fd = os.memfd_create(name)
            theirs.callback(os.close, memory_fd)
            os.ftruncate(memory_fd, memory_size(hello.spec, len(hello.seeds)))
            self.memory = mmap(memory_fd, 0)
            self._marks = marks_in(self.memory)
            write_message(self.memory, hello.encode())
            passed = [memory_fd]
            kept = []
            for direction in (1, -1, 1):
                their_end, our_end = os.pipe()[::direction]
                theirs.callback(os.close, their_end)
                undo.callback(os.close, our_end)
                passed.append(their_end)
                kept.append(our_end)
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-u", "-m", "asyncagent.envs.worker", name]
                + [str(descriptor) for descriptor in passed],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                pass_fds=passed,
                env=_environment(),
                # A group of its own, so that Ctrl-C is the program's alone and engines can be
                # killed with their worker.  No session: kernels that share the processor out by
                # sessions (autogroup) would make it wait, at 0.5 to 0.7 of the steps.
                process_group=0,
            )
            assert self._popen.stdout is not None
            undo.callback(self._popen.stdout.close)
            undo.callback(self._popen.wait)
            undo.callback(self._kill_group)
            self._pidfd = os.pidfd_open(self._popen.pid)
            undo.pop_all()
        self._requests, self._answers, self._lifeline = kept
        self._output_fd = self._popen.stdout.fileno()
        os.set_blocking(self._answers, False)
        os.set_blocking(self._output_fd, False)
        self._exited: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._answers, self._on_answer)
        self._loop.add_reader(self._output_fd, self._on_output)
        self._loop.add_reader(self._pidfd, self._on_exit)
        self._watch = self._loop.call_later(self._tick_s, self._tick)

    def ask(self, request: int) -> None:
        """Send a request of one byte; ``take`` tells if the worker is dead."""
        if self._death is None:
            self._awaited = True
            self._num_asked += 1
            try:  # noqa: SIM105 - a context manager would cost as much as the rest
                os.write(self._requests, REQUESTS[request])
            except BrokenPipeError:
                pass  # the process is dying, which _on_exit will hear of

    def take(self) -> bytes | None:
        """The byte that answers, None if it is not there yet; WorkerDied if none will come."""
        answer, self._answer = self._answer, None
        if answer is None and self._death is not None:
            raise WorkerDied(*self._death)
        return answer

    def news(self) -> asyncio.Future[None]:
        """Done when ``take`` has something to say; for one waiter at a time."""
        self._waiter = self._loop.create_future()
        if self._answer is not None or self._death is not None:
            self._waiter.set_result(None)
        return self._waiter

    def marks(self) -> tuple[int, ...]:
        """By which the worker shows that it moves."""
        return tuple(self._marks.tolist())

    def give_up(self, reason: str) -> None:
        """Nothing more is expected of it: kill it with all its children."""
        self._die(reason)
        if not self._exited.done():
            self._kill_group()

    def output(self) -> str:
        """The last of what it and its engines printed, stdout and stderr together."""
        if not self._exited.done():
            self._on_output()
        return self._output.decode(errors="replace").strip()

    async def end(self, timeout_s: float) -> None:
        """Let it close its environments and go; kill it if that takes longer, or if cancelled."""
        self._die("was closed")
        try:
            if not self._exited.done():
                self._close_requests()
                await asyncio.wait({self._exited}, timeout=timeout_s)
        finally:
            self.give_up("was closed")
        await asyncio.wait({self._exited}, timeout=_REAP_S)

    def forget_memory(self) -> None:
        """After the end: unmap it, with its file descriptor, once nobody looks at it any more."""
        self._marks = self._marks.copy()
        del self.memory

    def _on_answer(self) -> None:
        try:
            answer = os.read(self._answers, 2)
        except BlockingIOError:
            return
        if not answer:
            self._loop.remove_reader(self._answers)
        elif len(answer) > 1 or not self._awaited:
            self.give_up(f"worker process spoke out of turn: {answer!r}")
        else:
            self._awaited = False
            self._answer = answer
            self._wake()

    def _on_output(self) -> None:
        try:
            text = os.read(self._output_fd, 65536)
        except BlockingIOError:
            return
        if not text:
            self._loop.remove_reader(self._output_fd)
        self._output += text
        del self._output[:-MAX_OUTPUT]

    def _on_exit(self) -> None:
        if self._awaited:
            self._on_answer()  # its last words
        # Before it is reaped: until then nobody else can get the number of its group.
        self._kill_group()
        status = self._popen.poll()
        if status is None:  # not quite; the loop waits for nobody
            self._loop.remove_reader(self._pidfd)
            self._loop.call_later(_AGAIN_S, self._on_exit)
            return
        self._on_output()
        self._die(f"worker process {_how(status)}{self._where()}{self._last_line(status)}")
        self._watch.cancel()
        for descriptor in (self._answers, self._output_fd, self._pidfd):
            self._loop.remove_reader(descriptor)
        assert self._popen.stdout is not None
        self._popen.stdout.close()
        self._close_requests()
        for descriptor in (self._answers, self._pidfd, self._lifeline):
            os.close(descriptor)
        self._exited.set_result(None)

    def _close_requests(self) -> None:
        if self._requests >= 0:
            os.close(self._requests)
            self._requests = -1

    def _tick(self) -> None:
        self._watch = self._loop.call_later(self._tick_s, self._tick)
        if not self._awaited:
            self._still = 0
            return
        moves = (self._num_asked, *self.marks())
        self._still = self._still + 1 if moves == self._seen else 0
        self._seen = moves
        if self._still >= _TICKS:
            self.give_up(f"worker process hung for {self._timeout_s:g} s{self._where()}")

    def _die(self, reason: str) -> None:
        if self._death is None:
            at_work = self._at_work()
            self._death = reason, None if at_work is None else at_work[0]
            self._awaited = False
            self._wake()

    def _wake(self) -> None:
        if self._on_started is not None:
            self._on_started()
            self._on_started = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _at_work(self) -> tuple[int, str] | None:
        """Which environment was at what when the worker last said so; None if none was."""
        doing, env_index = int(self._marks[Mark.DOING]), int(self._marks[Mark.ENV])
        # A dying process may have written anything there.
        if doing not in _DOING or env_index >= self._num_envs:
            return None
        return env_index, _DOING[doing]

    def _where(self) -> str:
        at_work = self._at_work()
        return "" if at_work is None else f" while environment {at_work[0]} was {at_work[1]}"

    def _last_line(self, status: int) -> str:
        """Of a Python program that ended by an exception this is the exception."""
        lines = self._output.decode(errors="replace").split("\n")
        line = next(filter(None, map(str.strip, reversed(lines))), "")
        return f": {line[:MAX_REASON]}" if status > 0 and line else ""

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    """Ours; with our import path, and one thread per numeric library unless the user says more."""
    path = [os.path.abspath(entry) for entry in sys.path]
    if os.getcwd() not in path:
        path.append(os.getcwd())
    ours = {f"{library}_NUM_THREADS": "1" for library in _ONE_THREAD}
    # DeepMind Lab's level compiler would take a thread per core.
    ours["LP_NUM_THREADS"] = "0"
    return ours | os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def _how(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
