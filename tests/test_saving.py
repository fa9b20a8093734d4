"""Saving and resuming: what stays, what may change, and runs on disks that fail."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import asyncagent.commands.train as train_command
from asyncagent import building, evaluate
from asyncagent.checkpoint import BEST, checkpoint_paths, load_checkpoint, write_state
from asyncagent.commands.train import configure
from asyncagent.config import LEARNING_FLAGS, TUNED_FLAGS, Config, resolve
from asyncagent.errors import CheckpointError, ConfigError
from asyncagent.learner import Learner
from asyncagent.loop import train
from asyncagent.metrics import MIN_GAMES
from asyncagent.saving import RETRY_S, Saver
from tests.small_disk import fill, small_disk


def config(logdir: Path, **flags: Any) -> Config:
    values: dict[str, Any] = {
        "logdir": str(logdir),
        "total_environment_frames": 2000,
        "report_interval_s": 0.05,
        "num_actors": 8,
        "num_groups": 2,
        "batch_size": 4,
        "unroll_length": 5,
    }
    return resolve("catch", **(values | flags))


def state(frames: int, mean: float = 0.0, games: int = 100) -> dict[str, Any]:
    return {
        "frames": frames,
        "net": {"w": torch.full((10,), float(frames))},
        "counters": {"episodes": [[]] * games},
        "episode_return_mean": mean,
    }


class FullDisk:
    """Writes to files of a folder fail, by way of fsync and of new files, while it is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self.refused = 0
        fsync, open_path = os.fsync, Path.open

        def broken_fsync(descriptor: int) -> None:
            self._check()
            fsync(descriptor)

        def broken_open(path: Path, mode: str = "r", *args: Any, **flags: Any) -> Any:
            if mode != "rb":
                self._check()
            return open_path(path, mode, *args, **flags)

        monkeypatch.setattr(os, "fsync", broken_fsync)
        monkeypatch.setattr(Path, "open", broken_open)

    def _check(self) -> None:
        if self.full:
            self.refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    return FullDisk(monkeypatch)


def best_in(logdir: Path) -> float | None:
    path = logdir / BEST
    return torch.load(path, weights_only=True)["episode_return_mean"] if path.exists() else None


def test_the_best_is_kept_across_sessions(tmp_path: Path) -> None:
    """Only a higher mean of enough games replaces it, also after a restart, nan never."""
    saver = Saver(config(tmp_path), tmp_path)
    steps = [(9.0, MIN_GAMES - 1, None), (2.0, MIN_GAMES, 2.0), (1.0, 100, 2.0), (3.0, 100, 3.0)]
    for frames, (mean, games, expected) in enumerate(steps):
        saver.save(state(frames, mean, games))
        assert best_in(tmp_path) == expected
    again = Saver(config(tmp_path), tmp_path)
    for frames, (mean, expected) in enumerate([(2.5, 3.0), (float("nan"), 3.0), (4.0, 4.0)], 10):
        again.save(state(frames, mean))
        assert best_in(tmp_path) == expected


def test_a_damaged_best_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is no reason not to start, and the next mean of enough games takes its place."""
    (tmp_path / BEST).write_bytes(b"rubbish")
    saver = Saver(config(tmp_path), tmp_path)
    assert "best.pt cannot be read" in caplog.text
    saver.save(state(1, -5.0))
    assert best_in(tmp_path) == -5.0


def test_every_so_many_stay_for_good_across_sessions(tmp_path: Path) -> None:
    """The count of saves goes on where the session before ended."""
    flags = config(tmp_path, keep_checkpoints=1, keep_every=3)
    saver = Saver(flags, tmp_path)
    for frames in range(1, 5):
        saver.save(state(frames))
    again = Saver(flags, tmp_path)
    found = load_checkpoint(tmp_path)
    assert found is not None
    again.num_saves = found[1]["num_saves"]
    for frames in range(5, 8):
        again.save(state(frames))
    frames_left = [int(path.name[11:26]) for path in checkpoint_paths(tmp_path)]
    assert frames_left == [7, 6, 3]


def test_a_full_disk_is_tried_again_sooner(
    tmp_path: Path, disk: FullDisk, caplog: pytest.LogCaptureFixture
) -> None:
    """Failed saves are told once, count for nothing, and are tried again after a minute."""
    saver = Saver(config(tmp_path, keep_checkpoints=1), tmp_path)
    saver.save(state(1))
    assert (saver.failure, saver.wait_s) == ("", 600.0)
    disk.full = True
    for frames in (2, 3):
        saver.save(state(frames, 100.0))
        assert (saver.failure, saver.wait_s) == ("No space left on device", RETRY_S)
    assert caplog.text.count("cannot be written") == 1
    assert [path.name[-6:] for path in checkpoint_paths(tmp_path)] == ["001.pt"]
    assert not (tmp_path / BEST).exists() or best_in(tmp_path) == 0.0
    disk.full = False
    saver.save(state(4))
    assert (saver.failure, saver.wait_s, saver.num_saves) == ("", 600.0, 2)
    assert "can be written again" in caplog.text
    assert Saver(config(tmp_path, checkpoint_interval_s=5.0), tmp_path).wait_s == 5.0


def test_config_json_is_written_once_the_disk_takes_it(tmp_path: Path, disk: FullDisk) -> None:
    """What could not be recorded at the start, or has vanished, is with the next checkpoint."""
    saver = Saver(config(tmp_path, seed=7), tmp_path)
    disk.full = True
    saver.begin()
    assert not (tmp_path / "config.json").exists()
    disk.full = False
    for frames in (1, 2):
        saver.save(state(frames))
        assert json.loads((tmp_path / "config.json").read_text())["seed"] == 7
        (tmp_path / "config.json").unlink()


def test_an_override_is_recorded_until_a_checkpoint_has_it(tmp_path: Path) -> None:
    """A run that dies before its first save resumes without being told again; later changes need
    an override of their own."""
    saver = Saver(config(tmp_path, override="learning_rate", learning_rate=0.5), tmp_path)
    saver.begin()
    assert configure([f"--logdir={tmp_path}"]).override == "learning_rate"
    saver.save(state(1))
    again = configure([f"--logdir={tmp_path}"])
    assert (again.override, again.learning_rate) == ("", 0.5)
    found = load_checkpoint(tmp_path)
    assert found is not None and json.loads(found[1]["config"])["override"] == ""


def test_a_full_disk_does_not_end_a_run(
    tmp_path: Path, disk: FullDisk, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Full for a while: reports and checkpoints of the end are whole, the trouble is told."""
    update = Learner.update

    def with_trouble(self: Learner, parts: Any) -> None:
        disk.full = 5 <= self.updates < 60
        if self.updates == 59 and not disk.refused:
            return  # not before a save was refused
        update(self, parts)

    monkeypatch.setattr(Learner, "update", with_trouble)
    result = train(config(tmp_path, checkpoint_interval_s=0.1))
    assert result.save_failure == ""
    assert disk.refused > 0
    assert "checkpoint_*.pt cannot be written (No space left on device)" in caplog.text
    assert "checkpoint_*.pt can be written again" in caplog.text
    found = load_checkpoint(tmp_path)
    assert found is not None and found[1]["frames"] == result.frames
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["frames"] == result.frames
    assert not list(tmp_path.glob("*.tmp"))


def test_a_real_full_disk_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A small disk is filled to the last byte in mid-run and emptied again; nothing torn is left,
    and curves and checkpoint of the end are whole."""
    update = Learner.update
    filler: list[Path] = []

    def told(words: str) -> bool:
        return any(
            "checkpoint_" in r.getMessage() and words in r.getMessage() for r in caplog.records
        )

    def with_trouble(self: Learner, parts: Any) -> None:
        if self.updates == 5 and not filler:
            filler.append(fill(folder))
        if self.updates == 30 and not told("No space left"):
            return  # not before a save failed
        if self.updates == 30:
            filler[0].unlink(missing_ok=True)
        if self.updates == 60 and not told("again"):
            return
        update(self, parts)

    monkeypatch.setattr(Learner, "update", with_trouble)
    with small_disk(tmp_path / "disk", 2048) as folder:
        result = train(config(folder, checkpoint_interval_s=0.1))
        assert result.save_failure == ""
        found = load_checkpoint(folder)
        assert found is not None and found[1]["frames"] == result.frames
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        frames = [json.loads(line)["frames"] for line in lines]
        assert frames == sorted(frames) and frames[-1] == result.frames
        assert not list(folder.glob("*.tmp"))
        events = EventAccumulator(str(folder))
        events.Reload()
        assert events.Scalars("total_loss")[-1].step == result.frames


def test_a_last_save_that_fails_is_said_plainly(
    tmp_path: Path, disk: FullDisk, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The run ends in order, one line says what is lost, and the exit status is 1."""
    update = Learner.update

    def with_trouble(self: Learner, parts: Any) -> None:
        disk.full = self.updates >= 5
        update(self, parts)

    monkeypatch.setattr(Learner, "update", with_trouble)
    assert train_command.run(config(tmp_path)) == 1
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("asyncagent train")]
    assert "the last checkpoint could not be written" in line and "No space left" in line
    assert "done: " in captured.out and "checkpoint in" not in captured.out
    assert not checkpoint_paths(tmp_path)


def test_a_folder_that_vanishes_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not made anew, for it may be a disk that is not mounted now; the failure is known."""
    folder = tmp_path / "run"
    update = Learner.update

    def with_trouble(self: Learner, parts: Any) -> None:
        if self.updates == 5:
            folder.rename(tmp_path / "away")
        update(self, parts)

    monkeypatch.setattr(Learner, "update", with_trouble)
    result = train(config(folder))
    assert result.frames >= 2000
    assert result.save_failure == "No such file or directory"
    assert not folder.exists()


def test_resumed_statistics_go_on(tmp_path: Path) -> None:
    """Games, means and scores of the checkpoint are in the first report of the next session."""
    first = train(config(tmp_path))
    again = train(config(tmp_path))
    assert first.last_report is not None and again.last_report is not None
    assert again.frames == first.frames
    assert again.last_report.episodes == first.last_report.episodes > 0
    assert again.episode_return_mean == first.episode_return_mean
    assert again.last_report.levels == first.last_report.levels


def test_dmlab30_scores_are_in_the_checkpoint(tmp_path: Path) -> None:
    """What the levels have given since the last scores is not lost with a session."""
    train(config(tmp_path))
    found = load_checkpoint(tmp_path)
    assert found is not None
    path, content = found
    content["dmlab30"] = {"rooms_watermaze": [54.0, 1]}
    content["counters"]["dmlab30_scores"] = [12.0, 11.0]
    write_state(path, content)
    result = train(config(tmp_path))
    assert result.last_report is not None and result.last_report.dmlab30_no_cap == 12.0
    again = load_checkpoint(tmp_path)
    assert again is not None and again[1]["dmlab30"] == {"rooms_watermaze": [54.0, 1]}


def test_a_checkpoint_of_format_1_is_resumed(tmp_path: Path) -> None:
    """Weights and schedule go on; what it does not know begins anew."""
    first = train(config(tmp_path))
    found = load_checkpoint(tmp_path)
    assert found is not None
    path, content = found
    for name in ("counters", "dmlab30", "num_saves", "episode_return_mean"):
        del content[name]
    (tmp_path / BEST).unlink(missing_ok=True)
    torch.save(content | {"format": 1}, path)
    result = train(config(tmp_path))
    assert result.frames == first.frames and result.last_report is not None
    assert result.last_report.episodes < 100


def test_what_decides_learning_changes_on_purpose_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The refusal lists all that differs; named in --override, it goes on and is told."""
    train(config(tmp_path))
    other = {"learning_rate": 0.5, "unroll_length": 4}
    for override in ("", "learning_rate"):
        with pytest.raises(CheckpointError) as caught:
            train(config(tmp_path, **other, override=override))
        message = str(caught.value)
        assert "\n" not in message
        assert "learning_rate=0.001, not 0.5" in message
        assert "unroll_length=5, not 4" in message
        assert "--override=unroll_length,learning_rate" in message
    with caplog.at_level(logging.WARNING):
        train(config(tmp_path, **other, override="learning_rate,unroll_length"))
    assert "override: the run was learned with learning_rate=0.001, not 0.5" in caplog.text
    train(config(tmp_path, **other))


def test_what_only_changes_speed_is_free(tmp_path: Path) -> None:
    """Actors, threads, intervals and the length of the run are nobody's business but the user's."""
    train(config(tmp_path))
    free = {"num_actors": 4, "env_threads": 2, "keep_checkpoints": 1, "report_interval_s": 0.1}
    assert train(config(tmp_path, **free, total_environment_frames=2500)).frames >= 2500


def test_every_difference_in_who_learns_is_listed(tmp_path: Path) -> None:
    """Another seed and another net are named together, and nothing may override them."""
    train(config(tmp_path))
    with pytest.raises(CheckpointError, match="seed=1, not 2; use_lstm=False, not True"):
        train(config(tmp_path, seed=2, use_lstm=True))
    with pytest.raises(ConfigError, match="override='seed' must be some of"):
        config(tmp_path, override="seed")


def test_what_tune_chooses_may_always_change() -> None:
    """Flags that change speed alone never need an override; those that do are flags."""
    names = {field.name for field in dataclasses.fields(Config)}
    assert set(LEARNING_FLAGS) <= names
    assert not set(LEARNING_FLAGS) & {*TUNED_FLAGS, "total_environment_frames", "device"}


def test_the_best_can_be_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test takes the best checkpoint, or any, by name, and says which it was."""
    monkeypatch.setattr(building, "_log", logging.getLogger("nobody"))
    train(config(tmp_path))
    found = load_checkpoint(tmp_path)
    assert found is not None
    write_state(tmp_path / BEST, found[1] | {"frames": 1})
    result = evaluate(tmp_path, 2, checkpoint="best")
    assert (result.frames, result.checkpoint) == (1, BEST)
    assert json.loads(result.to_json())["checkpoint"] == BEST
    assert evaluate(tmp_path, 2).checkpoint == found[0].name
