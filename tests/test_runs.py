"""Runs read back, their curves, and the commands that show them."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from asyncagent.__main__ import main
from asyncagent.checkpoint import locked
from asyncagent.commands.compare import CompareFlags
from asyncagent.commands.run_paths import gathered
from asyncagent.config import Config, resolve
from asyncagent.curves import POINTS, curves
from asyncagent.errors import UsageError
from asyncagent.loop import train
from asyncagent.metrics import MIN_GAMES
from asyncagent.records import MAX_LINE_BYTES, MAX_POINTS
from asyncagent.runs import (
    NOT_LEARNING,
    Run,
    by_configuration,
    differing,
    find_runs,
    read_run,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs of catch that differ in their seed."""
    folder = tmp_path_factory.mktemp("trained")
    for seed in (1, 2):
        train(
            resolve(
                "catch", seed=seed, logdir=str(folder / f"seed{seed}"), report_interval_s=0.1,
                total_environment_frames=5000,
            )
        )  # fmt: skip
    return folder


def write_run(logdir: Path, returns: list[float | None], begin: int = 0, **flags: Any) -> Path:
    """A run that reported such returns, 1000 frames and an hour apart."""
    logdir.mkdir(parents=True)
    level_name = flags.pop("level_name", "catch")
    (logdir / "config.json").write_text(resolve(level_name, logdir=str(logdir), **flags).to_json())
    lines = [
        line(1000 * index, 3600.0 * index, value) for index, value in enumerate(returns, begin)
    ]
    write_lines(logdir, lines)
    return logdir


def line(frames: float, time_s: float, value: float | None, episodes: int = MIN_GAMES) -> str:
    """A report."""
    values = {"episodes": episodes, "episode_return_mean": value}
    return json.dumps({"frames": frames, "time_s": time_s} | values)


def write_lines(logdir: Path, lines: list[str]) -> None:
    """Reports of a run."""
    (logdir / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def read(logdir: Path, *figures: str) -> Run:
    """The run with its returns and other figures."""
    return read_run(logdir, ["episode_return_mean", *figures])


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail with status 2 and one line on stderr; returns the line."""
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_run_is_read_back(trained: Path) -> None:
    """What training has written is what is read: frames, time, every report's figures."""
    run = read(trained / "seed1", "levels.*.episodes")
    lines = [json.loads(s) for s in (trained / "seed1" / "metrics.jsonl").read_text().splitlines()]
    assert (run.state, run.num_reports, run.num_damaged) == ("finished", len(lines), 0)
    assert (run.frames, run.hours) == (lines[-1]["frames"], lines[-1]["time_s"] / 3600)
    episodes = run.figures["levels.catch.episodes"]
    assert episodes[-1].tolist() == [run.frames, run.hours, lines[-1]["episodes"]]
    returns = [line["episode_return_mean"] for line in lines if line["episodes"] >= MIN_GAMES]
    assert run.best[0] == max(returns)


def test_damage_is_passed_over(tmp_path: Path) -> None:
    """Torn, foreign, deep, endless and backward lines are counted, and all others are read."""
    logdir = write_run(tmp_path / "run", [0.25, 0.5, None])
    path = logdir / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    endless = b" " * (2 * MAX_LINE_BYTES) + first
    damage = [
        b"[1]\n",
        b"\xff\n",
        b"[" * 99_999 + b"\n",
        b'{"frames": "x", "time_s": 1}\n',
        endless,
    ]
    path.write_bytes(b"".join([first, *damage, second, first, third, third[:9]]))
    run = read(logdir)
    assert (run.num_reports, run.num_damaged) == (3, len(damage) + 2)
    assert run.figures["episode_return_mean"].tolist() == [[0, 0, 0.25], [1000, 1, 0.5]]
    assert run.frames == 2000


def values_of(logdir: Path, *lines: tuple[float, float, float]) -> list[list[float]]:
    """What is read of reports of such frames, hours and returns: the same of those that count."""
    write_lines(logdir, [line(frames, 3600 * hours, value) for frames, hours, value in lines])
    run = read(logdir)
    found: list[list[float]] = run.figures["episode_return_mean"].tolist()
    assert found[-1][:2] == [run.frames, run.hours]
    assert run.best[0] == max(value for _, _, value in found)
    return found


@pytest.mark.parametrize(
    "outlier",
    [(10**15, 2.5, 99), (2500, 10**9, 99), (10**15, 10**9, 99), (0, 0, 99), (2000, 0, 99)],
)
@pytest.mark.parametrize("place", [1, 2, 3, 4])
def test_a_line_out_of_order_is_left_out_alone(
    tmp_path: Path, outlier: tuple[float, float, float], place: int
) -> None:
    """Of frames or hours far too large or too small: the lines around it count."""
    logdir = write_run(tmp_path / "run", [], total_environment_frames=10**6)
    good = [(1000.0 * i, float(i), float(i)) for i in range(1, 6)]
    assert values_of(logdir, *good[:place], outlier, *good[place:]) == [[*one] for one in good]
    run = read(logdir)
    assert (run.state, run.num_reports, run.num_damaged) == ("stopped", 5, 1)


def test_two_lines_too_far_ahead_are_left_out(tmp_path: Path) -> None:
    """What falls back behind them and goes on from there is the run."""
    logdir = write_run(tmp_path / "run", [])
    good = [(1000.0 * i, float(i), float(i)) for i in range(1, 6)]
    far = [(1e15, 9.0, 99.0), (2e15, 9.0, 999.0)]
    assert values_of(logdir, *good[:2], *far, *good[2:]) == [[*one] for one in good]


def test_of_lost_work_nothing_is_read(tmp_path: Path) -> None:
    """Resumed before it was later: what was later is void, and hours do not go back."""
    logdir = write_run(tmp_path / "run", [])
    lost = [(0, 5, 7), (0, 60, 8), (0, 120, 9)]
    again = [(0, 4, 1), (0, 10, 2), (1000, 15, 3)]
    assert values_of(logdir, *lost, *again) == [[*one] for one in again]
    assert values_of(logdir, (0, 3, 5), *lost, *again) == [[0, 3, 5], *([*one] for one in again)]
    assert main(["plot", "--x=hours", str(logdir), f"--out={tmp_path / 'curve.svg'}"]) == 0


def test_the_best_is_no_luck(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mean of too few games is not the best, and the table says of how many it is."""
    logdir = write_run(tmp_path / "run", [])
    lucky, first = line(1000, 1, 99.0, MIN_GAMES - 1), line(2000, 2, 5.0, MIN_GAMES)
    write_lines(logdir, [lucky])
    assert math.isnan(read(logdir).best[0])
    write_lines(logdir, [lucky, first, line(3000, 3, 4.0, 100)])
    assert read(logdir).best == (5.0, 2000)
    assert main(["compare", str(logdir)]) == 0
    assert f"from {MIN_GAMES} games on" in capsys.readouterr().out


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Of many values every other one is let go, as often as needed; the newest stays."""
    count = 2 * MAX_POINTS + 2
    logdir = write_run(tmp_path / "run", [float(index) for index in range(count)])
    values = read(logdir).figures["episode_return_mean"][:, 2]
    assert len(values) <= MAX_POINTS
    assert set(np.diff(values)[:-1]) == {4.0}
    assert (values[0], values[-1]) == (0, count - 1)


def test_state(tmp_path: Path) -> None:
    """A run whose folder is held is running; one that learned all its frames has finished."""
    logdir = write_run(tmp_path / "run", [0.0, 0.0], total_environment_frames=5000)
    assert read(logdir).state == "stopped"
    with locked(logdir):
        assert read(logdir).state == "running"
    assert read(logdir).state == "stopped"
    done = write_run(tmp_path / "done", [0.0, 0.0], total_environment_frames=1000)
    assert read(done).state == "finished"


def test_looking_keeps_nothing_held(tmp_path: Path) -> None:
    """A run that was looked at can be trained on."""
    logdir = write_run(tmp_path / "run", [0.0])
    with locked(logdir):
        pass
    read(logdir)
    with locked(logdir):
        pass


def test_a_lock_that_is_no_file_keeps_nobody_waiting(tmp_path: Path) -> None:
    """A pipe that nobody writes to is not held."""
    logdir = write_run(tmp_path / "run", [0.0])
    os.mkfifo(logdir / ".lock")
    assert read(logdir).state == "stopped"


def test_folders_of_runs(tmp_path: Path) -> None:
    """A folder of runs stands for all of them, and a run named twice is one."""
    runs = [write_run(tmp_path / name, [0.0]) for name in "ab"]
    assert find_runs([tmp_path]) == runs
    assert find_runs([runs[1], tmp_path]) == runs[::-1]
    with pytest.raises(UsageError, match=r"no metrics\.jsonl"):
        find_runs([tmp_path / "a" / "b"])


def test_a_run_is_one_however_it_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative, absolute, through a link or with its folder: the first spelling stays."""
    run = write_run(tmp_path / "s1", [0.0])
    (tmp_path / "latest").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    assert find_runs(["s1", run, "latest", "s1/../s1", tmp_path]) == [Path("s1")]
    assert find_runs([tmp_path]) == [run], "a link is not what a run is called"


def no_entry(monkeypatch: pytest.MonkeyPatch, closed: Path) -> None:
    """Let nobody look into a folder; root may look everywhere, whatever its mode."""
    look = Path.stat

    def refuse(self: Path, **flags: Any) -> os.stat_result:
        if closed in self.parents:
            raise PermissionError(13, "Permission denied", str(self))
        return look(self, **flags)

    monkeypatch.setattr(Path, "stat", refuse)


def test_a_folder_that_may_not_be_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Named it is one line; among the runs of a folder it is left out with a warning."""
    run, closed = (write_run(tmp_path / "runs" / name, [0.0]) for name in ("open", "shut"))
    no_entry(monkeypatch, closed)
    with caplog.at_level(logging.WARNING):
        assert find_runs([tmp_path / "runs"]) == [run]
    assert f"{closed} is left out: Permission denied" in caplog.text
    inside = closed / "inside"
    for command, path in (("compare", closed), ("plot", closed), ("doctor", inside)):
        said = one_line(capsys, command, f"--logdir={path}")
        assert "cannot be read: Permission denied" in said


@pytest.mark.parametrize("command", ["compare", "plot", "doctor"])
def test_a_name_that_is_too_long(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, as of any folder that is not there."""
    said = one_line(capsys, command, f"--logdir={'x' * 300}")
    assert "cannot be read: File name too long" in said


def test_seeds_are_together(tmp_path: Path) -> None:
    """Runs whose configurations differ in seed, folder and intervals alone are one group."""
    runs = [
        read(write_run(tmp_path / "a", [0.0], seed=1, report_interval_s=1.0)),
        read(write_run(tmp_path / "b", [0.0], seed=2, entropy_cost=0.5)),
        read(write_run(tmp_path / "c", [0.0], seed=3, report_interval_s=2.0)),
    ]
    groups = [[run.logdir.name for run in group] for group in by_configuration(runs)]
    assert groups == [["a", "c"], ["b"]]
    assert differing([run.config for run in runs]) == ["seed", "entropy_cost"]


def test_every_flag_makes_a_difference_or_none() -> None:
    """A flag of Config is here or in NOT_LEARNING: whoever adds one decides which."""
    makes_one = {
        *("level_name", "seed", "total_environment_frames", "deterministic", "benchmark_mode"),
        *("num_actors", "num_groups", "num_action_repeats", "atari_backend", "atari_protocol"),
        *("width", "height", "renderer"),
        *("unroll_length", "batch_size", "discounting", "reward_clipping", "bootstrap_truncated"),
        *("entropy_cost", "baseline_cost", "clip_rho_threshold", "clip_pg_rho_threshold"),
        *("vtrace_lambda", "epochs_per_batch", "optimizer", "learning_rate", "decay", "momentum"),
        *("epsilon", "max_grad_norm", "net", "use_lstm"),
        # How fast it is: curves over hours, and the policy lag.
        *("device", "learner_device", "inference_device", "precision", "env_threads"),
        *("inference_threads", "learner_threads", "env_niceness", "pin_workers"),
        *("micro_batch_rows", "min_inference_rows", "max_inference_rows"),
        *("inference_timeout_ms", "switch_interval_ms"),
        *("max_policy_lag", "weights_precision", "compression"),
    }
    assert not makes_one & NOT_LEARNING
    assert makes_one | NOT_LEARNING == {field.name for field in dataclasses.fields(Config)}


def test_flags_of_another_version(tmp_path: Path) -> None:
    """A flag that a run's version did not have counts as its default; unknown ones count, too."""
    runs = [write_run(tmp_path / name, [0.0]) for name in "abc"]
    whole = json.loads((runs[0] / "config.json").read_text())
    del whole["grace_s"], whole["max_grad_norm"]
    (runs[1] / "config.json").write_text(json.dumps(whole))
    (runs[2] / "config.json").write_text(json.dumps(whole | {"novelty": 1}))
    first, second, third = (read(run).config for run in runs)
    assert differing([first, second]) == []
    assert differing([first, third]) == ["novelty"]


@pytest.mark.parametrize("axis", ["frames", "hours"])
def test_curve_of_seeds(tmp_path: Path, axis: Any) -> None:
    """Mean, smallest and largest at every x, interpolated, up to where the shortest run ends."""
    runs = [
        read(write_run(tmp_path / "a", [0.0, 2.0], seed=1)),
        read(write_run(tmp_path / "b", [4.0, 4.0, 4.0], seed=2)),
        read(write_run(tmp_path / "c", [8.0, 6.0, 4.0, 2.0], seed=3)),
    ]
    (curve,) = curves(runs, axis, "minmax", 0.0)
    share = np.linspace(0, 1, POINTS)
    assert np.allclose(curve.x, share * (1000 if axis == "frames" else 1))
    assert np.allclose(curve.low, 2 * share)
    assert np.allclose(curve.high, 8 - 2 * share)
    assert np.allclose(curve.mean, 4.0)
    assert (curve.label, curve.num_runs) == ("catch", 3)
    assert "one of the 3 runs ends at" in curve.cut
    (curve,) = curves(runs, axis, "stderr", 0.0)
    assert math.isclose(curve.high[0] - curve.mean[0], 4 / math.sqrt(3))
    assert math.isclose(curve.mean[0] - curve.low[0], 4 / math.sqrt(3))


def test_a_seed_that_shares_nothing_is_left_out(tmp_path: Path) -> None:
    """Young or late, first or last: it is named, and the others are the curve."""
    young = read(write_run(tmp_path / "young", [9.0], seed=4))
    late = read(write_run(tmp_path / "late", [9.0, 9.0], begin=5, seed=5))
    others = [
        read(write_run(tmp_path / f"s{seed}", [0.0, 1.0, 2.0], seed=seed)) for seed in (1, 2, 3)
    ]
    for apart in (young, late):
        for runs in ([apart, *others], [*others, apart]):
            (curve,) = curves(runs, "frames", "minmax", 0.0)
            assert (curve.num_runs, curve.high[-1]) == (3, 2.0)
            assert (curve.x[0], curve.x[-1]) == (0, 2000)
            assert f"{apart.logdir} left out" in curve.cut
    (curve,) = curves([young, late], "hours", "minmax", 0.0)
    assert (curve.num_runs, curve.x[0]) == (1, 5.0) and str(young.logdir) in curve.cut


def test_a_late_beginning_is_told(tmp_path: Path) -> None:
    """The mean of seeds begins where all of them have begun, and says so if that is a cut."""
    runs = [
        read(write_run(tmp_path / "a", [0.0] * 201, seed=1)),
        read(write_run(tmp_path / "b", [0.0] * 199, begin=2, seed=2)),
    ]
    (curve,) = curves(runs, "frames", "minmax", 0.0)
    assert (curve.x[0], curve.cut) == (2000, "")
    runs.append(read(write_run(tmp_path / "c", [0.0] * 51, begin=100, seed=3)))
    (curve,) = curves(runs, "frames", "minmax", 0.0)
    assert (curve.x[0], curve.x[-1]) == (100_000, 150_000)
    for words in ("begins at 100,000 frames", "ends at 150,000 frames"):
        assert f"one of the 3 runs {words}, and so does their mean" in curve.cut


def test_a_single_report_is_seen(tmp_path: Path) -> None:
    """A curve of one point is drawn as one."""
    from asyncagent.commands.plot import PlotFlags, draw

    runs = [read(write_run(tmp_path / f"s{seed}", [float(seed)], seed=seed)) for seed in (1, 2)]
    for those, expected in ((runs[:1], 1.0), (runs, 1.5)):
        figure = draw(curves(those, "frames", "minmax", 0.0), those, PlotFlags())
        (drawn,) = figure.axes[0].lines
        assert drawn.get_marker() == "o" and drawn.get_ydata()[0] == expected
    longer = [read(write_run(tmp_path / "longer", [1.0, 2.0]))]
    figure = draw(curves(longer, "frames", "minmax", 0.0), longer, PlotFlags())
    assert figure.axes[0].lines[0].get_marker() not in ("o", "None")


def test_labels_are_what_differs(tmp_path: Path) -> None:
    """A curve is called by the flags that set its configuration apart, never by the seed."""
    runs = [
        read(write_run(tmp_path / "a", [1.0], seed=1, entropy_cost=0.5)),
        read(write_run(tmp_path / "b", [1.0], seed=2, learning_rate=0.25)),
    ]
    labels = [curve.label for curve in curves(runs, "frames", "minmax", 0.0)]
    assert labels == [
        "entropy_cost=0.5, learning_rate=0.001",
        "entropy_cost=0.01, learning_rate=0.25",
    ]


def test_labels_of_several_levels(tmp_path: Path) -> None:
    """What a level's preset brings is not said: the level, and what differs from its other runs."""
    runs = [
        read(write_run(tmp_path / "a", [1.0], level_name="atari_pong")),
        read(write_run(tmp_path / "b", [1.0], entropy_cost=0.5)),
        read(write_run(tmp_path / "c", [1.0])),
    ]
    labels = [curve.label for curve in curves(runs, "frames", "minmax", 0.0)]
    assert labels == ["atari_pong", "catch, entropy_cost=0.5", "catch, entropy_cost=0.01"]


def test_labels_are_short(tmp_path: Path) -> None:
    """Where many flags differ, a curve is called by its folder."""
    flags: dict[str, Any] = {
        "entropy_cost": 0.5,
        "learning_rate": 0.25,
        "baseline_cost": 2.0,
        "discounting": 0.5,
    }
    runs = [
        read(write_run(tmp_path / "a", [1.0], **flags)),
        read(write_run(tmp_path / "b", [1.0])),
    ]
    labels = [curve.label for curve in curves(runs, "frames", "minmax", 0.0)]
    assert labels == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_smoothing(tmp_path: Path) -> None:
    """A running mean evens a zigzag out and leaves a level line as it is."""
    zigzag = read(write_run(tmp_path / "a", [float(i % 2) for i in range(101)]))
    (rough,) = curves([zigzag], "frames", "minmax", 0.0)
    (even,) = curves([zigzag], "frames", "minmax", 0.2)
    assert np.ptp(rough.mean) > 0.9 and np.ptp(even.mean) < 0.1
    level = read(write_run(tmp_path / "b", [3.0, 3.0]))
    assert np.allclose(curves([level], "frames", "minmax", 0.5)[0].mean, 3.0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["a", "b", "--json"],
        ["--json", "a", "b"],
        ["--logdir", "a", "b", "--json"],
        ["--logdir=a", "--json", "--logdir=b"],
        ["--logdir=a", "b", "--json=true"],
    ],
)
def test_spellings(arguments: list[str]) -> None:
    """Paths may stand anywhere, behind one --logdir, behind several, or behind none."""
    others = gathered(CompareFlags, arguments)
    assert others[-3:] == ["--logdir", "a", "b"] and len(others) == 4


def test_compare(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table and the JSON hold every run, its figures and what sets it apart."""
    assert main(["compare", str(trained)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(str(trained))]
    assert len(rows) == 2 and all("catch  finished" in row for row in rows)
    assert "seed=1" in rows[0] and "seed=2" in rows[1]
    assert main(["compare", "--json", str(trained / "seed2"), str(trained / "seed1")]) == 0
    first, second = json.loads(capsys.readouterr().out)["runs"]
    assert first["differs"] == {"seed": 2} and second["differs"] == {"seed": 1}
    assert first["frames"] >= 5000 and first["frames_per_s_median"] > 0


def test_compare_before_the_first_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that has just begun has a row of dashes; markup in its path is no markup."""
    write_run(tmp_path / "[red]", [])
    assert main(["compare", str(tmp_path)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "[red]" in line]
    assert row.split()[-7:] == ["0.00", "-", "-", "-", "-", "-", "-"]
    assert main(["compare", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["return_best"] is None


@pytest.mark.parametrize("name", ["curves.png", "curves.svg"])
@pytest.mark.parametrize("more", [[], ["--x=hours", "--y=levels.*.episodes"]])
def test_plot(
    trained: Path, tmp_path: Path, name: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture of the kind that its name says is written."""
    out = tmp_path / name
    assert main(["plot", str(trained), f"--out={out}", *more]) == 0
    assert f"written to {out}" in capsys.readouterr().out
    if name.endswith("png"):
        with Image.open(out) as image:
            assert image.format == "PNG" and len(np.unique(np.asarray(image))) > 10
    else:
        assert "<svg" in out.read_text()


def test_plot_shows_what_is_in_the_file(tmp_path: Path) -> None:
    """Drawn are the values of the reports, with minutes below where there is one run."""
    from asyncagent.commands.plot import PlotFlags, draw

    run = read(write_run(tmp_path / "run", [0.0, 1.0, 4.0]))
    figure = draw(curves([run], "frames", "minmax", 0.0), [run], PlotFlags())
    (axes,) = figure.axes
    x, y = axes.lines[0].get_data()
    assert (x[0], x[-1], y[-1]) == (0.0, 2.0, 4.0) and math.isclose(np.interp(1.5, x, y), 2.5)
    assert (axes.get_xlabel(), axes.get_title()) == ("frames learned from (thousands)", "catch")
    (minutes,) = axes.child_axes
    assert [text.get_text() for text in minutes.get_xticklabels()] == ["0", "60", "120"]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--y=episode_return_men", "did you mean episode_return_mean"),
        ("--y=levels.catch.episode", "did you mean levels.catch.episodes"),
        ("--y=dmlab30_no_cap", "no number"),
        ("--out=curves.doc", "must end in .png or .svg"),
        ("--out=.", "must end in .png or .svg"),
        ("--smooth=1", "must be in [0, 1)"),
        ("--out=/proc/curves.png", "cannot be written"),
        ("--logdir=/proc", "no metrics.jsonl"),
    ],
)
def test_plot_mistakes(
    trained: Path, capsys: pytest.CaptureFixture[str], flag: str, words: str
) -> None:
    """One line says what is wrong and what would be right."""
    assert words in one_line(capsys, "plot", str(trained / "seed1"), flag)


def test_config_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration that is missing, damaged or of another kind is told in one line."""
    path = write_run(tmp_path / "run", [0.0]) / "config.json"
    for content, words in (
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "no level_name"),
        (None, "cannot be read"),
    ):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        assert words in one_line(capsys, "compare", str(path.parent))


def test_plot_without_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs without a number are named; where none has one, there is no picture."""
    empty = write_run(tmp_path / "empty", [])
    out = tmp_path / "curves.png"
    assert "no report yet" in one_line(capsys, "plot", str(empty), f"--out={out}")
    full = write_run(tmp_path / "full", [1.0])
    assert main(["plot", str(empty), str(full), f"--out={out}"]) == 0
    assert f"{empty} is not drawn" in capsys.readouterr().out


HOSTILE = "a\ud800b\x1b]0;me\x07\n$x$"


def test_foreign_letters_reach_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names in a run's files, and the run's own, are written without what a terminal obeys."""
    runs = [write_run(tmp_path / "runs" / name, [1.0, 2.0]) for name in ("a\x1b[2J", "b")]
    runs.append(write_run(tmp_path / "runs" / "c", [1.0, 2.0, 3.0], seed=2))
    for run, net in zip(runs, "abb", strict=True):
        config = json.loads((run / "config.json").read_text())
        flags = {"level_name": HOSTILE, "net": f"{net}{HOSTILE}"}
        (run / "config.json").write_text(json.dumps(config | flags))
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"frames": 9000, "time_s": 9000, HOSTILE: 1.0}) + "\nno report\n")
    out = tmp_path / "curves.svg"
    for arguments in (["compare"], ["plot", f"--out={out}"]):
        assert main([*arguments, str(tmp_path / "runs")]) == 0
        said = capsys.readouterr().out
        said.encode()
        assert all(letter.isprintable() or letter == "\n" for letter in said)
    assert "\x1b" not in out.read_text()
    assert one_line(capsys, "plot", str(runs[0]), "--y=unheard_of").isprintable()


def test_absurd_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """Numbers that nothing measures are none; what is large, and still one, is drawn."""
    logdir = write_run(tmp_path / "run", [1.0, 1e308, -1e150, 2.0])
    assert read(logdir).figures["episode_return_mean"][:, 2].tolist() == [1.0, 2.0]
    larger = write_run(tmp_path / "larger", [1e99, -1e99, 1e99, 5.0], seed=2)
    out = tmp_path / "curves.png"
    for spread in ("minmax", "stderr"):
        told = [f"--out={out}", f"--spread={spread}", "--smooth=0.3", "--x=hours"]
        assert main(["plot", str(logdir), str(larger), *told]) == 0
    assert not recwarn.list
    assert main(["compare", str(logdir)]) == 0


def test_a_picture_is_written_whole_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it cannot be written, the one that was there is left, and nothing else."""
    run = write_run(tmp_path / "run", [1.0, 2.0])
    out = tmp_path / "out" / "curves.PNG"
    out.parent.mkdir()
    out.write_bytes(b"the last one")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("os.fsync", full)
        assert "No space left" in one_line(capsys, "plot", str(run), f"--out={out}")
    assert out.read_bytes() == b"the last one" and [*out.parent.iterdir()] == [out]
    assert main(["plot", str(run), f"--out={out}"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and stat.S_ISREG(out.stat().st_mode)
