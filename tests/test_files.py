"""Files that survive: whole or not at all, and a disk that fails is told once per trouble."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import asyncagent.files as files
from asyncagent.files import (
    MAX_WAITING,
    Attempts,
    GrowingFile,
    check_writable,
    replace_text,
    write_beside,
)
from tests.small_disk import fill, small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    with small_disk(tmp_path / "disk", 256) as folder:
        yield folder


def failing(number: int) -> Any:
    def write() -> None:
        raise OSError(number, os.strerror(number))

    return write


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_a_trouble_is_told_once_and_so_is_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same failure again is silent; another, the end of it, and a new one are told."""
    attempts = Attempts(tmp_path / "x")
    for _ in range(3):
        assert not attempts.make(failing(errno.ENOSPC))
    assert attempts.failure == "No space left on device"
    assert not attempts.make(failing(errno.EROFS))
    for _ in range(2):
        assert attempts.make(lambda: None)
    assert attempts.failure == ""
    assert not attempts.make(failing(errno.EROFS))
    told = warnings(caplog)
    assert len(told) == 4
    assert all(str(tmp_path / "x") in line for line in told)
    for line, words in zip(told, ("No space", "Read-only", "again", "Read-only"), strict=True):
        assert words in line


def test_what_is_no_matter_of_the_disk_is_raised(tmp_path: Path) -> None:
    """A defect of ours is not taken for a full disk."""

    def broken() -> None:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        Attempts(tmp_path).make(broken)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_replacement_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Where writing, fsync or rename fails, the old content stays and no part of the new."""
    path = tmp_path / "config.json"
    replace_text(path, "old")
    error = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*args: Any, **flags: Any) -> None:
        raise error

    monkeypatch.setattr(os if call == "fsync" else Path, call, refuse)
    with pytest.raises(OSError, match="No space left"):
        replace_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_full_disk_leaves_the_old_file_whole(disk: Path) -> None:
    """On a real full disk, too, and once there is space the next attempt succeeds."""
    path = disk / "checkpoint"
    write_beside(path, [b"old"])
    filler = fill(disk)
    with pytest.raises(OSError, match="No space left"):
        write_beside(path, [b"new" * 10_000])
    assert path.read_bytes() == b"old"
    assert sorted(os.listdir(disk)) == ["checkpoint", "filler"]
    filler.unlink()
    write_beside(path, [b"new" * 10_000])
    assert path.read_bytes() == b"new" * 10_000


def test_what_can_be_written_is_known_beforehand(disk: Path) -> None:
    """A full disk is told; whatever comes of it, the file and its folder stay what they were."""
    path = disk / "kept"
    path.write_text("old")
    check_writable(path)
    fill(disk)
    before = sorted(disk.iterdir())
    with pytest.raises(OSError, match="No space"):
        check_writable(path)
    assert sorted(disk.iterdir()) == before and path.read_text() == "old"


def test_a_growing_file_on_a_full_disk_loses_nothing(
    disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Lines that did not fit leave no part behind, wait, and are written in order later."""
    path = disk / "metrics.jsonl"
    growing = GrowingFile(path)
    lines = [f"{number:4000}\n".encode() for number in range(6)]
    assert growing.append(lines[0])
    filler = fill(disk)
    assert growing.append(b"short\n") or path.read_bytes() == lines[0]
    for line in lines[1:]:
        assert not growing.append(line)
        assert path.read_bytes() in (lines[0], lines[0] + b"short\n")
    filler.unlink()
    assert growing.append(b"last\n")
    growing.close()
    assert path.read_bytes() == lines[0] + b"short\n" + b"".join(lines[1:]) + b"last\n"
    told = warnings(caplog)
    assert len(told) == 2 and "No space" in told[0] and "again" in told[1]


def test_a_growing_file_that_vanished_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is written into a deleted file; when its folder is back, so is the file."""
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "events"
    prepared: list[bool] = []
    growing = GrowingFile(path, b"head ", lambda: prepared.append(path.exists()))
    assert growing.append(b"a")
    assert path.read_bytes() == b"head a"
    path.unlink()
    folder.rmdir()
    assert not growing.append(b"b")
    assert not growing.append(b"c")
    assert not folder.exists(), "it may be a disk that is not mounted now"
    folder.mkdir()
    assert growing.append(b"d")
    assert path.read_bytes() == b"head bcd"
    growing.close()
    growing.close()
    assert prepared == [False] * 4
    told = warnings(caplog)
    assert len(told) == 2 and "No such file" in told[0] and "again" in told[1]


def test_waiting_writes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that never comes back does not eat the memory: the oldest lines go."""
    growing = GrowingFile(tmp_path / "gone" / "file")
    monkeypatch.setattr(files, "_log", logging.getLogger("nobody"))
    for number in range(MAX_WAITING + 5):
        growing.append(b"%d\n" % number)
    (tmp_path / "gone").mkdir()
    growing.close()
    lines = (tmp_path / "gone" / "file").read_bytes().split()
    assert [int(line) for line in lines] == list(range(5, MAX_WAITING + 5))


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that took a part only is no whole one: the rest follows, or nothing stays of it."""
    growing = GrowingFile(tmp_path / "file")
    growing.append(b"line\n")
    failing_from = 10**9
    taken: list[int] = []

    class Short:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, data: memoryview) -> int:
            if len(taken) >= failing_from:
                raise OSError(errno.EIO, "Input/output error")
            taken.append(self._file.write(data[:2]))
            return taken[-1]

    monkeypatch.setattr(growing, "_file", Short(growing._file))
    assert growing.append(b"abcd\n") and len(taken) == 3
    assert (tmp_path / "file").read_bytes() == b"line\nabcd\n"
    failing_from = 4
    assert not growing.append(b"efgh\n")
    assert (tmp_path / "file").read_bytes() == b"line\nabcd\n"
    failing_from = 10**9
    assert growing.append(b"i\n")
    assert (tmp_path / "file").read_bytes() == b"line\nabcd\nefgh\ni\n"
    growing.close()
