"""Learning curves of recorded runs: seeds put together, each curve with its mean and its spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from asyncagent.runs import Points, Run, by_configuration, differing

POINTS = 1000
"""Of a curve, at equal distances of x."""

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


def curves(runs: Sequence[Run], axis: Axis, spread: Spread, smooth: float) -> list[Curve]:
    """A curve for each configuration and figure of ``runs``; runs without a figure have none.

    Args:
      spread: of several seeds, ``minmax`` or the standard error of the mean (n - 1) on both sides.
      smooth: width of the running mean, as a share of each run's length; 0: none.
    """
    groups = [group for group in by_configuration(runs) if any(run.figures for run in group)]
    configs = [group[0].config for group in groups]
    names = [name for name in differing(configs) if name != "seed"]
    several = len({name for run in runs for name in run.figures}) > 1
    found = []
    for group in groups:
        said = ", ".join(_flag(name, group[0].config.get(name)) for name in names)
        for figure in dict.fromkeys(name for run in group for name in run.figures):
            lines = [run.figures[figure] for run in group if figure in run.figures]
            part = figure.partition(".")[2].rpartition(".")[0] if several else ""
            label = ", ".join(filter(None, (said, part))) or group[0].config["level_name"]
            found.append(_curve(label, lines, axis, spread, smooth))
    return found


def _flag(name: str, value: object) -> str:
    """A flag as a legend says it."""
    if name == "level_name":
        return str(value)
    return f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"


def _curve(label: str, lines: Sequence[Points], axis: Axis, spread: Spread, smooth: float) -> Curve:
    column = ("frames", "hours").index(axis)
    begin = max(line[0, column] for line in lines)
    ends = [line[-1, column] for line in lines]
    cut = ""
    if begin >= min(ends) and len(lines) > 1:
        lines, ends = lines[:1], ends[:1]  # nothing in common
        begin = lines[0][0, column]
        cut = f"{label}: the runs have no {axis} in common, only the first is drawn"
    elif max(ends) > 1.01 * min(ends):
        end = f"{min(ends):,.0f} frames" if axis == "frames" else f"{min(ends):.3g} hours"
        cut = f"{label}: one of the {len(lines)} runs ends at {end}, and so does their mean"
    x = np.linspace(begin, min(ends), POINTS)
    values = np.stack(
        [_smoothed(np.interp(x, line[:, column], line[:, 2]), smooth) for line in lines]
    )
    mean = values.mean(0)
    low = high = mean
    if len(lines) > 1 and spread == "minmax":
        low, high = values.min(0), values.max(0)
    elif len(lines) > 1:
        error = values.std(0, ddof=1) / math.sqrt(len(lines))
        low, high = mean - error, mean + error
    return Curve(label, x, mean, low, high, len(lines), cut)


def _smoothed(values: Floats, share: float) -> Floats:
    """Running mean over a window of so large a share, which at the ends is cut off."""
    half = round(share * len(values) / 2)
    if half == 0:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    left, right = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return np.asarray((sums[right] - sums[left]) / (right - left), np.float64)
