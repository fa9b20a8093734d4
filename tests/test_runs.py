"""Runs read back, their curves, and the commands that show them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from asyncagent.__main__ import main
from asyncagent.checkpoint import locked
from asyncagent.commands.compare import CompareFlags
from asyncagent.commands.run_paths import gathered
from asyncagent.config import resolve
from asyncagent.curves import POINTS, curves
from asyncagent.errors import UsageError
from asyncagent.loop import train
from asyncagent.runs import (
    MAX_LINE_BYTES,
    MAX_POINTS,
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


def write_run(logdir: Path, returns: list[float | None], **flags: Any) -> Path:
    """A run that reported such returns, 1000 frames and an hour apart."""
    logdir.mkdir(parents=True)
    (logdir / "config.json").write_text(resolve("catch", logdir=str(logdir), **flags).to_json())
    with (logdir / "metrics.jsonl").open("w") as file:
        for index, value in enumerate(returns):
            report = {"frames": 1000 * index, "time_s": 3600.0 * index}
            file.write(json.dumps(report | {"episode_return_mean": value}) + "\n")
    return logdir


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
    returns = [line["episode_return_mean"] for line in lines if line["episode_return_mean"]]
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


def test_folders_of_runs(tmp_path: Path) -> None:
    """A folder of runs stands for all of them, and a run named twice is one."""
    runs = [write_run(tmp_path / name, [0.0]) for name in "ab"]
    assert find_runs([tmp_path]) == runs
    assert find_runs([runs[1], tmp_path]) == runs[::-1]
    with pytest.raises(UsageError, match=r"no metrics\.jsonl"):
        find_runs([tmp_path / "a" / "b"])


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
