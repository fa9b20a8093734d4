"""Checkpoints: what is written is read back; damage falls back, loudly; nothing is unpickled."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncagent.checkpoint import KEEP, checkpoint_paths, load_checkpoint, save_checkpoint
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


def test_only_the_newest_stay(tmp_path: Path) -> None:
    """Older checkpoints than the newest few are removed, and nothing half-written is left."""
    for frames in range(KEEP + 3):
        save_checkpoint(tmp_path, state(frames))
    assert [path.name for path in checkpoint_paths(tmp_path)] == [
        f"checkpoint_{frames:015}.pt" for frames in (5, 4, 3)
    ]
    assert len(list(tmp_path.iterdir())) == KEEP


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


def test_another_format_is_not_loaded(tmp_path: Path) -> None:
    """A checkpoint of a future format is not taken for one of ours."""
    torch.save({"format": 999, "frames": 1}, tmp_path / "checkpoint_000000000000001.pt")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
