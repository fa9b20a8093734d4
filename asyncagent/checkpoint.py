"""Checkpoints: written beside and renamed into place, read without running anything from them.

A file is what torch.save makes of the state, and 16 bytes behind it: a mark and the CRC-32 of the
rest, without which a flipped bit of a weight would be loaded as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from asyncagent.errors import CheckpointError, UsageError
from asyncagent.files import write_beside

FORMAT = 2
"""Format 1 had no checksum and no episode statistics; it is read, too."""
BEST = "best.pt"
"""Name of the file with the best mean return so far."""
NEWEST = "newest"

_NAME = re.compile(r"checkpoint_(\d+)(_kept)?\.pt")
_SUM = struct.Struct("<12sI")
_MARK = b"asyncagentCK"
_ENTRIES = {"frames": int, "config": str, "net": dict}
"""What every checkpoint has."""
_log = logging.getLogger(__name__)


def checkpoint_paths(logdir: Path) -> list[Path]:
    """The numbered checkpoints of a run, newest (most frames) first."""
    found = []
    for path in logdir.glob("checkpoint_*.pt"):
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def save_checkpoint(
    logdir: Path, state: dict[str, Any], keep: int = 3, for_good: bool = False
) -> Path:
    """Write ``state`` (tensors, numbers, strings, lists, dicts; with its ``frames``) atomically.

    A crash at any moment leaves the older checkpoints as they were; OSError where it cannot be
    written.

    Args:
      keep: so many of the newest stay, this one among them.
      for_good: this one is never removed.
    """
    for old in logdir.glob("*.pt.tmp"):  # of a session that died while it wrote
        with contextlib.suppress(OSError):
            old.unlink(missing_ok=True)
    frames = state["frames"]
    plain, kept = (logdir / f"checkpoint_{frames:015}{name}.pt" for name in ("", "_kept"))
    path = kept if for_good or kept.exists() else plain
    write_state(path, state)
    # Files of more frames than this one are damaged, or it would have been resumed from them:
    # they must not push this one out.
    past = [old for old in checkpoint_paths(logdir) if _frames_of(old) <= frames]
    for old in {*past[keep:], plain} - {path}:
        if not old.stem.endswith("_kept"):
            with contextlib.suppress(OSError):
                old.unlink(missing_ok=True)
    return path


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write one checkpoint file; OSError where that cannot be done, and nothing changed then."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    content = buffer.getbuffer()
    write_beside(path, [content, _SUM.pack(_MARK, zlib.crc32(content))])


def load_checkpoint(logdir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest readable checkpoint of a run and its path; None where there is none at all.

    A damaged file is passed over with a warning; the best one is the last to be tried.

    Raises:
      CheckpointError: there are checkpoints, but none can be read, or the newest that is not
        damaged is of another format.
    """
    best = logdir / BEST
    paths = [*checkpoint_paths(logdir), *([best] if best.exists() else [])]
    if not paths:
        return None
    for path in paths:
        try:
            return path, _read(path)
        except _Damaged as error:
            _log.warning("%s cannot be read (%s); trying the one before it", path, error)
    raise CheckpointError(
        f"{logdir}: none of its {len(paths)} checkpoints can be read; "
        "use another --logdir, or remove them to start afresh"
    )


def choose_checkpoint(logdir: Path, which: str) -> tuple[Path, dict[str, Any]]:
    """A checkpoint to look at, and its path.

    Args:
      which: ``newest``, ``best``, or the name of a file in ``logdir`` or anywhere else.

    Raises:
      CheckpointError: it is not there, or cannot be read.
    """
    if which == NEWEST:
        found = load_checkpoint(logdir)
        if found is None:
            raise CheckpointError(f"no checkpoint in {logdir}: give the --logdir of a training run")
        return found
    path = logdir / (BEST if which == "best" else which)
    if not path.is_file():
        names = [path.name for path in checkpoint_paths(logdir)]
        if not names:
            raise CheckpointError(f"no checkpoint in {logdir}: give the --logdir of a training run")
        raise CheckpointError(
            f"{path} is not there: --checkpoint must be newest, best or one of {', '.join(names)}"
        )
    try:
        return path, _read(path)
    except _Damaged as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None


def read_best_return(logdir: Path) -> float | None:
    """Mean return that the best checkpoint was kept for; None if there is none to be read."""
    path = logdir / BEST
    if not path.exists():
        return None
    try:
        return float(_read(path)["episode_return_mean"])
    except (_Damaged, CheckpointError, KeyError) as error:
        _log.warning("%s cannot be read (%s); the next good one replaces it", path, error)
        return None


class _Damaged(Exception):
    """A file is no whole checkpoint; the message says in a few words why."""


def _read(path: Path) -> dict[str, Any]:
    """The state in one file.

    Raises:
      _Damaged: it is no whole checkpoint.
      CheckpointError: it is one of another format.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _Damaged(error.strerror) from None
    body, end = memoryview(content)[: -_SUM.size], content[-_SUM.size :]
    summed = len(end) == _SUM.size and end.startswith(_MARK)
    if summed and _SUM.unpack(end)[1] != zlib.crc32(body):
        raise _Damaged("its checksum is wrong")
    try:
        state = torch.load(
            io.BytesIO(body if summed else content), map_location="cpu", weights_only=True
        )
    except Exception as error:
        # Whatever a damaged file makes of the reader, the one before it may be whole.
        raise _Damaged(str(error).strip().split("\n")[0]) from None
    found = state.get("format") if isinstance(state, dict) else None
    if not isinstance(found, int) or (found == FORMAT and not summed):
        raise _Damaged("it has no checksum" if found == FORMAT else "it is no checkpoint")
    if not 1 <= found <= FORMAT:
        raise CheckpointError(
            f"{path} is of checkpoint format {found}, and this asyncagent reads 1 to {FORMAT}: "
            "use a newer one, or another --logdir"
        )
    for name, kind in _ENTRIES.items():
        if not isinstance(state.get(name), kind):
            raise _Damaged(f"it has no {name}")
    return dict(state)


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


def _frames_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
