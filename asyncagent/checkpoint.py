"""Checkpoints: written beside and renamed into place, read without running anything from them."""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from asyncagent.errors import CheckpointError, UsageError

FORMAT = 1
KEEP = 3
"""How many of the newest checkpoints stay."""

_NAME = re.compile(r"checkpoint_(\d+)\.pt")
_log = logging.getLogger(__name__)


def checkpoint_paths(logdir: Path) -> list[Path]:
    """The checkpoints of a run, newest (most frames) first."""
    found = []
    for path in logdir.glob("checkpoint_*.pt"):
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def save_checkpoint(logdir: Path, state: dict[str, Any]) -> Path:
    """Write ``state`` (tensors, numbers, strings, lists, dicts; with its ``frames``) atomically.

    A crash at any moment leaves the older checkpoints as they were.
    """
    path = logdir / f"checkpoint_{state['frames']:015}.pt"
    beside = path.with_suffix(".tmp")
    with beside.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    _sync_folder(logdir)
    for old in (*checkpoint_paths(logdir)[KEEP:], *logdir.glob("checkpoint_*.tmp")):
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(logdir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest readable checkpoint of a run and its path; None where there is none at all.

    A file that cannot be read is passed over with a warning.

    Raises:
      CheckpointError: there are checkpoints, but none can be read.
    """
    paths = checkpoint_paths(logdir)
    if not paths:
        return None
    for path, state in _readable(paths):
        return path, state
    raise CheckpointError(
        f"{logdir}: none of its {len(paths)} checkpoints can be read; "
        "use another --logdir, or remove them to start afresh"
    )


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a crash leaves the old one or the new one, never a part."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


@contextmanager
def locked(logdir: Path) -> Iterator[None]:
    """Hold a run's folder; UsageError if another live process holds it."""
    with (logdir / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another run is writing to logdir={str(logdir)!r}: stop it, or use another"
            ) from None
        yield


def _readable(paths: list[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in paths:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            # Whatever a damaged file makes of the reader, the one before it may be whole.
            reason = str(error).strip().split("\n")[0]
            _log.warning("%s cannot be read (%s); trying the one before it", path, reason)
            continue
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            _log.warning("%s is not of checkpoint format %d; trying another", path, FORMAT)
            continue
        yield path, state


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
