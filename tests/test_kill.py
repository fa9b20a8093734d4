"""The program as a process: killed and resumed, stopped by a signal, dying of a fault."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from asyncagent.checkpoint import checkpoint_paths, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
WATCHDOG_S = 120


@contextmanager
def program(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """``python -m asyncagent`` with its stdout as a pipe; killed if the test leaves it behind."""
    process = subprocess.Popen(
        [sys.executable, "-m", "asyncagent", *arguments],
        stdout=subprocess.PIPE,
        stderr=None,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=WATCHDOG_S)


def train(logdir: Path) -> tuple[str, ...]:
    return (
        "train",
        "--level_name=catch",
        f"--logdir={logdir}",
        "--total_environment_frames=100000000",
        "--report_interval_s=0.2",
        "--checkpoint_interval_s=0.5",
    )


def reports(logdir: Path) -> list[dict[str, Any]]:
    lines = (logdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_until(process: subprocess.Popen[str], seen: Any) -> None:
    """Read the program's reports until ``seen()``; it prints several a second.

    What it prints before the first is of no account: it has not looked at the folder then.
    """
    assert process.stdout is not None
    for line in process.stdout:
        if "frames/s" in line and seen():
            return
    raise AssertionError("the program ended by itself")


def test_killed_in_mid_run_and_resumed(tmp_path: Path) -> None:
    """After SIGKILL frames go on from the last checkpoint, and the learning rate where it was."""
    with program(*train(tmp_path)) as process:
        read_until(process, lambda: len(checkpoint_paths(tmp_path)) >= 2)
        process.send_signal(signal.SIGKILL)
        process.wait(WATCHDOG_S)
    found = load_checkpoint(tmp_path)
    assert found is not None
    frames = found[1]["frames"]
    assert frames > 0
    with program(*train(tmp_path)) as process:
        read_until(process, lambda: reports(tmp_path)[-1]["frames"] > frames)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=WATCHDOG_S)
        assert process.returncode == 0
        assert "stopped" in output
    resumed = [report for report in reports(tmp_path) if report["frames"] > frames]
    first = resumed[0]
    initial = json.loads((tmp_path / "config.json").read_text())["learning_rate"]
    expected = initial * (1 - first["frames"] / 100_000_000)
    assert first["learning_rate"] == pytest.approx(expected)
    assert first["updates"] > found[1]["updates"]
    assert first["time_s"] > found[1]["time_s"]
    again = load_checkpoint(tmp_path)
    assert again is not None
    assert again[1]["frames"] > frames


def test_fault_ends_the_process_with_its_traceback(tmp_path: Path) -> None:
    """A net that raises while it acts ends the program: status 1, a traceback, the task's name."""
    module = tmp_path / "faulty.py"
    module.write_text(
        "import torch\n"
        "from asyncagent.bodies import MlpBody\n"
        "from asyncagent.models import ActorCritic\n"
        "class Net(ActorCritic):\n"
        "    calls = 0\n"
        "    def forward(self, *args):\n"
        "        Net.calls += 1\n"
        "        if Net.calls > 200 and not torch.is_grad_enabled():\n"
        "            raise ValueError('faulty net')\n"
        "        return super().forward(*args)\n"
        "def build(spec, use_lstm):\n"
        "    return Net(MlpBody(spec.observation), spec.actions, 0)\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = subprocess.run(
        [sys.executable, "-m", "asyncagent", *train(tmp_path / "run"), "--net=faulty:build"],
        capture_output=True,
        text=True,
        timeout=WATCHDOG_S,
        env=os.environ | environment,
    )
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last == "asyncagent train: ValueError: faulty net (in task 'inference')"
