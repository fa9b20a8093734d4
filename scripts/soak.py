#!/usr/bin/env python3
"""Atari and ViZDoom train side by side for an hour: do memory, descriptors and speed stay level?

    python scripts/soak.py [--minutes=60] [--out=soak.jsonl] [--preset=paper] [--keep]

Every 10 s a line per run goes to --out: frames, and the memory and file descriptors of the learner
with its workers.  In the end, and the exit status is 1 unless all of it holds for both runs:

- memory of the last 10 minutes: at most a twentieth and 32 MB above that of the 10 after warm-up;
- file descriptors: at most 4 more;
- frames/s of the last 10 minutes: at least 0.97 of those of the first 10 after warm-up.

Warm-up are the first 5 minutes.  In a shorter soak all these times are shorter, in proportion.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from endurance.accounts import Tail, read_line
from endurance.faults import END_S
from endurance.flags import Parser, positive
from endurance.processes import family, held, look
from endurance.programs import Broken, Place, Program, until

LEVELS = ("atari_breakout", "doom_benchmark")
SAMPLE_S = 10.0
START_S = 300.0
WARM_UP, WINDOW = 5 / 60, 10 / 60
"""Shares of the whole soak."""
LEAST_MINUTES = 3 * SAMPLE_S / 60 / WINDOW
MEMORY, SLACK_MB = 1.05, 32.0
DESCRIPTORS = 4
SPEED = 0.97


class Sample(NamedTuple):
    """One run at one moment."""

    at_s: float
    """Since both runs learn."""
    frames: int
    memory_mb: float
    """Resident, of the learner and all its descendants."""
    descriptors: int


class Verdict(NamedTuple):
    """What one run's samples come to."""

    memory_mb: tuple[float, float]
    """Medians after warm-up and in the end; so the others."""
    descriptors: tuple[float, float]
    frames_per_s: tuple[float, float]
    failed: tuple[str, ...]
    """Of "memory", "descriptors" and "speed", what did not hold."""


def judge(samples: Sequence[Sample]) -> Verdict:
    """ValueError where there are too few samples to say anything."""
    end_s = samples[-1].at_s if samples else 0.0
    begin_s = samples[0].at_s if samples else 0.0
    length_s = end_s - begin_s
    from_s = begin_s + WARM_UP * length_s
    early = [one for one in samples if from_s <= one.at_s <= from_s + WINDOW * length_s]
    late = [one for one in samples if one.at_s >= end_s - WINDOW * length_s]
    if min(len(early), len(late)) < 2:
        raise ValueError(f"{len(samples)} samples are too few")

    def speed(some: Sequence[Sample]) -> float:
        return (some[-1].frames - some[0].frames) / (some[-1].at_s - some[0].at_s)

    memory = _medians([one.memory_mb for one in early], [one.memory_mb for one in late])
    files = _medians([one.descriptors for one in early], [one.descriptors for one in late])
    speeds = speed(early), speed(late)
    holds = {
        "memory": memory[1] <= MEMORY * memory[0] + SLACK_MB,
        "descriptors": files[1] <= files[0] + DESCRIPTORS,
        "speed": speeds[1] >= SPEED * speeds[0] > 0,
    }
    return Verdict(memory, files, speeds, tuple(name for name in holds if not holds[name]))


def _medians(early: Sequence[float], late: Sequence[float]) -> tuple[float, float]:
    return statistics.median(early), statistics.median(late)


def as_text(verdicts: Mapping[str, Verdict]) -> str:
    """A line for each run."""
    return "\n".join(
        f"{level:<16}{one.memory_mb[0]:8,.0f} -> {one.memory_mb[1]:,.0f} MB"
        f"{one.descriptors[0]:8.0f} -> {one.descriptors[1]:.0f} file descriptors"
        f"{one.frames_per_s[0]:12,.0f} -> {one.frames_per_s[1]:,.0f} frames/s "
        f"({one.frames_per_s[1] / max(one.frames_per_s[0], 1e-9):.3f})   "
        + (f"FAILED: {', '.join(one.failed)}" if one.failed else "pass")
        for level, one in verdicts.items()
    )


class Soaked:
    """One run that is watched."""

    def __init__(self, place: Place, level: str, preset: str) -> None:
        logdir = place.folder / level
        self.level = level
        self.samples: list[Sample] = []
        self.program = Program(
            place, f"{level}-log", 0, "train", f"--level_name={level}", f"--logdir={logdir}",
            f"--preset={preset}",
            "--report_interval_s=1",
            "--total_environment_frames=100000000000",
        )  # fmt: skip
        self._place = place
        self._tail = Tail(logdir / "metrics.jsonl")
        self._frames = 0

    def frames(self) -> int:
        """Of the last report; Broken once the run has ended."""
        if self.program.status is not None:
            raise Broken(self.program.obituary())
        for line in filter(None, map(read_line, self._tail.read())):
            self._frames = line.frames
        return self._frames

    def sample(self, at_s: float, out: TextIO) -> None:
        """Take one, and write it down."""
        frames = self.frames()
        everybody = family(self.program.pid, look(self._place.mark))
        found = [one for one in (held(seen.pid) for seen in everybody) if one is not None]
        sample = Sample(
            round(at_s, 3),
            frames,
            round(sum(one.memory_mb for one in found), 1),
            sum(one.descriptors for one in found),
        )
        self.samples.append(sample)
        out.write(json.dumps({"level": self.level, **sample._asdict()}) + "\n")
        out.flush()


async def _soak(flags: argparse.Namespace, place: Place, out: TextIO) -> int:
    console = Console(highlight=False)
    runs = [Soaked(place, level, flags.preset) for level in LEVELS]
    try:
        for run in runs:
            run.program.start()
        for run in runs:
            await until(run.frames, START_S, f"{run.level} learns nothing")
        began_s = time.monotonic()
        with console.status("") as status:
            while (at_s := time.monotonic() - began_s) < 60 * flags.minutes:
                for run in runs:
                    run.sample(at_s, out)
                last = (f"{run.level} {run.samples[-1].memory_mb:,.0f} MB" for run in runs)
                status.update(f"{at_s / 60:.1f} of {flags.minutes:g} min  " + "  ".join(last))
                # Sampled at even distances, however long a sample takes.
                await asyncio.sleep(SAMPLE_S - (time.monotonic() - began_s) % SAMPLE_S)
        for run in runs:
            await run.program.end(END_S)
    except Broken as broken:
        console.print(f"FAILED: {broken}", markup=False, soft_wrap=True)
        return 1
    verdicts = {run.level: judge(run.samples) for run in runs}
    console.print(as_text(verdicts), markup=False, soft_wrap=True)
    return 1 if any(verdict.failed for verdict in verdicts.values()) else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags; SystemExit with status 2, after one line, if they are wrong."""
    parser = Parser(prog="soak.py", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=positive, default=60.0, help="after both runs began")
    parser.add_argument("--out", type=Path, default=Path("soak.jsonl"), help="file for samples")
    parser.add_argument("--preset", choices=("paper", "workstation"), default="paper")
    parser.add_argument("--keep", action="store_true", help="keep logs and reports, and say where")
    flags = parser.parse_args(arguments)
    if flags.minutes < LEAST_MINUTES:
        parser.error(f"--minutes={flags.minutes:g} must be >= {LEAST_MINUTES:g}: too few samples")
    if not flags.out.absolute().parent.is_dir():
        parser.error(f"--out={str(flags.out)!r}: there is no such folder")
    return flags


def main() -> None:
    """Parse the flags, and end with the status."""
    flags = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="asyncagent-soak-"))
    place = Place(folder, has_mounts=False, seed=1)
    try:
        with flags.out.open("w") as out:
            sys.exit(asyncio.run(_soak(flags, place, out)))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        place.kill_all()
        if flags.keep:
            print(f"logs and reports are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
