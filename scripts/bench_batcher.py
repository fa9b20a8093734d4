#!/usr/bin/env python3
"""How fast is the dynamic batcher: requests/s of one row, rows/s in requests of 64 rows.

A thousand coroutines ask (sixteen for requests of 64 rows), the batched function hands its input
back on the batcher's own thread, the loop is uvloop: what is measured is the batcher.  The two
measurements are interleaved, so that a noisy neighbour hits both.

    python scripts/bench_batcher.py [--json] [--seconds S] [--rounds N]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from asyncagent.batcher import DynamicBatcher, Nest

ROW = 8  # float32 values per row


async def rows_per_s(callers: int, rows: int, seconds: float) -> float:
    """Rows answered per second to ``callers`` coroutines that ask for ``rows`` rows each."""
    stop_s = time.perf_counter() + seconds
    requests = 0

    async def caller(batcher: DynamicBatcher) -> None:
        nonlocal requests
        x = np.zeros((rows, ROW), np.float32)
        while time.perf_counter() < stop_s:
            await batcher(x)
            requests += 1

    with DynamicBatcher(echo) as batcher:
        started_s = time.perf_counter()
        await asyncio.gather(*(caller(batcher) for _ in range(callers)))
        return requests * rows / (time.perf_counter() - started_s)


def echo(x: Nest) -> Nest:
    """The batched function."""
    return x


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind")
    flags = parser.parse_args()
    kinds = {"single_row_requests_per_s": (1000, 1), "rows_of_64_per_s": (16, 64)}
    samples: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(flags.rounds):
        for kind, (callers, rows) in kinds.items():
            samples[kind].append(uvloop.run(rows_per_s(callers, rows, flags.seconds)))
    results = {
        kind: {"median": statistics.median(s), "min": min(s), "max": max(s)}
        for kind, s in samples.items()
    }
    if flags.json:
        print(json.dumps(results))
        return
    for kind, result in results.items():
        print(f"{kind:26s} median {result['median']:12,.0f}", end="")
        print(f"   spread {result['min']:,.0f} to {result['max']:,.0f}")


if __name__ == "__main__":
    main()
