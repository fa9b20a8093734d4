"""Learning curves of recorded runs: seeds put together, each curve with its mean and its spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from asyncagent.records import Points
from asyncagent.runs import Run, by_configuration, set_apart

POINTS = 1000
"""Of a curve, at equal distances of x."""
MAX_FLAGS = 3
"""A configuration that more set apart is called by the folder of its first run."""

Axis: TypeAlias = Literal["frames", "hours"]
Spread: TypeAlias = Literal["minmax", "stderr"]
Floats: TypeAlias = npt.NDArray[np.float64]


class Curve(NamedTuple):
    """A figure of the runs that share a configuration; arrays are float64 [n]."""

    label: str
    x: Floats
    """Frames or hours."""
    mean: Floats
    low: Floats
    """Lower edge of the spread; as ``mean`` of one run."""
    high: Floats
    num_runs: int
    cut: str
    """What was left out, in a sentence; empty if nothing was."""


class _Span(NamedTuple):
    """Where a run's figure begins and ends."""

    begin: float
    end: float


def curves(runs: Sequence[Run], axis: Axis, spread: Spread, smooth: float) -> list[Curve]:
    """A curve for each configuration and figure of ``runs``; runs without a figure have none.

    Args:
      spread: of several seeds, ``minmax`` or the standard error of the mean (n - 1) on both sides.
      smooth: width of the running mean, as a share of each run's length; 0: none.
    """
    groups = [group for group in by_configuration(runs) if any(run.figures for run in group)]
    configs = [group[0].config for group in groups]
    several = len({name for run in runs for name in run.figures}) > 1
    found = []
    for group, names in zip(groups, set_apart(configs), strict=True):
        flags = [_flag(name, group[0].config.get(name)) for name in names if name != "seed"]
        said = ", ".join(flags) if len(flags) <= MAX_FLAGS else str(group[0].logdir)
        for figure in dict.fromkeys(name for run in group for name in run.figures):
            lines = [(run.logdir, run.figures[figure]) for run in group if figure in run.figures]
            part = figure.partition(".")[2].rpartition(".")[0] if several else ""
            label = ", ".join(filter(None, (said, part))) or group[0].config["level_name"]
            found.append(_curve(label, lines, axis, spread, smooth))
    return found


def _flag(name: str, value: object) -> str:
    """A flag as a legend says it."""
    if name == "level_name":
        return str(value)
    return f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"


def _curve(
    label: str, lines: Sequence[tuple[Path, Points]], axis: Axis, spread: Spread, smooth: float
) -> Curve:
    column = ("frames", "hours").index(axis)
    spans = [_Span(points[0, column], points[-1, column]) for _, points in lines]
    kept = _sharing(spans)
    apart = [str(logdir) for index, (logdir, _) in enumerate(lines) if index not in kept]
    begin, end = max(spans[i].begin for i in kept), min(spans[i].end for i in kept)
    cuts = []
    if apart:
        cuts.append(f"{', '.join(apart)} left out, with no {axis} in common with the others")
    those = f"one of the {len(kept)} runs"
    if begin - min(spans[i].begin for i in kept) > 0.01 * end:
        cuts.append(f"{those} begins at {_place(begin, axis)}, and so does their mean")
    if max(spans[i].end for i in kept) > 1.01 * end:
        cuts.append(f"{those} ends at {_place(end, axis)}, and so does their mean")
    drawn = [lines[i][1] for i in kept]
    x = np.linspace(begin, end, POINTS)
    values = np.stack(
        [_smoothed(np.interp(x, line[:, column], line[:, 2]), smooth) for line in drawn]
    )
    mean = values.mean(0)
    low = high = mean
    if len(drawn) > 1 and spread == "minmax":
        low, high = values.min(0), values.max(0)
    elif len(drawn) > 1:
        error = values.std(0, ddof=1) / math.sqrt(len(drawn))
        low, high = mean - error, mean + error
    cut = f"{label}: {'; '.join(cuts)}" if cuts else ""
    return Curve(label, x, mean, low, high, len(drawn), cut)


def _sharing(spans: Sequence[_Span]) -> list[int]:
    """Indices of those that have most in common: the most runs, of as many the longest range.

    Any range is more than a single place.
    """
    found: list[tuple[bool, int, float, list[int]]] = []
    for first in spans:
        for least in (np.nextafter(first.begin, math.inf), first.begin):
            kept = [i for i, s in enumerate(spans) if s.begin <= first.begin and s.end >= least]
            if kept:
                common = min(spans[i].end for i in kept) - max(spans[i].begin for i in kept)
                found.append((common > 0, len(kept), common, kept))
    return max(found, key=lambda one: one[:3])[3]


def _place(where: float, axis: Axis) -> str:
    return f"{where:,.0f} frames" if axis == "frames" else f"{where:.3g} hours"


def _smoothed(values: Floats, share: float) -> Floats:
    """Running mean over a window of so large a share, which at the ends is cut off."""
    half = round(share * len(values) / 2)
    if half == 0:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    left, right = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return np.asarray((sums[right] - sums[left]) / (right - left), np.float64)
