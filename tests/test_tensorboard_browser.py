"""TensorBoard opened in a real browser: everything written is on its pages, and looks like it.

``ASYNCAGENT_SCREENSHOTS=<folder>`` keeps the pictures (``docs/tensorboard.png`` is one of them).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asyncagent.config import resolve
from asyncagent.loop import train
from asyncagent.summaries import HYPERPARAMETERS, LAYOUT, METRICS
from tests.browser import CHROMIUM, PICTURES, Browser, opened

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]

WATCHDOG_S = 300.0
RUNS: dict[str, dict[str, Any]] = {
    "catch": {"level_name": "catch", "total_environment_frames": 150_000, "learning_rate": 3e-3},
    "catch_slow": {"level_name": "catch", "total_environment_frames": 100_000},
    "breakout": {
        "level_name": "atari_breakout",
        "preset": "workstation",
        "total_environment_frames": 60_000,
        "video_interval_frames": 15_000,
    },
}


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of a few seconds each."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in RUNS.items():
        often: dict[str, Any] = {"report_interval_s": 0.25, "summary_interval_s": 0.5}
        train(resolve(logdir=str(folder / name), **flags, **often))
    return folder


def tags(logdir: Path, run: str) -> dict[str, Any]:
    events = EventAccumulator(str(logdir / run))
    events.Reload()
    found: dict[str, Any] = events.Tags()
    return found


@pytest.fixture(scope="module")
def address(logdir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """TensorBoard, which has read the runs."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port=0"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline_s = time.monotonic() + WATCHDOG_S
        while True:
            assert time.monotonic() < deadline_s and server.poll() is None, log.read_text()
            found = re.search(r"http://\S+/", log.read_text())
            if found is not None and has_read_all(found[0]):
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.2)
        yield found[0]
    finally:
        server.terminate()
        server.wait(WATCHDOG_S)


def has_read_all(address: str) -> bool:
    """Whether TensorBoard shows every run, the film included."""
    with urllib.request.urlopen(f"{address}data/plugin/timeseries/tags", timeout=30) as answer:
        found = json.load(answer)
    films = found["images"]["tagRunSampledInfo"].get("atari_breakout/video", {})
    return set(found["scalars"]["runTagInfo"]) == set(RUNS) and "breakout" in films


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with opened(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def look(browser: Browser, name: str, folder: Path, moves: bool = False) -> None:
    """Take a picture of the page; nothing went wrong on it, and it is not blank.

    Waits until all is drawn: two pictures are the same, unless something ``moves``.
    """
    assert browser.errors == []
    # A snack bar is where TensorBoard says that something failed.
    assert browser.evaluate('document.querySelectorAll("mat-snack-bar-container").length') == 0
    path = folder / f"{name}.png"
    deadline_s = time.monotonic() + WATCHDOG_S
    before = b""
    while True:
        browser.screenshot(path)
        if (moves or path.read_bytes() == before) and is_drawn(path):
            break
        assert time.monotonic() < deadline_s, f"nothing is drawn in {path}, or never enough"
        before = path.read_bytes()
        browser.rest(1.0)
    if keep := os.environ.get("ASYNCAGENT_SCREENSHOTS"):
        shutil.copy(path, keep)


def is_drawn(path: Path) -> bool:
    """Whether a screenshot shows colours: text and axes are grey, curves and bars are not."""
    with Image.open(path) as image:
        page = np.asarray(image.convert("RGB"))[120:, 340:]
    spread = page.max(axis=2).astype(int) - page.min(axis=2)
    return int((spread > 40).sum()) > 300


def test_every_curve_is_in_its_section(
    logdir: Path, address: str, browser: Browser, tmp_path: Path
) -> None:
    """The time series page has a section for each, with a card for everything written."""
    cards: dict[str, list[str]] = {}
    curves = {tag for run in RUNS for tag in tags(logdir, run)["scalars"]}
    pictures = [tag for run in RUNS for kind in ("histograms", "images") for tag in
                tags(logdir, run)[kind]]  # fmt: skip
    for tag in [*curves, *pictures]:  # all runs' curves share a card
        cards.setdefault(tag.split("/")[0], []).append(tag)
    assert set(cards) == {
        *("score", "speed", "learning", "system", "catch", "atari_breakout"),
        *("action", "learning_rate", "total_loss"),
    }
    browser.go(f"{address}#timeseries")
    browser.wait_for(
        [f"{name} {len(of)} cards" if len(of) > 1 else name for name, of in cards.items()]
    )
    look(browser, "timeseries", tmp_path)
    for section, of_section in cards.items():
        browser.go(f"{address}?tagFilter=%5E{section}(%2F%7C%24)#timeseries")
        browser.wait_for(sorted(set(of_section))[:5])  # the others are made when scrolled to
        if section == "score":
            look(browser, section, tmp_path)


def test_overview(address: str, browser: Browser, tmp_path: Path) -> None:
    """The custom scalars page shows the layout's charts, with curves in those seen first."""
    browser.go(f"{address}#custom_scalars")
    charts = [chart.title for chart in LAYOUT["overview"]]
    browser.wait_for([*LAYOUT, *charts, "Matches (3)"])
    look(browser, "custom_scalars", tmp_path)
    text = browser.wait_for([*LAYOUT])
    assert "Matches(6)" in text  # frames per second, learned from and acted, of three runs
    assert "Matches(0)" not in text.split("wherethetimegoes")[0]


def test_histograms(logdir: Path, address: str, browser: Browser, tmp_path: Path) -> None:
    """Actions, returns, policy lags and batch sizes."""
    expected = ["action", "score/episode_return", "learning/policy_lag"]
    expected.append("speed/inference_batch_rows")
    assert set(expected) == set(tags(logdir, "catch")["histograms"])
    browser.go(f"{address}#histograms")
    browser.wait_for(["action", "score", "learning", "speed"])
    look(browser, "histograms", tmp_path)


def test_hyperparameters(address: str, browser: Browser, tmp_path: Path) -> None:
    """The runs are rows of one table, with what was asked for and what came of it."""
    browser.go(f"{address}#hparams")
    names = [*HYPERPARAMETERS, *METRICS.values()]
    browser.wait_for([*names, *RUNS, "0.0030000", "atari_breakout"])
    look(browser, "hparams", tmp_path)


def test_flags(address: str, browser: Browser, tmp_path: Path) -> None:
    """Every flag of a run can be read."""
    browser.go(f"{address}#text")
    browser.wait_for(["flags", "total_environment_frames", "150000"])
    look(browser, "text", tmp_path)


def test_clip(logdir: Path, address: str, browser: Browser, tmp_path: Path) -> None:
    """The agent's game is on the images page, and is a picture that the browser can show."""
    assert tags(logdir, "breakout")["images"] == ["atari_breakout/video"]
    browser.go(f"{address}#images")
    browser.wait_for(["atari_breakout/video", "step"])
    browser.wait_until(f"{PICTURES.strip()}.includes(84)")
    look(browser, "images", tmp_path, moves=True)
