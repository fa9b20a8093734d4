"""``asyncagent plot``."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncagent.commands.cli import parse
from asyncagent.commands.run_paths import gathered
from asyncagent.curves import Axis, Spread
from asyncagent.envs.base import how_to_install
from asyncagent.errors import UsageError
from asyncagent.files import write_beside
from asyncagent.panel import printable

if TYPE_CHECKING:
    from asyncagent.curves import Curve
    from asyncagent.records import Points
    from asyncagent.runs import Run

DESCRIPTION = """Draw the learning curves of recorded runs, finished or not, as a picture.

Runs that differ in their seed alone are one curve: their mean, and their spread around it.
asyncagent plot <folder> <folder> ... is short for --logdir; a folder of runs stands for all of
them."""

SUFFIXES = (".png", ".svg")
_LABELS = {
    "episode_return_mean": "mean return, last 100 games",
    "episode_frames_mean": "mean frames per game, last 100 games",
    "frames_per_s": "frames learned from per second",
    "policy_lag_mean": "updates between acting and learning",
    "entropy": "entropy of the policy (nats)",
}
_SPREADS = {"minmax": "band: smallest to largest", "stderr": "band: ± 1 standard error"}


LABEL_WIDTH = 60
"""Letters of a line of the legend."""


@dataclass(frozen=True)
class PlotFlags:
    """Which runs, and what of them."""

    logdir: tuple[str, ...] = ("logdir",)
    """Folders of runs, or of folders of runs."""
    out: str = "curves.png"
    """Picture to write: .png or .svg."""
    x: Axis = "frames"
    """frames learned from, or hours of training."""
    y: str = "episode_return_mean"
    """Any number in the lines of metrics.jsonl.

    Of levels: levels.<level>.episode_return_mean, with * for all levels; likewise stages.<stage>
    and hosts.<host>.<figure>."""
    spread: Spread = "minmax"
    """Band around several seeds' mean.

    minmax: from the smallest to the largest; stderr: the mean's standard error."""
    smooth: float = 0.0
    """Running mean over this share of a curve, in [0, 1)."""
    title: str = ""
    """Default: the level."""


def main(arguments: Sequence[str]) -> int:
    """Parse the flags, read the runs, draw; returns the exit status."""
    flags = parse(
        PlotFlags, gathered(PlotFlags, arguments), prog="asyncagent plot", description=DESCRIPTION
    )
    out = Path(flags.out)
    if out.suffix.lower() not in SUFFIXES:
        raise UsageError(f"out={flags.out!r} must end in {' or '.join(SUFFIXES)}")
    if not 0 <= flags.smooth < 1:
        raise UsageError(f"smooth={flags.smooth:g} must be in [0, 1)")
    from asyncagent.curves import curves
    from asyncagent.runs import find_runs, read_run, unknown_figure

    runs = [read_run(path, [flags.y]) for path in find_runs(flags.logdir)]
    lines = curves(runs, flags.x, flags.spread, flags.smooth)
    if not lines:
        raise unknown_figure(flags.y, runs)
    picture = io.BytesIO()
    draw(lines, runs, flags).savefig(picture, format=out.suffix[1:], dpi=110)
    try:
        write_beside(out, [picture.getbuffer()])
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}") from None
    for run in runs:
        if not run.figures:
            print(printable(f"{run.logdir} is not drawn: it has no number for {flags.y} yet"))
    for line in filter(None, (line.cut for line in lines)):
        print(printable(line))
    print(printable(f"written to {out}"))
    return 0


def draw(lines: Sequence[Curve], runs: Sequence[Run], flags: PlotFlags) -> Any:
    """A matplotlib Figure; UsageError where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            f"matplotlib cannot be imported ({error}); {how_to_install('plot')}"
        ) from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    frames = flags.x == "frames"
    unit, said = 1.0, "hours of training"
    if frames:
        unit, said = _frame_unit(max(float(line.x[-1]) for line in lines))
    for line in lines:
        label = f"{line.label} ({line.num_runs} seeds)" if line.num_runs > 1 else line.label
        alone = line.x[0] == line.x[-1]  # of which a line would show nothing
        (drawn,) = axes.plot(
            line.x / unit, line.mean, label=label, marker="o" if alone else "", markevery=[0]
        )
        if line.num_runs > 1:
            axes.fill_between(
                line.x / unit, line.low, line.high, color=drawn.get_color(), alpha=0.2, linewidth=0
            )
    axes.set_xlabel(said)
    label = _LABELS.get(flags.y, flags.y.replace("_", " "))
    bands = any(line.num_runs > 1 for line in lines)
    axes.set_ylabel(_plain(f"{label}\n({_SPREADS[flags.spread]})" if bands else label))
    levels = dict.fromkeys(run.config["level_name"] for run in runs)
    axes.set_title(_plain(flags.title or ", ".join(levels)))
    axes.grid(alpha=0.3)
    if len(lines) > 1 or lines[0].num_runs > 1:
        legend = axes.legend(fontsize="small")
        for text in legend.get_texts():
            text.set_text(_plain(textwrap.fill(text.get_text(), LABEL_WIDTH)))
    if frames and len(runs) == 1:
        (points, *_) = runs[0].figures.values()
        _add_minutes(axes, points, unit)
    return figure


def _frame_unit(most: float) -> tuple[float, str]:
    """Frames per unit of the axis, and its label."""
    if most < 1e6:
        return 1e3, "frames learned from (thousands)"
    return 1e6, "frames learned from (millions)"


def _plain(text: str) -> str:
    """Without what matplotlib takes for mathematics, or cannot write."""
    return "\n".join(map(printable, text.split("\n"))).replace("$", r"\$")


def _add_minutes(axes: Any, points: Points, unit: float) -> None:
    """A second scale below the first: minutes of training at seven places."""
    picked = points[sorted({round(i * (len(points) - 1) / 6) for i in range(7)})]
    digits = 0 if points[-1, 1] > 0.2 else 1
    minutes = axes.secondary_xaxis(-0.2)
    minutes.set_xticks(picked[:, 0] / unit)
    minutes.set_xticklabels([f"{60 * hours:.{digits}f}" for hours in picked[:, 1]])
    minutes.set_xlabel("minutes of training")
