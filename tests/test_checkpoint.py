"""Checkpoints: what is written is read back; damage falls back, loudly; nothing is unpickled."""

from __future__ import annotations

import errno
import io
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncagent.checkpoint import (
    BEST,
    checkpoint_paths,
    choose_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_state,
)
from asyncagent.errors import CheckpointError


def state(frames: int) -> dict[str, Any]:
    return {
        "frames": frames,
        "net": {"w": torch.full((1000,), float(frames))},
        "schedule": [0.1, 0, 10],
        "config": "{}",
    }


def test_round_trip(tmp_path: Path) -> None:
    """The newest checkpoint comes back with its tensors and numbers."""
    save_checkpoint(tmp_path, state(5))
    save_checkpoint(tmp_path, state(40))
    found = load_checkpoint(tmp_path)
    assert found is not None
    path, loaded = found
    assert path == checkpoint_paths(tmp_path)[0]
    assert loaded["frames"] == 40
    assert torch.equal(loaded["net"]["w"], torch.full((1000,), 40.0))


def names(logdir: Path) -> list[str]:
    return sorted(os.listdir(logdir))


def name(frames: int, kept: str = "") -> str:
    return f"checkpoint_{frames:015}{kept}.pt"


def test_only_the_newest_stay(tmp_path: Path) -> None:
    """Older checkpoints than the newest few are removed, and nothing half-written is left."""
    (tmp_path / "checkpoint_000000000000001.pt.tmp").write_bytes(b"half")
    for frames in range(6):
        save_checkpoint(tmp_path, state(frames), keep=2)
    assert [path.name for path in checkpoint_paths(tmp_path)] == [name(5), name(4)]
    assert names(tmp_path) == [name(4), name(5)]


def test_those_for_good_stay(tmp_path: Path) -> None:
    """They count among the newest while they are, and are never removed."""
    for frames in range(7):
        save_checkpoint(tmp_path, state(frames), keep=2, for_good=frames % 3 == 1)
    assert names(tmp_path) == [name(1, "_kept"), name(4, "_kept"), name(5), name(6)]
    found = load_checkpoint(tmp_path)
    assert found is not None and found[0].name == name(6)


@pytest.mark.parametrize("order", [(False, True), (True, False), (True, True)])
def test_of_two_with_the_same_frames_the_later_stays(
    tmp_path: Path, order: tuple[bool, bool]
) -> None:
    """A run that resumed and learned nothing leaves one file, for good if either was to be."""
    for number, for_good in enumerate(order):
        save_checkpoint(tmp_path, state(7) | {"number": number}, for_good=for_good)
    assert names(tmp_path) == [name(7, "_kept")]
    found = load_checkpoint(tmp_path)
    assert found is not None and found[1]["number"] == 1


def test_damaged_files_of_more_frames_push_no_readable_one_out(tmp_path: Path) -> None:
    """Resumed from an older one, a run's new checkpoints stay, and are what is resumed next."""
    for frames in (7, 8, 9):
        (tmp_path / name(frames)).write_bytes(b"rubbish")
    for frames in (4, 5, 6):
        save_checkpoint(tmp_path, state(frames), keep=1)
        found = load_checkpoint(tmp_path)
        assert found is not None and found[1]["frames"] == frames
    save_checkpoint(tmp_path, state(10), keep=1)
    assert names(tmp_path) == [name(10)]


def test_the_best_is_the_last_resort(tmp_path: Path) -> None:
    """Where every other is damaged, a run resumes from its best; a test plays it by its name."""
    write_state(tmp_path / BEST, state(3))
    save_checkpoint(tmp_path, state(5))
    assert choose_checkpoint(tmp_path, "newest")[1]["frames"] == 5
    for which in ("best", BEST, str(tmp_path / BEST)):
        path, found = choose_checkpoint(tmp_path, which)
        assert (path, found["frames"]) == (tmp_path / BEST, 3)
    (tmp_path / name(5)).write_bytes(b"rubbish")
    assert choose_checkpoint(tmp_path, "newest")[1]["frames"] == 3


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The message says which there are; a damaged one is not taken for another."""
    for which in ("newest", "best", name(5)):
        with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}"):
            choose_checkpoint(tmp_path, which)
    save_checkpoint(tmp_path, state(5))
    with pytest.raises(CheckpointError, match=rf"best.pt is not there: .* {name(5)}"):
        choose_checkpoint(tmp_path, "best")
    (tmp_path / BEST).write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match=r"best\.pt cannot be read"):
        choose_checkpoint(tmp_path, "best")


def test_a_failed_save_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes no more costs none of the checkpoints there are."""
    for frames in (1, 2):
        save_checkpoint(tmp_path, state(frames), keep=2)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, state(3), keep=1)
    assert names(tmp_path) == [name(1), name(2)]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.97])
def test_truncated_newest_falls_back_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, share: float
) -> None:
    """A newest checkpoint that was cut off is passed over for the one before it."""
    save_checkpoint(tmp_path, state(1))
    newest = save_checkpoint(tmp_path, state(2))
    content = newest.read_bytes()
    newest.write_bytes(content[: int(len(content) * share)])
    with caplog.at_level(logging.WARNING):
        found = load_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["frames"] == 1
    assert newest.name in caplog.text


def test_no_checkpoint_is_none_but_only_broken_ones_are_an_error(tmp_path: Path) -> None:
    """An empty folder is a fresh start; a folder of unreadable checkpoints is not."""
    assert load_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint_000000000000001.pt").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints can be read"):
        load_checkpoint(tmp_path)


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path("evil"),))  # type: ignore[return-value]


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that would run code when unpickled is refused, and runs nothing."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint_000000000000001.pt"
    path.write_bytes(pickle.dumps({"format": 1, "frames": _Evil()}))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
    torch.save({"format": 1, "frames": _Evil()}, path)
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_a_newer_format_is_refused_by_its_number(tmp_path: Path) -> None:
    """It is not passed over: going on from an older one would throw its work away in silence."""
    save_checkpoint(tmp_path, state(1))
    write_state(tmp_path / name(2), state(2) | {"format": 999})
    with pytest.raises(CheckpointError, match="is of checkpoint format 999"):
        load_checkpoint(tmp_path)


def test_format_1_is_read(tmp_path: Path) -> None:
    """It had no checksum; one that says it has, and has not, is damaged."""
    torch.save({**state(1), "format": 1}, tmp_path / name(1))
    torch.save({**state(2), "format": 2}, tmp_path / name(2))
    found = load_checkpoint(tmp_path)
    assert found is not None and found[1]["frames"] == 1


def test_a_flipped_bit_of_a_weight_is_seen(tmp_path: Path) -> None:
    """The reader of tensors would not mind; the checksum does."""
    save_checkpoint(tmp_path, state(1))
    newest = save_checkpoint(tmp_path, state(2))
    content = bytearray(newest.read_bytes())
    weights = torch.full((1000,), 2.0).numpy().tobytes()
    content[content.index(weights) + 2002] ^= 1
    torch.load(io.BytesIO(content), weights_only=True)
    newest.write_bytes(content)
    found = load_checkpoint(tmp_path)
    assert found is not None and found[1]["frames"] == 1
