"""Reports: what is counted, what is written, and what a person reads."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from asyncagent.metrics import (
    NO_HOSTS,
    Counters,
    HostReport,
    HostsReport,
    LearnerStatistics,
    Report,
)
from asyncagent.panel import describe, describe_briefly
from asyncagent.structs import EnvStep, Episode, Loss
from asyncagent.terminal import Terminal


def figures(frames: int = 0, updates: int = 0, total_loss: float = 1.0) -> LearnerStatistics:
    return LearnerStatistics(
        frames, updates, 1, total_loss, 2.0, 3.0, 4.0, 5.0, 0.6, 7.0, 8, 0.9, 1e-4, np.array([1, 2])
    )


def row(num_envs: int, episodes: tuple[Episode, ...] = (), num_lost: int = 0) -> EnvStep:
    zeros = np.zeros(num_envs, np.bool_)
    lost = np.arange(num_envs) < num_lost
    losses = (Loss("x", 1, 0, "died"),) * num_lost
    points = np.zeros(num_envs, np.float32)
    return EnvStep(points, points, zeros, zeros, zeros, lost, episodes, losses)


def report(frames: int = 4000, mean: float = 1.5) -> Report:
    counters = Counters(4, 0, 0, 0.0)
    if not math.isnan(mean):
        counters.on_row(row(2, (Episode("x", mean, 10, 0),)))
    return counters.report(figures(frames, 10), 16.0, 8, NO_HOSTS)


def test_rates_are_since_the_last_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames, acted frames and updates per second are of the interval, not of the run."""
    now_s = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    counters = Counters(4, 1000, 10, 50.0)
    for _ in range(5):
        counters.on_row(row(16))
    now_s = 110.0
    first = counters.report(figures(3000, 30), 16.0, 8, NO_HOSTS)
    assert first.time_s == pytest.approx(60.0)
    assert first.frames_per_s == pytest.approx(200.0)
    assert first.acted_frames_per_s == pytest.approx(5 * 16 * 4 / 10)
    assert first.updates_per_s == pytest.approx(2.0)
    now_s = 111.0
    second = counters.report(figures(3100, 30), 16.0, 8, NO_HOSTS)
    assert second.frames_per_s == pytest.approx(100.0)
    assert second.acted_frames_per_s == 0
    assert second.updates_per_s == 0


def test_episode_means_are_over_the_last_hundred() -> None:
    """Means forget games beyond the window; frames are steps times repeats."""
    counters = Counters(4, 0, 0, 0.0)
    for value in range(150):
        counters.on_row(row(1, (Episode("x", float(value), value, 0),)))
    made = counters.report(figures(0, 0), 1.0, 0, NO_HOSTS)
    assert made.episodes == 150
    assert made.episode_return_mean == pytest.approx(np.mean(range(50, 150)))
    assert made.episode_frames_mean == pytest.approx(4 * np.mean(range(50, 150)))
    assert [episode.steps for episode in counters.take_episodes()] == list(range(50, 150))
    assert counters.take_episodes() == []


def test_what_is_not_a_number_is_null_in_json() -> None:
    """Before the first game the mean return is null, and the line is strict JSON."""
    line = report(mean=math.nan).to_json()
    values = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert values["episode_return_mean"] is None
    assert values["policy_lag_mean"] == 7.0


def test_line_says_what_a_person_wants_to_know() -> None:
    """Frames, rate, return, lag and the time left at the smoothed rate."""
    line = describe(report(frames=4000), total_frames=40_000, frames_per_s=10.0)
    assert line.startswith("4,000 frames")
    assert "return 1.50" in line
    assert "lag 7.0" in line
    assert line.endswith("left 1:00:00")
    assert "return -" in describe(report(mean=math.nan), 40_000, 0.0)


def test_plain_lines_where_stdout_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Piped output has one plain line per report and no control characters."""
    with Terminal("catch", 40_000, 0) as terminal:
        terminal.show(report(4000))
        terminal.say("a message")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(" 10.0%  4,000 frames")
    assert lines[1] == "a message"
    assert "\x1b" not in "".join(lines)


def test_lost_environments_are_counted_and_act_no_frames(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of lost environments are no frames."""
    now_s = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    counters = Counters(4, 0, 0, 0.0)
    counters.on_row(row(16, num_lost=2))
    now_s = 10.0
    made = counters.report(figures(0, 0), 1.0, 0, NO_HOSTS)
    assert made.env_losses == 2
    assert made.acted_frames_per_s == pytest.approx(14 * 4 / 10)


def test_reports_of_a_resumed_run_go_on() -> None:
    """Means, games, losses and levels are those of all sessions; what is saved is plain."""
    before = Counters(4, 0, 0, 0.0)
    for value in range(150):
        before.on_row(row(1, (Episode(f"l{value % 2}", float(value), value, 0, True),), 1))
    before.on_unroll("l0", 5)
    before.on_unroll("no game yet", 3)
    before.dmlab30_scores = (12.0, 11.0)
    state = json.loads(json.dumps(before.state()))
    after = Counters(4, 0, 0, 0.0)
    after.restore(state)
    assert after.state() == before.state()
    assert after.take_episodes() == [], "they have been told"
    for counters in (before, after):
        counters.on_row(row(1, (Episode("l0", 7.0, 1, 0),)))
    expected = before.report(figures(0, 0), 1.0, 0, NO_HOSTS)
    made = after.report(figures(0, 0), 1.0, 0, NO_HOSTS)
    for field in ("episodes", "env_losses", "episode_return_mean", "episode_frames_mean"):
        assert getattr(made, field) == getattr(expected, field)
    assert made.levels == expected.levels | {"no game yet": made.levels["no game yet"]}
    assert made.levels["no game yet"].queue_columns == 3
    assert (made.dmlab30_no_cap, made.dmlab30_cap_100) == (12.0, 11.0)


def test_what_hosts_did_counts_as_acted() -> None:
    """Frames, games and losses of an actor host are counted as those of our own environments."""
    counters = Counters(4, 0, 0, 0.0)
    counters.on_afar((Episode("x", 3.0, 10, 0),), (Loss("x", 1, 0, "died"),), 80)
    made = counters.report(figures(0, 0), 1.0, 0, NO_HOSTS)
    assert (made.episodes, made.env_losses, made.episode_return_mean) == (1, 1, 3.0)
    assert made.acted_frames_per_s > 0
    assert made.levels["x"].episodes == 1


def test_hosts_are_in_the_file_and_on_the_line() -> None:
    """metrics.jsonl has every figure of every host, the plain line how many there are."""
    host = HostReport(16, 100.0, 1.5, 2e6, 1e3, math.nan, 2)
    made = report()._replace(hosts={"far": host, "near": host})
    read = json.loads(made.to_json())["hosts"]["far"]
    assert read == host._asdict() | {"round_trip_ms": None, "env_steps": None, "waits": None}
    strange = Counters(4, 0, 0, 0.0).report(figures(0, 0), 1.0, 0, HostsReport({}, 3, 5))
    assert (strange.hosts_refused, strange.messages_rejected) == (3, 5)
    assert "hosts 2 with 32 actors" in describe(made, 1000, 10.0)
    assert "hosts" not in describe(report(), 1000, 10.0)


def test_skipped_updates_are_told() -> None:
    """A run that skipped updates says so in its file and on both kinds of line; others do not."""
    made = report()._replace(skipped_updates=3)
    assert json.loads(made.to_json())["skipped_updates"] == 3
    for words in (describe, describe_briefly):
        assert "skipped 3 updates" in words(made, 1000, 10.0)
        assert "skipped" not in words(report(), 1000, 10.0)
