"""Temporary folders go with their process, or with the next one that comes."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncagent.envs import doom, scratch

ROOT = Path(__file__).resolve().parent.parent
WATCHDOG_S = 60

PROGRAM = """
import os, sys
from asyncagent.envs.scratch import scratch_folder, temporary_folder
with temporary_folder() as folder, scratch_folder():
    (folder / "file").touch()
    open(os.environ["TMPDIR"] + "/file", "w").close()
    print("up", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /tmp."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("TEST_TMPDIR", raising=False)
    return tmp_path


@pytest.fixture
def other(temporary: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which has two folders there."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        yield process
        process.kill()


def test_an_orderly_end_leaves_nothing(temporary: Path, other: subprocess.Popen[str]) -> None:
    """Not even the folder that all share."""
    assert len(list(temporary.rglob("file"))) == 2
    other.communicate("end\n", timeout=WATCHDOG_S)
    assert list(temporary.iterdir()) == []


def test_the_next_one_removes_what_the_killed_one_left(
    temporary: Path, other: subprocess.Popen[str]
) -> None:
    """As long as its process lives a folder is left alone, whoever comes."""
    with scratch.temporary_folder():
        pass
    scratch.sweep()
    assert len(list(temporary.rglob("file"))) == 2
    other.kill()
    other.wait(WATCHDOG_S)
    assert len(list(temporary.rglob("file"))) == 2
    with scratch.temporary_folder() as mine:
        assert list(temporary.rglob("file")) == []
        assert [path.name for path in mine.parent.iterdir()] == [mine.name]
    assert list(temporary.iterdir()) == []


def test_sweep(temporary: Path, other: subprocess.Popen[str]) -> None:
    """A sweep alone does it, too; where there is nothing it makes nothing."""
    other.kill()
    other.wait(WATCHDOG_S)
    scratch.sweep()
    assert list(temporary.iterdir()) == []
    scratch.sweep()
    assert list(temporary.iterdir()) == []


def test_a_strangers_folder_is_not_used(temporary: Path) -> None:
    """A link of our name, planted by whoever can write there, is not followed."""
    target = temporary / "target"
    (target / "precious").mkdir(parents=True)
    (temporary / f"asyncagent-{os.getuid()}").symlink_to(target)
    with scratch.temporary_folder() as folder:
        assert folder.parent == temporary
    assert not folder.exists()
    scratch.sweep()
    assert (target / "precious").is_dir()


def test_leftover_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old, and mapped by nobody: such names of games' memory go, others stay."""
    monkeypatch.setattr(doom, "_SHARED", str(tmp_path / "ViZDoom"))
    used, young, old = (tmp_path / f"ViZDoomSM{name}" for name in ("used", "young", "old"))
    for path in (used, young, old):
        path.write_bytes(bytes(4096))
    for path in (used, old):
        os.utime(path, (1, 1))
    with used.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        doom._remove_leftovers()
    assert used.exists() and young.exists() and not old.exists()
    doom._remove_leftovers()
    assert not used.exists()
