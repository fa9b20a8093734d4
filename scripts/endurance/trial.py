"""A trial: runs that train, faults that strike them one after the other, and what is made of it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path

from endurance.faults import END_S, INJECT
from endurance.leaks import STRAY_S, Watch, files_in, left_behind
from endurance.plan import KINDS, LIMIT_S, Fault
from endurance.processes import held, look, strays
from endurance.programs import TICK_S, Broken, Place, Program, until
from endurance.recovery import Recovery, judge
from endurance.report import Outcome
from endurance.runs import CountedRun, Run, make_runs

LATE_S = 60.0
"""A recovery that is too late is still waited for so long, beyond its limit."""
START_S = 180.0
"""Longest that runs may take to start, or to start all over again."""
SHARED = Path("/dev/shm")
PAUSE_S = (0.5, 3.0)
"""Between a recovery and the next fault."""


class Trial:
    """Three runs, side by side. ``say(line)`` is told what happens."""

    def __init__(self, place: Place, say: Callable[[str], None]) -> None:
        self.outcomes: list[Outcome] = []
        self.problems: list[str] = []
        """What is wrong beside the recoveries: accounts, leaks, deaths without a fault."""
        self.doing = "starting"
        self.runs: dict[str, Run] = {}
        self.watch = Watch()
        self._place = place
        self._start_s = place.patience * START_S
        self.say = say
        self._began_s = time.monotonic()
        folders = {"temporary folder": place.temporary, "working folder": place.cwd}
        if place.has_mounts:
            folders["/dev/shm"] = SHARED
        self._folders = folders
        self._before = files_in(folders)

    @property
    def elapsed_s(self) -> float:
        """Since all runs learned, or since the beginning, if they do not yet."""
        return time.monotonic() - self._began_s

    def counted_steps(self) -> int:
        """Steps that were learned from, by the record of the net that keeps one."""
        runs = (run for run in self.runs.values() if isinstance(run, CountedRun))
        return sum(run.num_steps() for run in runs)

    async def start(self, stack: AsyncExitStack) -> None:
        """Make the runs, and wait until all of them learn."""
        self.runs = await make_runs(stack, self._place)
        for run in self.runs.values():
            self.doing = f"starting {run.name}"
            run.start()
            await run.await_whole(self._start_s)
        self._began_s = time.monotonic()

    async def strike(self, faults: Iterable[Fault], minutes: float) -> None:
        """One fault after the other, until the time is over. Broken if a run is beyond repair."""
        end_s = time.monotonic() + 60 * minutes
        for fault in faults:
            if time.monotonic() >= end_s:
                return
            run, choice = self.runs[fault.run], random.Random(fault.seed)
            outcome = await self._one(fault, run, choice)
            self.outcomes.append(outcome)
            took = "never" if outcome.recovery_s is None else f"{outcome.recovery_s:4.1f} s"
            self.say(
                f"{outcome.at_s:6.0f} s  {fault.kind:<18} {fault.run:<8} {took}  {outcome.problem}"
            )
            if outcome.recovery_s is None:
                await run.rebuild(self._start_s)
            self._look_round()
            self.doing = "nothing"
            await asyncio.sleep(choice.uniform(*PAUSE_S))
            await self._raise_the_fallen()

    async def _one(self, fault: Fault, run: Run, choice: random.Random) -> Outcome:
        self.doing = f"{fault.kind} at {fault.run}"
        run.read()
        at_s = self.elapsed_s
        recovery, broken = await self._watched(fault.kind, run, choice)
        recovery_s, problem = judge(
            fault.kind, recovery.pause_s, recovery.whole_s, self._place.patience
        )
        problem = "; ".join(words for words in (broken, problem, self._accounts(run)) if words)
        if recovery_s is None:
            problem += f": {run.missing(run.num_lines)}"
        return Outcome(fault.number, fault.kind, fault.run, at_s, recovery_s, problem)

    async def _watched(self, kind: str, run: Run, choice: random.Random) -> tuple[Recovery, str]:
        """Let a fault strike, and look until the run has recovered; what was broken on the way.

        A worker is replaced by whom it belongs to, whatever the fault still does: that is due from
        the beginning. A host cannot be back before the fault is over, nor can a learner, of which
        nothing is expected until then.
        """
        hits = KINDS[kind].hits
        limit_s = self._place.patience * LIMIT_S[hits] + LATE_S
        recovery, lines = Recovery(time.monotonic(), run.progress), run.num_lines
        async with asyncio.TaskGroup() as tasks:
            fault = tasks.create_task(_strike(kind, run, choice))
            while not fault.done():
                if hits != "learner":
                    run.read()
                    whole = hits == "worker" and not run.missing(lines)
                    recovery.see(time.monotonic(), run.progress, whole)
                await asyncio.wait({fault}, timeout=TICK_S)
            if hits == "learner":
                recovery = Recovery(time.monotonic(), run.progress)
            if hits != "worker":
                lines = run.num_lines
            recovery.over(time.monotonic(), restart=hits != "worker")
            deadline_s = time.monotonic() + limit_s
            while not recovery.complete and time.monotonic() < deadline_s and not run.fallen():
                run.read()
                recovery.see(time.monotonic(), run.progress, not run.missing(lines))
                await asyncio.sleep(TICK_S)
        return recovery, fault.result()

    def _accounts(self, run: Run) -> str:
        """What is newly wrong with them."""
        problems, run.problems = run.problems, []
        return "; ".join(problems)

    async def _raise_the_fallen(self) -> None:
        """What died without a fault is a problem, and started again."""
        for run in self.runs.values():
            run.read()
            found = self._accounts(run)
            if found:
                self._complain(found)
            if run.fallen():
                for program in run.fallen():
                    self._complain(f"without a fault, {program.obituary()}")
                await run.rebuild(self._start_s)

    def _look_round(self) -> None:
        now_s = time.monotonic()
        seen = look(self._place.mark)
        for stray in self.watch.stray(now_s, strays(seen, [one.pid for one in self._programs()])):
            self._complain(f"process {stray.pid} ({stray.state}) is nobody's: {stray.command}")
        for program in self._programs():
            self.watch.sample(now_s, program.name, program.pid, held(program.pid))

    def _programs(self) -> list[Program]:
        return [program for run in self.runs.values() for program in run.programs]

    def _complain(self, problem: str) -> None:
        self.problems.append(problem)
        self.say(f"PROBLEM: {problem}")

    async def end(self) -> None:
        """All programs in good order; then nothing of them is left, and the accounts add up."""
        self.doing = "ending"
        for program in self._programs():
            if program.status is not None:
                continue
            try:
                await program.end(END_S)
            except Broken as broken:
                self._complain(str(broken))
        with contextlib.suppress(Broken):
            await until(lambda: not look(self._place.mark), STRAY_S, "")
        for stray in look(self._place.mark).values():
            self._complain(f"process {stray.pid} is left over: {stray.command}")
        for left in left_behind(self._before, files_in(self._folders)):
            self._complain(f"left over in {left}")
        for grown in self.watch.growths():
            if grown.leaks:
                self._complain(
                    f"{grown.name} grew in {grown.seconds:.0f} s by {grown.descriptors} file "
                    f"descriptors and {grown.memory_mb:.0f} MB"
                )
        for run in self.runs.values():
            run.read()
            for problem in (
                self._accounts(run),
                *(run.audit() if isinstance(run, CountedRun) else ()),
            ):
                if problem:
                    self._complain(problem)


async def _strike(kind: str, run: Run, choice: random.Random) -> str:
    """What went wrong with the fault itself; "" if nothing did."""
    try:
        await INJECT[kind](run, choice)
    except Broken as error:
        return str(error)
    return ""
