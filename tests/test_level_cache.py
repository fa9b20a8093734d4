"""The level cache: shared by processes, bounded, and never worse than no cache."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asyncagent.envs import level_cache
from asyncagent.envs.level_cache import LevelCache

MB = 1_000_000


@pytest.fixture(autouse=True)
def _nobody_complained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(level_cache, "_complained", set())


def made(tmp_path: Path, content: bytes, name: str = "made.pk3") -> str:
    """A compiled level's path."""
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.level"))


def used(cache: LevelCache, key: str, hours_ago: float) -> None:
    """Pretend that the level of ``key`` was last used then."""
    past_s = time.time() - 3600 * hours_ago
    os.utime(cache._path(key), (past_s, past_s))


def test_what_was_written_is_fetched(tmp_path: Path) -> None:
    """A level written by one object is copied out by another; an unknown key is a miss."""
    content = os.urandom(100_000)
    writer, reader = (LevelCache(tmp_path / "a" / "cache", MB) for _ in range(2))
    target = tmp_path / "fetched.pk3"
    assert not reader.fetch("maze_noaas_1", str(target)) and not target.exists()
    assert writer.write("maze_noaas_1", made(tmp_path, content))
    assert reader.fetch("maze_noaas_1", str(target)) and target.read_bytes() == content
    assert not reader.fetch("maze_noaas_2", str(target))
    assert (reader.hits, reader.misses, writer.writes) == (1, 2, 1)
    assert reader.contents() == (1, 100_032)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "fetched.pk3", "made.pk3"]


def test_fetch_replaces_an_older_level(tmp_path: Path) -> None:
    """A level already at the path is replaced whole, not written into."""
    cache = LevelCache(tmp_path / "cache", MB)
    cache.write("key", made(tmp_path, b"new"))
    target = tmp_path / "there.pk3"
    target.write_bytes(b"an older and longer one")
    with target.open("rb") as reading:
        assert cache.fetch("key", str(target))
        assert reading.read() == b"an older and longer one"
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize(
    "key", ["../../escape", "/etc/passwd", "..", ".", "", "a/b", "x" * 5000, "nul\0", "ключ", "a b"]
)
def test_no_key_escapes(tmp_path: Path, key: str) -> None:
    """Whatever the key, its level is stored, found again, and nothing else is touched."""
    folder = tmp_path / "outer" / "cache"
    cache = LevelCache(folder, MB)
    assert cache.write(key, made(tmp_path, b"content"))
    assert cache.fetch(key, str(tmp_path / "fetched"))
    assert (tmp_path / "fetched").read_bytes() == b"content"
    assert len(entries(folder)) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fetched", "made.pk3", "outer"]
    assert [p.name for p in (tmp_path / "outer").iterdir()] == ["cache"]


def test_alike_keys_are_different(tmp_path: Path) -> None:
    """Keys that would give the same file name do not share a level."""
    cache = LevelCache(tmp_path / "cache", MB)
    keys = ["a/b", "a_b", "a b", "a" * 200 + "1", "a" * 200 + "2"]
    for key in keys:
        assert cache.write(key, made(tmp_path, key.encode()))
    for key in keys:
        assert cache.fetch(key, str(tmp_path / "out"))
        assert (tmp_path / "out").read_bytes() == key.encode()


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "digest", "swapped"])
def test_damaged_levels_are_never_served(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that is not what was written is a miss, is removed, and can be written anew."""
    cache = LevelCache(tmp_path / "cache", MB)
    cache.write("key", made(tmp_path, b"x" * 10_000))
    (path,) = entries(tmp_path / "cache")
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[:5000],
            "emptied": b"",
            "flipped": content[:-1] + b"y",
            "digest": b"\0" + content[1:],
            "swapped": b"x" * 10_000,
        }[damage]
    )
    target = tmp_path / "out"
    assert not cache.fetch("key", str(target)) and not target.exists()
    assert "damaged" in caplog.text
    assert entries(tmp_path / "cache") == []
    assert cache.write("key", made(tmp_path, b"x" * 10_000)) and cache.fetch("key", str(target))


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    """Beyond the limit, the levels not fetched for longest are removed, down to nine tenths."""
    cache = LevelCache(tmp_path / "cache", 10 * 1032)
    for i in range(10):
        assert cache.write(f"level {i}", made(tmp_path, bytes(1000)))
        used(cache, f"level {i}", hours_ago=100 - i)
    assert cache.contents() == (10, 10 * 1032)
    assert cache.fetch("level 0", str(tmp_path / "out"))
    assert cache.write("level 10", made(tmp_path, bytes(1000)))
    kept = {i for i in range(11) if cache.fetch(f"level {i}", str(tmp_path / "out"))}
    assert kept == {0, 2, 3, 4, 5, 6, 7, 8, 9, 10}
    assert cache.contents().size <= 10 * 1032


def test_size_never_exceeds_the_limit(tmp_path: Path) -> None:
    """However many levels of whatever size are written, by whichever object."""
    limit = 50_000
    for i in range(200):
        cache = LevelCache(tmp_path / "cache", limit)
        assert cache.write(f"level {i}", made(tmp_path, bytes(1 + (i * 7919) % 20_000)))
        on_disk = sum(path.stat().st_size for path in entries(tmp_path / "cache"))
        assert on_disk <= limit, f"after level {i}"
        assert cache.fetch(f"level {i}", str(tmp_path / "out"))


def test_too_large_a_level_is_not_kept(tmp_path: Path) -> None:
    """A level that would fill more than the whole cache evicts nobody."""
    cache = LevelCache(tmp_path / "cache", 2000)
    assert cache.write("small", made(tmp_path, bytes(1000)))
    assert not cache.write("large", made(tmp_path, bytes(3000)))
    assert cache.fetch("small", str(tmp_path / "out"))


@pytest.mark.parametrize("ledger", [b"", b"rubbish", b"9" * 25, None])
def test_a_wrong_sum_is_put_right(tmp_path: Path, ledger: bytes | None) -> None:
    """A sum of sizes that is lost, unreadable or too large costs a count of the files, no level."""
    cache = LevelCache(tmp_path / "cache", 10_000)
    for i in range(3):
        cache.write(f"level {i}", made(tmp_path, bytes(1000)))
    lock = tmp_path / "cache" / ".lock"
    lock.unlink() if ledger is None else lock.write_bytes(ledger)
    assert cache.write("level 3", made(tmp_path, bytes(1000)))
    assert cache.contents() == (4, 4 * 1032) and int(lock.read_bytes()) == 4 * 1032


def test_read_only_cache_still_serves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that cannot be written to is told once, and what is in it is fetched."""
    cache = LevelCache(tmp_path / "cache", MB)
    cache.write("key", made(tmp_path, b"content"))
    # A folder where the lock should be stops root too, whom permissions do not.
    (tmp_path / "cache" / ".lock").unlink()
    (tmp_path / "cache" / ".lock").mkdir()
    for again in range(3):
        assert not cache.write(f"other {again}", made(tmp_path, b"content"))
        assert cache.fetch("key", str(tmp_path / "out"))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(tmp_path / "cache") in caplog.text


def test_a_full_disk_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No room for the cache, then none for the level's copy: told once each, no file left."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    cache = LevelCache(tmp_path / "cache", MB)
    cache.write("key", made(tmp_path, bytes(100_000)))
    content = made(tmp_path, b"other")

    def full(path: Path, data: bytes) -> int:
        path.touch()
        with open("/dev/full", "wb", buffering=0) as device:
            return device.write(data)

    monkeypatch.setattr(Path, "write_bytes", full)
    for _ in range(3):
        assert not cache.write("other", content)
        assert not cache.fetch("key", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "cache").iterdir() if "incoming" in p.name] == []
    assert len(caplog.records) == 2 and caplog.text.count("No space left on device") == 2


def test_folder_that_cannot_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A cache folder below a file is told, not raised; nothing is there."""
    (tmp_path / "file").write_text("")
    cache = LevelCache(tmp_path / "file" / "cache", MB)
    assert not cache.write("key", made(tmp_path, b"content"))
    assert not cache.fetch("key", str(tmp_path / "out"))
    assert len(caplog.records) == 2


def test_vanished_level_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A path to write from, or a folder to fetch into, that is not there raises nothing."""
    cache = LevelCache(tmp_path / "cache", MB)
    assert not cache.write("key", str(tmp_path / "nowhere.pk3"))
    cache.write("key", made(tmp_path, b"content"))
    assert not cache.fetch("key", str(tmp_path / "no" / "folder.pk3"))
    assert len(caplog.records) == 2


def test_a_writer_that_never_lets_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Behind a lock that is never released a level is not kept, and that is all."""
    cache = LevelCache(tmp_path / "cache", MB, lock_timeout_s=0.05)
    cache.write("key", made(tmp_path, b"content"))
    with (tmp_path / "cache" / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not cache.write("other", made(tmp_path, b"content"))
        assert cache.fetch("key", str(tmp_path / "out"))
    assert "locked" in caplog.text
    assert cache.write("other", made(tmp_path, b"content"))


def test_nothing_is_made_before_it_is_needed(tmp_path: Path) -> None:
    """Making, asking and counting leave no folder behind."""
    cache = LevelCache(tmp_path / "cache", MB)
    assert cache.contents() == (0, 0) and not cache.fetch("key", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


WRITER = """
import hashlib, os, sys
from pathlib import Path
from asyncagent.envs.level_cache import LevelCache

folder, name, limit = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
cache = LevelCache(folder / "cache", limit)
print("ready", flush=True)
sys.stdin.readline()
for i in range(150):
    key = f"level {i % 40}"
    # Of the same key everybody writes the same bytes, as everybody compiles the same map.
    content = hashlib.sha256(key.encode()).digest() * (200 + i % 40)
    made = folder / f"{name}.pk3"
    made.write_bytes(content)
    assert cache.write(key, str(made)), key
    out = folder / f"{name}.out"
    key = f"level {(i * 7) % 40}"
    if cache.fetch(key, str(out)):
        got = out.read_bytes()
        assert got == hashlib.sha256(key.encode()).digest() * (len(got) // 32), key
print(cache.writes, cache.hits)
"""


def start_writer(folder: Path, name: str, limit: int) -> subprocess.Popen[str]:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), name, str(limit)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    return writer


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    """Of two processes that write the same levels and evict each other's, neither fails or reads
    anything but what was written, and the sum of sizes stays true and below the limit."""
    limit = 150_000
    writers = [start_writer(tmp_path, name, limit) for name in ("a", "b")]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        said, complained = writer.communicate(timeout=60)
        assert (writer.returncode, complained) == (0, "")
        writes, hits = map(int, said.split())
        assert writes == 150 and hits > 0
    cache = LevelCache(tmp_path / "cache", limit)
    counted = int((tmp_path / "cache" / ".lock").read_bytes())
    assert cache.contents().size <= counted <= limit
    for i in range(40):
        if cache.fetch(f"level {i}", str(tmp_path / "out")):
            digest = hashlib.sha256(f"level {i}".encode()).digest()
            assert (tmp_path / "out").read_bytes()[:32] == digest


def test_killed_writers_leave_a_good_cache(tmp_path: Path) -> None:
    """Processes killed in mid-write leave no lock, no damaged level and no growth behind."""
    limit = 150_000
    for _ in range(3):
        writer = start_writer(tmp_path, "a", limit)
        assert writer.stdin is not None and writer.stdout is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
        # Some of what it writes is there, and it is still at it (or at its end).
        while not entries(tmp_path / "cache"):
            assert writer.poll() is None
        writer.send_signal(signal.SIGKILL)
        writer.communicate(timeout=60)
    cache = LevelCache(tmp_path / "cache", limit)
    assert cache.write("level 1", made(tmp_path, hashlib.sha256(b"level 1").digest() * 300))
    for i in range(40):
        if cache.fetch(f"level {i}", str(tmp_path / "out")):
            digest = hashlib.sha256(f"level {i}".encode()).digest()
            assert set(chunks((tmp_path / "out").read_bytes())) == {digest}
    assert cache.misses + cache.hits == 40
    on_disk = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert on_disk <= limit + 20_000


def chunks(content: bytes) -> list[bytes]:
    return [content[i : i + 32] for i in range(0, len(content), 32)]
