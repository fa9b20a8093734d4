"""The processes of a trial: each started, and started again, with one and the same command line."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from asyncagent.keys import make_keys
from endurance.counted_net import FOLDER
from endurance.processes import MARK, look

ROOT = Path(__file__).resolve().parent.parent.parent
LEASH = "asyncagent.bench.leash"
"""However the trial ends, its programs do not outlive it."""
TICK_S = 0.2
DISK_MB = 256

# Below them the kernel takes none for connections, which would keep a learner from its port.
_PORTS = range(20_000, 32_000)


class Broken(Exception):
    """What was to be shown does not hold; the message says what."""


async def until(found: Callable[[], object], within_s: float, what: str) -> None:
    """Wait for what other processes do; Broken, with ``what``, if it does not come."""
    deadline_s = time.monotonic() + within_s
    while not found():
        if time.monotonic() > deadline_s:
            raise Broken(f"{what} within {within_s:.0f} s")
        await asyncio.sleep(TICK_S)


class Program:
    """One program, and its process if it runs."""

    def __init__(self, place: Place, name: str, workers: int, *arguments: str) -> None:
        """``workers``: worker processes that it should have."""
        self.name = name
        self.workers = workers
        self.log = place.folder / f"{name}.log"
        self._command = [sys.executable, "-m", LEASH, "asyncagent", *arguments]
        self._place = place
        self._popen: subprocess.Popen[bytes] | None = None
        self._log_from = 0

    def start(self) -> None:
        """As a user would, or systemd."""
        assert self.status is not None, f"{self.name} runs"
        with self.log.open("ab") as log:
            self._log_from = log.tell()
            self._popen = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._place.cwd,
                env=self._place.environment,
                process_group=0,  # Ctrl-C is the supervisor's
            )

    @property
    def pid(self) -> int:
        """Of the process, also when it has ended."""
        return 0 if self._popen is None else self._popen.pid

    @property
    def status(self) -> int | None:
        """None while it runs, else how it ended."""
        return 0 if self._popen is None else self._popen.poll()

    @property
    def said(self) -> str:
        """What it printed since it was started last."""
        with contextlib.suppress(FileNotFoundError), self.log.open("rb") as log:
            log.seek(self._log_from)
            return log.read().decode(errors="replace")
        return ""

    def signal(self, number: signal.Signals) -> None:
        """Harmless if it has ended."""
        if self._popen is not None:
            self._popen.send_signal(number)

    async def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.signal(signal.SIGKILL)
        await until(lambda: self.status is not None, 30, f"{self.name} did not die")
        self._hang_up()

    async def end(self, within_s: float) -> None:
        """SIGTERM; Broken unless it ends with status 0 in time."""
        self.signal(signal.SIGTERM)
        await until(lambda: self.status is not None, within_s, f"{self.name} did not end")
        self._hang_up()
        if self.status:
            raise Broken(f"{self.name} was asked to end: {self.obituary()}")

    def obituary(self) -> str:
        """How it ended, and the last it said."""
        lines = [line for line in self.said.splitlines() if line.strip()]
        return f"{self.name} ended with status {self.status}: {lines[-1] if lines else ''}"

    def _hang_up(self) -> None:
        if self._popen is not None and self._popen.stdin is not None:
            self._popen.stdin.close()


class Place:
    """Folders, environment and disks of a trial."""

    def __init__(self, folder: Path, has_mounts: bool, seed: int, patience: float = 1.0) -> None:
        """Make the folders.

        Args:
          has_mounts: we have a mount namespace of our own.
          seed: of the ports.
          patience: everything may take so many times longer.
        """
        self.folder = folder
        self.patience = patience
        self.mark = uuid.uuid4().hex
        self.has_mounts = has_mounts
        self.cwd, self.learned, self.temporary = (
            self._made(name) for name in ("cwd", "learned", "tmp")
        )
        self._mounted: list[Path] = []
        self._random = random.Random(f"ports {seed}")
        path = (ROOT / "scripts" / "endurance" / "hook", ROOT, ROOT / "scripts")
        self.environment: Mapping[str, str] = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.temporary),
            FOLDER: str(self.learned),
            MARK: self.mark,
        }

    def _made(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True)
        return path

    def disk(self, name: str) -> Path:
        """A folder on a small disk of its own, where we may mount one."""
        path = self._made(f"{name}/run")
        if self.has_mounts:
            mount(path, DISK_MB)
            self._mounted.append(path)
        return path

    def unmount(self) -> None:
        """Let the disks go, with all that is on them."""
        while self._mounted:
            subprocess.run(["umount", "--lazy", str(self._mounted.pop())], check=False)

    def keys(self, run: str, hosts: list[str]) -> Path:
        """Keys of a learner, of its hosts, and of a stranger that is allowed as well."""
        folder = self._made(f"{run}/keys")
        (folder / "allowed").mkdir()
        make_keys(folder, "learner")
        for name in (*hosts, "stranger"):
            public, _ = make_keys(folder, name)
            shutil.copy(public, folder / "allowed")
        return folder

    def port(self) -> int:
        """That nobody listens on."""
        while True:
            port = self._random.choice(_PORTS)
            with socket.socket() as trial, contextlib.suppress(OSError):
                trial.bind(("127.0.0.1", port))
                return port

    def kill_all(self) -> None:
        """Every process that carries the mark."""
        for pid in look(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def mount(path: Path, size_mb: int) -> None:
    """A small tmpfs; RuntimeError where we may not."""
    options = f"size={size_mb}m"
    result = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True
    )
    if result.returncode:
        raise RuntimeError(f"mount {path}: {result.stderr.strip()}")
