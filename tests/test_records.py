"""metrics.jsonl and TensorBoard: curves that go on without overlap, on disks that fail."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asyncagent.metrics import LevelReport
from asyncagent.records import MetricsFile, TensorBoard
from asyncagent.structs import Episode
from tests.test_metrics import report


def frames_in(path: Path) -> list[int]:
    return [json.loads(line)["frames"] for line in path.read_text().splitlines()]


def curves(logdir: Path) -> EventAccumulator:
    events = EventAccumulator(str(logdir))
    events.Reload()
    return events


def test_file_keeps_what_was_learned_and_drops_what_was_lost(tmp_path: Path) -> None:
    """Resumed at 2,000 frames, lines beyond it and lines cut off by a crash go."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for frames in (1000, 2000, 3000):
        file.write(report(frames))
    file.close()
    with path.open("a") as torn:
        torn.write('{"frames": 1500, "time')
    resumed = MetricsFile(path, 2000)
    assert frames_in(path) == [1000, 2000]
    resumed.write(report(2500))
    resumed.close()
    assert frames_in(path) == [1000, 2000, 2500]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("text", ['{"frames": "x"}', "[" * 100_000, '{"frames": 5}', "\0\xff", "7"])
def test_a_bad_line_between_good_ones_is_dropped_alone(tmp_path: Path, text: str) -> None:
    """Whatever stands there, of too many frames or no report at all, the lines around it stay."""
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"frames": frames}) for frames in (1, 2)]
    path.write_bytes("\n".join([good[0], text, good[1], ""]).encode("latin-1"))
    file = MetricsFile(path, 2)
    file.close()
    assert path.read_text().splitlines() == good
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_lines_written_while_the_file_was_gone_follow_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that comes back with its file is appended to, with no line lost or doubled."""
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write(report(1000))
    folder.rename(tmp_path / "away")
    with caplog.at_level(logging.WARNING):
        file.write(report(2000))
        file.write(report(3000))
    assert caplog.text.count("cannot be written") == 1
    (tmp_path / "away").rename(folder)
    file.write(report(4000))
    file.close()
    assert frames_in(path) == [1000, 2000, 3000, 4000]


def test_curves_have_the_ancestors_tags_and_every_game(tmp_path: Path) -> None:
    """Scalars of the report, of its levels and of every game, and how actions were chosen."""
    made = report(4000)._replace(levels={"a": LevelReport(7, 2, 1.5)})
    board = TensorBoard(tmp_path, 4, 0)
    games = [Episode("a", 3.0, 10, 0), Episode("a", 5.0, 20, 1)]
    board.write(made, games, np.array([30, 10]))
    board.write(made._replace(frames=8000, total_loss=float("nan")), [], 0)
    board.close()
    events = curves(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("total_loss")] == [(4000, 1.0)]
    assert [e.step for e in events.Scalars("learning_rate")] == [4000, 8000]
    assert [e.value for e in events.Scalars("a/queue_columns")] == [7, 7]
    assert [e.value for e in events.Scalars("a/episode_return")] == [3.0, 5.0]
    assert [e.value for e in events.Scalars("a/episode_frames")] == [40, 80]
    (histogram,) = (e.histogram_value for e in events.Histograms("action"))
    assert (histogram.num, histogram.sum, histogram.bucket) == (40, 10, [30, 10])
    assert not any(tag.startswith("hosts/") for tag in events.Tags()["scalars"])


def session(logdir: Path, resume_frames: int, *frames: int) -> None:
    board = TensorBoard(logdir, 4, resume_frames)
    for number in frames:
        board.write(report(number), [], 0)
    board.close()


@pytest.mark.parametrize(
    ("resumed_at", "expected"), [(2000, [1000, 2000, 2500, 3500]), (0, [2500, 3500])]
)
def test_curves_go_on_without_overlap(tmp_path: Path, resumed_at: int, expected: list[int]) -> None:
    """What was logged up to the checkpoint stays, its own frame included; what was lost goes,
    also where the run had no checkpoint yet."""
    session(tmp_path, 0, 1000, 2000, 3000)
    session(tmp_path, resumed_at, 2500, 3500)
    events = curves(tmp_path)
    assert [e.step for e in events.Scalars("total_loss")] == expected


def test_tensorboard_outlives_its_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that vanished is told once, and every summary is in it when it is back."""
    folder = tmp_path / "run"
    folder.mkdir()
    board = TensorBoard(folder, 4, 0)
    board.write(report(1000), [], 0)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    with caplog.at_level(logging.WARNING):
        for frames in (2000, 3000):
            board.write(report(frames), [], 0)
    assert caplog.text.count("cannot be written") == 1
    folder.mkdir()
    board.write(report(4000), [], 0)
    board.close()
    assert [e.step for e in curves(folder).Scalars("total_loss")] == [2000, 3000, 4000]


def test_no_thread_writes_in_secret(tmp_path: Path) -> None:
    """Events are in the file when write returns: no thread of its own could die with them."""
    import threading

    before = threading.active_count()
    board = TensorBoard(tmp_path, 4, 0)
    (path,) = tmp_path.iterdir()
    sizes: list[Any] = [path.stat().st_size]
    board.write(report(1000), [], 0)
    assert path.stat().st_size > sizes[0]
    assert threading.active_count() == before
    board.close()
