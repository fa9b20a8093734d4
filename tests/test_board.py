"""TensorBoard: sections, histograms, the run's flags, and curves that outlive what disks do."""

from __future__ import annotations

import itertools
import logging
import math
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.util.tensor_util import make_ndarray

from asyncagent.board import Counts, TensorBoard
from asyncagent.config import resolve
from asyncagent.metrics import MAX_LAG_COUNTED, LevelReport
from asyncagent.stages import Stages, Verdict
from asyncagent.structs import Episode
from asyncagent.summaries import HYPERPARAMETERS, METRICS
from tests.test_metrics import figures, report

CONFIG = resolve("atari_pong", learning_rate=2e-3)


def curves(logdir: Path) -> EventAccumulator:
    events = EventAccumulator(str(logdir))
    events.Reload()
    return events


def text(events: EventAccumulator, tag: str) -> Any:
    """The newest of what is written under a tag."""
    return make_ndarray(events.Tensors(tag)[-1].tensor_proto)


def bars(events: EventAccumulator, tag: str) -> list[tuple[float, float, float]]:
    """Left edge, right edge and count of every bar that is not empty."""
    (found,) = (event.histogram_value for event in events.Histograms(tag))
    edges = [found.min, *found.bucket_limit]
    sides = itertools.pairwise(edges)
    return [(*side, n) for side, n in zip(sides, found.bucket, strict=True) if n]


def test_curves_have_the_ancestors_tags_and_every_game(tmp_path: Path) -> None:
    """Scalars of the report, of its levels and of every game, and how actions were chosen."""
    made = report(4000)._replace(levels={"a": LevelReport(7, 2, 1.5)})
    board = TensorBoard(tmp_path, CONFIG, 0)
    games = [Episode("a", 3.0, 10, 0), Episode("a", 5.0, 20, 1)]
    board.write(made, games, Counts(actions=np.array([30, 10])))
    board.write(made._replace(frames=8000, total_loss=float("nan")), [], Counts())
    board.close()
    events = curves(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("total_loss")] == [(4000, 1.0)]
    assert [e.step for e in events.Scalars("learning_rate")] == [4000, 8000]
    assert [e.value for e in events.Scalars("a/queue_columns")] == [7, 7]
    assert [e.value for e in events.Scalars("a/episode_return_mean")] == [1.5, 1.5]
    assert [e.value for e in events.Scalars("a/episode_return")] == [3.0, 5.0]
    assert [e.value for e in events.Scalars("a/episode_frames")] == [40, 80]
    (histogram,) = (e.histogram_value for e in events.Histograms("action"))
    assert (histogram.num, histogram.sum, histogram.bucket) == (40, 10, [30, 10])
    assert not any(tag.startswith("hosts/") for tag in events.Tags()["scalars"])


def test_sections(tmp_path: Path) -> None:
    """Every curve is in a section, but for the two that the ancestor had in none."""
    stages = Stages(env_steps=0.25, learner_waits=0.5)
    levels = {"a": LevelReport(7, 2, 1.5), "b": LevelReport(1, 0, math.nan)}
    made = report(4000)._replace(levels=levels, stages=stages, loop_lag_ms=3.0)
    board = TensorBoard(tmp_path, CONFIG, 0)
    board.write(made, [], Counts())
    board.close()
    events = curves(tmp_path)
    tags = set(events.Tags()["scalars"])
    assert {tag.split("/")[0] for tag in tags} == {
        *("score", "speed", "learning", "system", "a", "b"),
        *("learning_rate", "total_loss"),
    }
    assert {"learning/learning_rate", "learning/total_loss"} <= tags
    assert events.Scalars("system/stages/env_steps")[0].value == 0.25
    assert events.Scalars("system/loop_lag_ms")[0].value == 3.0
    assert {"system/memory_gib", "system/threads", "system/descriptors"} <= tags
    # What is not known has no point.
    assert "system/stages/hosts_wait" not in tags and "b/episode_return_mean" not in tags


def test_histograms(tmp_path: Path) -> None:
    """Batch sizes, policy lags, actions and returns, each bar where its numbers are."""
    lags = np.zeros(MAX_LAG_COUNTED + 1, np.int64)
    lags[[3, 5]] = 20, 10
    learned = figures()._replace(action_counts=np.array([0, 6]), policy_lag_counts=lags)
    counts = Counts().plus(learned, (0, 0, 7, 0)).plus(learned, (0, 0, 1, 0))
    board = TensorBoard(tmp_path, CONFIG, 0)
    games = [Episode("a", points, 10, 0) for points in (0.0, 30.0, 30.0, math.nan)]
    board.write(report(), games, counts)
    board.close()
    events = curves(tmp_path)
    assert bars(events, "speed/inference_batch_rows") == [(3.5, 7.5, 8)]
    assert bars(events, "learning/policy_lag") == [(2.5, 3.5, 40), (4.5, 5.5, 20)]
    assert bars(events, "action") == [(0.5, 1.5, 12)]
    assert bars(events, "score/episode_return") == [(0, 1, 1), (29, 30, 2)]


def test_nothing_counted_is_no_histogram(tmp_path: Path) -> None:
    """A policy without choices, and a summary without games or batches, have none."""
    board = TensorBoard(tmp_path, CONFIG, 0)
    board.write(report(), [], Counts().plus(figures()._replace(action_counts=0), (0, 0)))
    board.close()
    assert curves(tmp_path).Tags()["histograms"] == []


@pytest.mark.parametrize("returns", [(7.0, 7.0), (1e16, 1e16 + 2), (-1e308, 1e308)])
def test_returns_that_no_bars_fit(tmp_path: Path, returns: tuple[float, float]) -> None:
    """All the same, too close together or too far apart: every game is counted."""
    board = TensorBoard(tmp_path, CONFIG, 0)
    board.write(report(), [Episode("a", points, 10, 0) for points in returns], Counts())
    board.close()
    (found,) = curves(tmp_path).Histograms("score/episode_return")
    assert sum(found.histogram_value.bucket) == 2


def test_flags_and_layout(tmp_path: Path) -> None:
    """The run's flags are a text, its hyper-parameters a row, and the layout's charts have curves
    to show."""
    board = TensorBoard(tmp_path, CONFIG, 0)
    stages = Stages(*[0.5] * len(Stages._fields))
    made = report()._replace(levels={"a": LevelReport(7, 2, 1.5)}, stages=stages, loop_lag_ms=1.0)
    board.write(made, [Episode("a", 1.0, 10, 0)], Counts())
    board.close()
    events = curves(tmp_path)
    assert "| learning_rate | `0.002` |" in text(events, "flags")[0].decode()
    content = events.SummaryMetadata(hparams.SESSION_START_INFO_TAG).plugin_data.content
    row = hparams.parse_session_start_info_plugin_data(content)
    assert row.hparams["learning_rate"].number_value == 0.002
    assert row.hparams["level_name"].string_value == "atari_pong"
    assert set(row.hparams) == set(HYPERPARAMETERS) and row.group_name == ""
    scalars = set(events.Tags()["scalars"])
    assert set(METRICS) <= scalars
    layout = Layout.FromString(text(events, "custom_scalars__config__").item())
    charts = [chart for category in layout.category for chart in category.chart]
    assert layout.category[0].chart[0].title.startswith("return")
    for chart in charts:
        for tag in chart.multiline.tag:
            assert any(re.match(tag, scalar) for scalar in scalars), tag


def test_what_limits_the_run_is_a_text(tmp_path: Path) -> None:
    """The doctor's sentence is written when it changes, and only then."""
    board = TensorBoard(tmp_path, CONFIG, 0)
    for frames, advice in ((1, ""), (2, "more cores"), (3, "more cores"), (4, "")):
        board.write(report(frames)._replace(verdict=Verdict("", advice)), [], Counts())
    board.close()
    events = curves(tmp_path)
    assert [event.step for event in events.Tensors("system/limit")] == [2, 4]
    assert text(events, "system/limit")[0] == b"not known"


def session(logdir: Path, resume_frames: int, *frames: int) -> None:
    board = TensorBoard(logdir, CONFIG, resume_frames)
    for number in frames:
        board.write(report(number), [], Counts())
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
    assert events.Tensors("flags")[-1].step == resumed_at


def test_tensorboard_outlives_its_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that vanished is told once, and every summary is in it when it is back."""
    folder = tmp_path / "run"
    folder.mkdir()
    board = TensorBoard(folder, CONFIG, 0)
    board.write(report(1000), [], Counts())
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    with caplog.at_level(logging.WARNING):
        for frames in (2000, 3000):
            board.write(report(frames), [], Counts())
    assert caplog.text.count("cannot be written") == 1
    folder.mkdir()
    board.write(report(4000), [], Counts())
    board.close()
    events = curves(folder)
    assert [e.step for e in events.Scalars("total_loss")] == [2000, 3000, 4000]
    assert [e.step for e in events.Tensors("flags")] == [0]


def test_no_thread_writes_in_secret(tmp_path: Path) -> None:
    """Events are in the file when write returns: no thread of its own could die with them."""
    before = threading.active_count()
    board = TensorBoard(tmp_path, CONFIG, 0)
    (path,) = tmp_path.iterdir()
    sizes: list[Any] = [path.stat().st_size]
    board.write(report(1000), [], Counts())
    assert path.stat().st_size > sizes[0]
    assert threading.active_count() == before
    board.close()
