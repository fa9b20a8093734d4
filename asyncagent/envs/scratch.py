"""Temporary folders that do not outlive their process by much, however it ends.

DeepMind Lab keeps every environment's files in a folder below ``TMPDIR``, and leaves it there when
its process is killed; ViZDoom wants a folder to start in.  So folders are made in one that all our
processes share, locked as long as they are used; whoever comes next removes those that nobody
holds any more.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder of one's own, removed at the end; where this process is killed, by the next one."""
    try:
        folder, held = _make(tempfile.gettempdir())
    except OSError:  # somebody else has our name there
        with tempfile.TemporaryDirectory() as alone:
            yield Path(alone)
        return
    try:
        yield folder
    finally:
        _remove(folder, held)


@contextlib.contextmanager
def scratch_folder() -> Iterator[None]:
    """Within it, engines that ask the environment where to put files are sent to a folder.

    It is this process's, and is removed when the process ends.
    """
    variable = _variable()
    before = os.environ.get(variable)
    try:
        folder = _scratch_folder(before or "/tmp")
    except OSError:
        yield
        return
    os.environ[variable] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def sweep() -> None:
    """Remove the folders of processes that are gone."""
    for parent in {tempfile.gettempdir(), os.environ.get(_variable()) or "/tmp"}:
        with contextlib.suppress(OSError):
            if (Path(parent) / _NAME).exists():
                with _shared(parent):
                    pass


_NAME = f"asyncagent-{os.getuid()}"


def _variable() -> str:
    # The first of the two wins where an engine asks for both.
    return "TEST_TMPDIR" if "TEST_TMPDIR" in os.environ else "TMPDIR"


@functools.cache
def _scratch_folder(parent: str) -> str:
    folder, held = _make(parent)
    atexit.register(_remove, folder, held)
    return str(folder)


def _make(parent: str) -> tuple[Path, int]:
    """A folder and the descriptor that holds it: the kernel lets go if the process is killed."""
    with _shared(parent) as shared:
        mine = Path(tempfile.mkdtemp(dir=shared, prefix=f"{os.getpid()}-"))
        return mine, _lock(mine, wait=False)


def _remove(folder: Path, held: int) -> None:
    with _shared(str(folder.parent.parent)):
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


@contextlib.contextmanager
def _shared(parent: str) -> Iterator[Path]:
    """The folder of all our processes, swept, and nobody else's meanwhile; removed if empty."""
    shared = Path(parent) / _NAME
    guard = _lock_shared(shared)
    try:
        for folder in shared.iterdir():
            with contextlib.suppress(OSError):
                held = _lock(folder, wait=False)
                shutil.rmtree(folder, ignore_errors=True)
                os.close(held)
        yield shared
    finally:
        with contextlib.suppress(OSError):  # unless there are folders in use
            shared.rmdir()
        os.close(guard)


def _lock_shared(shared: Path) -> int:
    while True:
        shared.mkdir(mode=0o700, exist_ok=True)
        try:
            if shared.lstat().st_uid != os.getuid():
                raise PermissionError(f"{shared} belongs to somebody else")
            guard = _lock(shared, wait=True)
        except FileNotFoundError:
            continue
        # Whoever had it before us may have removed it.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(guard).st_ino == shared.lstat().st_ino:
                return guard
        os.close(guard)


def _lock(folder: Path, *, wait: bool) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(folder, flags)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
