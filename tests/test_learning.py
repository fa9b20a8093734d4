"""Agents learn: a game in seconds, and what only a memory can solve only with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asyncagent.config import resolve
from asyncagent.evaluation import evaluate
from asyncagent.loop import train


def mean_return(logdir: Path, level_name: str, **flags: Any) -> float:
    """Train with a fixed seed; mean return of 500 fresh games of the final policy."""
    config = resolve(level_name, logdir=str(logdir), seed=1, report_interval_s=10.0, **flags)
    train(config)
    return evaluate(logdir, 500).mean


def test_catch_is_learnt(tmp_path: Path) -> None:
    """catch reaches a mean return of at least 0.9 within 250,000 steps; chance is -0.6."""
    assert mean_return(tmp_path, "catch", total_environment_frames=250_000) >= 0.9


def test_memory_needs_the_lstm(tmp_path: Path) -> None:
    """With an LSTM the cue is remembered over the blanks; the same net without stays at chance."""
    frames = 300_000
    with_lstm = mean_return(
        tmp_path / "lstm", "memory", use_lstm=True, total_environment_frames=frames
    )
    without = mean_return(tmp_path / "mlp", "memory", total_environment_frames=frames)
    assert with_lstm >= 0.9
    assert abs(without) <= 0.25
