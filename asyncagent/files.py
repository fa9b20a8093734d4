"""Files that survive: written beside and renamed into place, or grown without torn ends.

A disk that is full, read-only or gone is told once per trouble, not once per attempt, and ends
nothing: what cannot be written now is tried again by the next attempt.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MAX_WAITING = 1000
"""Writes that a ``GrowingFile`` keeps while it cannot write; older ones are given up."""

_log = logging.getLogger(__name__)


class Attempts:
    """Writes of one kind, of which any may fail without ending the run."""

    def __init__(self, path: Path) -> None:
        """``path`` is what the warnings name."""
        self.failure = ""
        """What went wrong with the last attempt, in a few words; empty if nothing did."""
        self._path = path

    def make(self, write: Callable[[], object]) -> bool:
        """Whether ``write()`` raised no OSError."""
        try:
            write()
        except OSError as error:
            failure = error.strerror or str(error)
            if failure != self.failure:
                _log.warning(
                    "%s cannot be written (%s); the run goes on, and tries again",
                    self._path,
                    failure,
                )
            self.failure = failure
            return False
        if self.failure:
            _log.warning("%s can be written again", self._path)
            self.failure = ""
        return True


class GrowingFile:
    """A file that only grows, as a whole write or not at all, and is made anew where it vanished.

    Writes that failed wait, ``MAX_WAITING`` at most, for the next to succeed.
    """

    def __init__(
        self, path: Path, head: bytes = b"", prepare: Callable[[], None] = lambda: None
    ) -> None:
        """Opens nothing yet.

        Args:
          head: what an empty file begins with.
          prepare: called before the file is opened; it may raise OSError.
        """
        self._path = path
        self._head = head
        self._prepare = prepare
        self._attempts = Attempts(path)
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._file: io.FileIO | None = None

    def append(self, data: bytes) -> bool:
        """Write ``data`` after all that waits; False, and a warning, where that failed."""
        self._waiting.append(data)
        return self._attempts.make(self._write_waiting)

    def close(self) -> None:
        """Write what waits, if that can be done, and close; harmless when repeated."""
        if self._waiting:
            self._attempts.make(self._write_waiting)
        self._let_go()

    def _write_waiting(self) -> None:
        if self._file is None or _vanished(self._file, self._path):
            self._let_go()
            self._prepare()
            self._file = self._path.open("ab", buffering=0)
        if self._head and not os.fstat(self._file.fileno()).st_size:
            self._write(self._file, self._head)
        while self._waiting:
            self._write(self._file, self._waiting[0])
            self._waiting.popleft()

    def _write(self, file: io.FileIO, data: bytes) -> None:
        size = os.fstat(file.fileno()).st_size
        view = memoryview(data)
        try:
            while view:
                view = view[file.write(view) :]  # a disk that fills up takes a part
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise

    def _let_go(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def write_beside(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file durably, so that whatever happens leaves the old one or the new one.

    OSError where it cannot be done; nothing of the attempt is left then, if that can be done.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def check_writable(path: Path) -> None:
    """OSError where ``write_beside`` could not write a file now; leaves things as they are."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb", buffering=0) as file:
        try:
            file.write(bytes(1 << 16))  # a full disk still takes empty files
        finally:
            beside.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """``write_beside`` of a small text, in UTF-8."""
    write_beside(path, [text.encode()])


def parse_json(text: str) -> Any:
    """What ``json.loads`` makes of it; ValueError where it is no JSON, nested too deep included."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _vanished(file: io.FileIO, path: Path) -> bool:
    """Whether ``path`` is not the file that is open any more."""
    try:
        return not os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
