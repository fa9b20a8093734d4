"""metrics.jsonl: curves that go on without overlap, on disks that fail."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from asyncagent.records import MetricsFile
from tests.test_metrics import report


def frames_in(path: Path) -> list[int]:
    return [json.loads(line)["frames"] for line in path.read_text().splitlines()]


def test_file_keeps_what_was_learned_and_drops_what_was_lost(tmp_path: Path) -> None:
    """Resumed at 2,000 frames, lines beyond it and lines cut off by a crash go."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0, 0.0)
    for frames in (1000, 2000, 3000):
        file.write(report(frames))
    file.close()
    with path.open("a") as torn:
        torn.write('{"frames": 1500, "time')
    resumed = MetricsFile(path, 2000, 60.0)
    assert frames_in(path) == [1000, 2000]
    resumed.write(report(2500))
    resumed.close()
    assert frames_in(path) == [1000, 2000, 2500]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_hours_do_not_go_back(tmp_path: Path) -> None:
    """Killed before the first checkpoint, or while it stood still: what was later goes."""
    path = tmp_path / "metrics.jsonl"

    def session(frames: int, resume_s: float, *times_s: float) -> list[float]:
        file = MetricsFile(path, frames, resume_s)
        for time_s in times_s:
            file.write(report(frames)._replace(time_s=time_s))
        file.close()
        return [json.loads(line)["time_s"] for line in path.read_text().splitlines()]

    assert session(0, 0.0, 5.0, 60.0, 120.0) == [5, 60, 120]
    assert session(0, 0.0004, 5.0, 10.0) == [5, 10]
    assert session(1000, 7.0, 10.0, 15.0) == [5, 10, 15]
    assert session(1000, 9.9996, 12.0) == [5, 10, 12]


def test_lines_of_this_session_outlive_the_file(tmp_path: Path) -> None:
    """What was written before the file went away and came back is no lost work."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0, 0.0)
    for time_s in (5.0, 10.0):
        file.write(report(0)._replace(time_s=time_s))
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    copy.rename(path)
    file.write(report(0)._replace(time_s=15.0))
    file.close()
    assert [json.loads(line)["time_s"] for line in path.read_text().splitlines()] == [5, 10, 15]


@pytest.mark.parametrize(
    "text",
    [
        '{"frames": "x", "time_s": 1}',
        '{"frames": 1}',
        '{"frames": 5, "time_s": 1}',
        '{"frames": 1, "time_s": 61}',
        '{"frames": 1, "time_s": NaN}',
        "[" * 100_000,
        "\0\xff",
        "7",
    ],
)
def test_a_bad_line_between_good_ones_is_dropped_alone(tmp_path: Path, text: str) -> None:
    """Whatever stands there, of lost work or no report at all, the lines around it stay."""
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"frames": frames, "time_s": frames}) for frames in (1, 2)]
    path.write_bytes("\n".join([good[0], text, good[1], ""]).encode("latin-1"))
    file = MetricsFile(path, 2, 60.0)
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
    file = MetricsFile(path, 0, 0.0)
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
