"""A temporary folder per process, which does not outlive it by much, however it ends.

DeepMind Lab keeps every environment's files in a folder below ``TMPDIR``, and leaves it there when
its process is killed.  So each process gets a folder of its own, locked as long as it lives, in
which engines make theirs; whoever comes next removes the folders that nobody holds any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@functools.cache
def _scratch_folder(parent: str) -> str:
    """This process's folder below ``parent``; removes those of processes that are gone."""
    shared = Path(parent) / f"asyncagent-{os.getuid()}"
    shared.mkdir(mode=0o700, exist_ok=True)
    if shared.lstat().st_uid != os.getuid():
        return parent
    guard = _lock(shared, wait=True)
    try:
        for folder in shared.iterdir():
            with contextlib.suppress(OSError):
                held = _lock(folder, wait=False)
                shutil.rmtree(folder, ignore_errors=True)
                os.close(held)
        mine = tempfile.mkdtemp(dir=shared, prefix=f"{os.getpid()}-")
        # Never closed: the kernel lets go of it when the process is gone, killed or not.
        _lock(Path(mine), wait=False)
        return mine
    finally:
        os.close(guard)


def _lock(folder: Path, *, wait: bool) -> int:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def scratch_folder() -> Iterator[None]:
    """Within it, engines that ask the environment where to put files are sent to the folder."""
    # The first of the two wins where an engine asks for both.
    variable = "TEST_TMPDIR" if "TEST_TMPDIR" in os.environ else "TMPDIR"
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
