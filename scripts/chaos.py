#!/usr/bin/env python3
"""Faults at random, by seed, while Atari, ViZDoom and actor hosts train: does all of it go on?

Three runs train side by side: Atari with actors of its own and two actor hosts over encrypted
connections, ViZDoom in worker processes, and a level whose net writes down every step that it
learns from, with workers and two hosts.  Faults strike them one after the other: processes are
killed and stopped, connections cut, ports, files and descriptors taken away or spoilt (--list
shows the kinds).  What a user or systemd would start again is started again, with the same command
line.  Frames must go on meanwhile, and all that was there must be back: within 15 s, or 30 s
where the learner was struck.  No frame may be counted twice, nothing may be left over or grow
without end, and a run of catch that is struck three times must have learnt in the end.

    python scripts/chaos.py --minutes=20 --seed=1 [--json=FILE] [--keep] [--only=KIND,...]
                            [--patience=1]

Exit status: 0, 1 if anything was not survived, 2 for wrong flags.  Best as root (or where users may
have mount namespaces): then the runs have small disks of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from endurance.flags import Parser, enter_own_mounts, positive
from endurance.learning import Learned, learn_catch
from endurance.plan import KINDS, plan
from endurance.programs import DISK_MB, Broken, Place, mount
from endurance.report import as_json, as_markdown, as_text, rows
from endurance.trial import SHARED, Trial

LEAST_TRIED = 3
FAREWELL_S = 0.2
"""In which the relays' connections end."""
KEPT_MB = 4 * DISK_MB


def main() -> None:
    """Parse the flags, and end with the status."""
    flags = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    has_mounts = enter_own_mounts()
    if has_mounts:
        mount(SHARED, KEPT_MB)
    else:
        print("no mounts of our own: a file size limit stands for the full disk", file=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix="asyncagent-chaos-"))
    place = Place(folder, has_mounts, flags.seed, flags.patience)
    try:
        sys.exit(asyncio.run(_run(flags, place)))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        place.kill_all()
        if flags.keep:
            kept = shutil.copytree(folder, f"{folder}-kept", ignore=shutil.ignore_patterns("*.pt"))
            print(f"logs and reports are in {kept}")
        place.unmount()
        shutil.rmtree(folder, ignore_errors=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags; SystemExit with status 2, after one line, if they are wrong."""
    parser = Parser(prog="chaos.py", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=positive, default=20.0, help="of faults")
    parser.add_argument("--seed", type=int, default=1, help="of the faults")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--keep", action="store_true", help="keep the logs, and say where")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of faults, with commas")
    parser.add_argument(
        "--patience", type=positive, default=1.0, help="times longer than the limits say"
    )
    parser.add_argument("--list", action="store_true", help="show the kinds, and end")
    flags = parser.parse_args(arguments)
    flags.only = flags.only.split(",")
    unknown = sorted(set(flags.only) - set(KINDS))
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} must be of {', '.join(KINDS)}")
    if flags.json is not None and not flags.json.absolute().parent.is_dir():
        parser.error(f"--json={str(flags.json)!r}: there is no such folder")
    if flags.list:
        for name, kind in KINDS.items():
            print(f"{name:<20}{kind.what}")
        sys.exit(0)
    return flags


async def _run(flags: argparse.Namespace, place: Place) -> int:
    """The whole trial; the exit status."""
    console = Console(highlight=False)
    trial = Trial(place, lambda line: console.print(line, markup=False, soft_wrap=True))
    learned: Learned | None = None
    try:
        async with contextlib.AsyncExitStack() as stack:
            with _shown(trial, flags.minutes, console):
                try:
                    await trial.start(stack)
                    has = {name: run.has for name, run in trial.runs.items()}
                    await trial.strike(plan(flags.seed, has, flags.only), flags.minutes)
                except Broken as broken:
                    trial.problems.append(f"given up: {broken}")
                await trial.end()
                trial.doing = "catch"
                learned = await learn_catch(place, flags.seed, trial.say)
    finally:
        await asyncio.sleep(FAREWELL_S)
        _tell(trial, learned, flags, console)
    good = not trial.problems and all(outcome.survived for outcome in trial.outcomes)
    return 0 if good and learned is not None and not learned.problem else 1


@contextlib.contextmanager
def _shown(trial: Trial, minutes: float, console: Console) -> Iterator[None]:
    """A live line where stdout is a terminal."""
    progress = Progress(
        TextColumn("{task.fields[faults]} faults, {task.fields[lost]} not survived"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        disable=not console.is_terminal,
    )
    task = progress.add_task("starting", total=60 * minutes, faults=0, lost=0)

    async def update() -> None:
        while True:
            progress.update(
                task,
                description=trial.doing,
                completed=trial.elapsed_s,
                faults=len(trial.outcomes),
                lost=sum(not outcome.survived for outcome in trial.outcomes),
            )
            await asyncio.sleep(0.25)

    with progress:
        updating = asyncio.get_running_loop().create_task(update())
        try:
            yield
        finally:
            updating.cancel()


def _tell(
    trial: Trial, learned: Learned | None, flags: argparse.Namespace, console: Console
) -> None:
    table = rows(trial.outcomes, flags.patience)
    lines = ["", as_text(table), "", as_markdown(table), ""]
    rare = [row.kind for row in table if row.tried < LEAST_TRIED]
    if rare:
        lines.append(f"fewer than {LEAST_TRIED} times: {', '.join(rare)}")
    for grown in trial.watch.growths():
        lines.append(
            f"{grown.name}: {grown.descriptors:+d} file descriptors, {grown.memory_mb:+.0f} MB in "
            f"{grown.seconds:.0f} s"
        )
    lines += [f"PROBLEM: {problem}" for problem in trial.problems]
    lines += [
        f"not survived: fault {outcome.number}, {outcome.kind} at {outcome.run}: {outcome.problem}"
        for outcome in trial.outcomes
        if not outcome.survived
    ]
    lines.append(f"frames counted exactly: {trial.counted_steps():,}")
    if learned is not None:
        lines.append(
            learned.problem
            or f"catch, struck three times: mean return {learned.episode_return_mean:.2f} after "
            f"{learned.frames:,} frames"
        )
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    if flags.json is not None:
        figures = as_json(
            trial.outcomes,
            table,
            minutes=flags.minutes,
            seed=flags.seed,
            patience=flags.patience,
            problems=trial.problems,
            growth=[grown._asdict() for grown in trial.watch.growths()],
            catch=None if learned is None else learned._asdict(),
        )
        flags.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
