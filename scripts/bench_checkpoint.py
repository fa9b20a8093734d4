#!/usr/bin/env python3
"""For how long does a checkpoint keep the learner and the event loop from their work?

The deep network with its LSTM, as ``asyncagent train --net=deep --use_lstm`` saves it: the
learner's thread copies the state between two updates (the pause), the thread of files writes it
while all else goes on.  The loop's lateness is the longest that a timer of 1 ms was late during a
save, and, to compare it with, during as much time without one.  On a machine that does other work
the thread's own time says more than the clock.

    python scripts/bench_checkpoint.py [--json] [--saves N] [--device D] [--folder PATH]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from asyncagent.config import resolve
from asyncagent.learner import Learner
from asyncagent.models import make_net
from asyncagent.saving import Saver
from asyncagent.structs import ArraySpec, Discrete, EnvSpec
from asyncagent.threads import NamedThread

TICK_S = 0.001
FIGURES = {
    "pause": "the learner's thread copies",
    "pause_cpu": "... in its own time",
    "write": "the files' thread writes",
    "loop_late": "the event loop was late",
    "loop_late_without": "... without a save",
}


def make_learner(device: torch.device) -> Learner:
    """A learner of the deep network with LSTM whose optimiser has made a step."""
    config = resolve("atari_pong", net="deep", use_lstm=True)
    spec = EnvSpec(ArraySpec((4, 84, 84), "uint8"), Discrete(6), 4)
    net = make_net(config.net, spec, config.use_lstm, config.seed)
    learner = Learner(config, net, spec.actions, device, torch.float32)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner._optimizer.step()
    return learner


class Lateness:
    """How late a ticking event loop was."""

    def __init__(self) -> None:
        self.worst_s = 0.0

    async def tick(self) -> None:
        """Look at the clock again and again."""
        while True:
            began_s = time.perf_counter()
            await asyncio.sleep(TICK_S)
            self.worst_s = max(self.worst_s, time.perf_counter() - began_s - TICK_S)

    def take_ms(self) -> float:
        """The longest since the last call."""
        worst_s, self.worst_s = self.worst_s, 0.0
        return 1000 * worst_s


async def measure(learner: Learner, folder: Path, saves: int) -> dict[str, list[float]]:
    """FIGURES, in milliseconds, of ``saves`` saves."""
    saver = Saver(resolve("atari_pong", logdir=str(folder)), folder)
    learning, files = NamedThread("learner"), NamedThread("files")
    lateness = Lateness()
    ticking = asyncio.create_task(lateness.tick())
    found: dict[str, list[float]] = {name: [] for name in FIGURES}

    def snapshot() -> dict[str, Any]:
        began_s, cpu_s = time.perf_counter(), time.thread_time()
        state = learner.state()
        found["pause_cpu"].append(1000 * (time.thread_time() - cpu_s))
        found["pause"].append(1000 * (time.perf_counter() - began_s))
        return state

    for number in range(saves):
        lateness.take_ms()
        began_s = time.perf_counter()
        state = await learning.run(snapshot)
        counters = {"counters": {"episodes": []}, "episode_return_mean": 0.0}
        write_s = time.perf_counter()
        await files.run(saver.save, state | counters | {"frames": number})
        ended_s = time.perf_counter()
        found["write"].append(1000 * (ended_s - write_s))
        found["loop_late"].append(lateness.take_ms())
        await asyncio.sleep(ended_s - began_s)
        found["loop_late_without"].append(lateness.take_ms())
    ticking.cancel()
    learning.close()
    files.close()
    learner.close()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--saves", type=int, default=50, help="checkpoints to write")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--folder", default=None, help="where to write them (default: temporary)")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    learner = make_learner(torch.device(flags.device))
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        found = uvloop.run(measure(learner, Path(folder), flags.saves))
        size = max(path.stat().st_size for path in Path(folder).glob("*.pt"))
    results: dict[str, Any] = {
        f"{name}_ms": {"median": round(statistics.median(ms), 2), "max": round(max(ms), 2)}
        for name, ms in found.items()
    }
    results |= {"saves": flags.saves, "megabytes": round(size / 1e6, 1)}
    if flags.json:
        print(json.dumps(results))
        return
    print(f"{flags.saves} checkpoints of {results['megabytes']} MB, milliseconds:")
    for name, words in FIGURES.items():
        result = results[f"{name}_ms"]
        print(f"  {words:28s} median {result['median']:8.2f}   largest {result['max']:8.2f}")


if __name__ == "__main__":
    main()
