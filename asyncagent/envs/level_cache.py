"""Compiled DeepMind Lab levels on disk, for every process and every run to share.

DeepMind Lab asks ``fetch(key, pk3_path)`` before it compiles a map, which takes seconds, and hands
over what it compiled with ``write(key, pk3_path)``.  It exits if ``fetch`` says True without the
file being there, and an exception of either comes out of the environment's ``reset``: so nothing
that is wrong with the disk may be worse than a map compiled once more.

An entry is one file: the BLAKE2 digest of the level, then the level.  It gets its name only when it
is whole, and a reader believes nothing whose digest does not fit.  Writers take turns by a lock on
the file ``.lock``, in which stands the sum of all sizes; whoever would exceed the limit first
removes the entries that were not fetched for longest.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

_SUFFIX = ".level"
_INCOMING = ".incoming"
_DIGEST_SIZE = 32
_KEEP = 0.9
"""Eviction goes on down to this share of the limit, so that not every write must evict."""

_log = logging.getLogger(__name__)
_complained: set[tuple[Path, str, type[Exception]]] = set()


class CacheContents(NamedTuple):
    """What is in a cache's folder."""

    num_levels: int
    size: int
    """Bytes."""


class LevelCache:
    """What ``deepmind_lab.Lab`` takes as ``level_cache``; every process makes its own.

    ``hits``, ``misses`` and ``writes`` count this object's own calls.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int, lock_timeout_s: float = 5.0):
        """Touches nothing yet.

        Args:
          folder: of the cache, made when first written to; ``~`` is the user's home.
          limit: bytes that all entries together may take.
          lock_timeout_s: how long to wait for other writers before a level is not kept.
        """
        self.folder = Path(folder).expanduser()
        self.hits = self.misses = self.writes = 0
        self._limit = limit
        self._lock_timeout_s = lock_timeout_s

    def fetch(self, key: str, pk3_path: str) -> bool:
        """Copy the level of ``key`` to ``pk3_path``; False, and no file, if it is not here whole.

        Raises nothing.
        """
        found = self._attempt("read", lambda: self._fetch(key, pk3_path))
        self.hits += found
        self.misses += not found
        return found

    def write(self, key: str, pk3_path: str) -> bool:
        """Keep the level at ``pk3_path`` under ``key``; False if that cannot be.

        Raises nothing.
        """
        written = self._attempt("write to", lambda: self._write(key, Path(pk3_path)))
        self.writes += written
        return written

    def contents(self) -> CacheContents:
        """What is there now; zeros if the folder is not."""
        sizes = [entry.size for entry in self._entries()]
        return CacheContents(len(sizes), sum(sizes))

    def _attempt(self, what: str, action: Callable[[], bool]) -> bool:
        try:
            return action()
        except Exception as error:
            # Once per process: a full disk would otherwise be told with every episode.
            complaint = (self.folder, what, type(error))
            if complaint not in _complained:
                _complained.add(complaint)
                reason = (isinstance(error, OSError) and error.strerror) or error
                _log.warning("cannot %s the level cache %s: %s", what, self.folder, reason)
            return False

    def _path(self, key: str) -> Path:
        # Whatever the key, its file stands in the folder, and no other key's file is the same.
        readable = re.sub(r"[^A-Za-z0-9_]", "_", key)[:80]
        digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return self.folder / f"{readable}-{digest}{_SUFFIX}"

    def _fetch(self, key: str, pk3_path: str) -> bool:
        path = self._path(key)
        try:
            entry = path.read_bytes()
        except FileNotFoundError:
            return False
        level = memoryview(entry)[_DIGEST_SIZE:]
        if len(entry) < _DIGEST_SIZE or _digest(level) != entry[:_DIGEST_SIZE]:
            path.unlink(missing_ok=True)
            _log.warning("a damaged level is removed from the level cache: %s", path)
            return False
        _put(level, Path(pk3_path + _INCOMING), Path(pk3_path))
        with contextlib.suppress(OSError):
            os.utime(path)
        return True

    def _write(self, key: str, pk3_path: Path) -> bool:
        level = pk3_path.read_bytes()
        size = len(level) + _DIGEST_SIZE
        if size > self._limit:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._ledger() as ledger:
            # Counted before it is there: a process that dies in between leaves the sum too large,
            # which the next eviction puts right, and never too small.
            total = _read_total(ledger)
            if total is None or total + size > self._limit:
                total = self._evict(self._limit - size)
            _write_total(ledger, total + size)
            _put(_digest(level) + level, self.folder / _INCOMING, self._path(key))
        return True

    @contextlib.contextmanager
    def _ledger(self) -> Iterator[int]:
        """The locked file of the sum of all sizes, as a file descriptor."""
        ledger = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            deadline_s = time.monotonic() + self._lock_timeout_s
            while True:
                try:
                    fcntl.flock(ledger, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    # A writer that was stopped in there must not stop everybody's training.
                    if time.monotonic() > deadline_s:
                        raise TimeoutError(f"locked for {self._lock_timeout_s:g} s") from None
                    time.sleep(0.01)
            yield ledger
        finally:
            os.close(ledger)

    def _evict(self, room: int) -> int:
        """Remove what was not used for longest until at most ``room`` bytes, and a tenth less than
        the limit, are taken; returns how many are. Only under the lock."""
        entries = sorted(self._entries(), key=lambda entry: entry.used_s)
        total = sum(entry.size for entry in entries)
        if total > room:
            for entry in entries:
                if total <= min(room, int(_KEEP * self._limit)):
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)
                total -= entry.size
        return total

    def _entries(self) -> Iterator[_Entry]:
        try:
            with os.scandir(self.folder) as files:
                for file in files:
                    if file.name.endswith(_SUFFIX):
                        with contextlib.suppress(FileNotFoundError):
                            status = file.stat(follow_symlinks=False)
                            yield _Entry(file.path, status.st_size, status.st_mtime)
        except FileNotFoundError:
            return


class _Entry(NamedTuple):
    path: str
    size: int
    used_s: float


def _digest(level: bytes | memoryview) -> bytes:
    return blake2b(level, digest_size=_DIGEST_SIZE).digest()


def _put(content: bytes | memoryview, beside: Path, path: Path) -> None:
    """``path`` has all of ``content`` or is as it was before."""
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _read_total(ledger: int) -> int | None:
    text = os.pread(ledger, 32, 0)
    return int(text) if text.isdigit() else None


def _write_total(ledger: int, total: int) -> None:
    os.pwrite(ledger, b"%020d" % total, 0)
    os.ftruncate(ledger, 20)
