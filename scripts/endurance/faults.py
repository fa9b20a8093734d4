"""What each kind of fault does to a run; see ``plan`` for the kinds.

A fault is over when its function returns: everything has been asked to go on, and what a user, or
systemd, would have started again has been.  Broken: it went wrong on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from endurance import rubbish
from endurance.plan import HOLDS_S
from endurance.processes import Seen, family
from endurance.programs import TICK_S, Broken, Program, until
from endurance.runs import Run

END_S = 45.0
"""Longest that a learner may take to end in good order."""
CHUNK = 1 << 20


async def _hold(kind: str, choice: random.Random) -> None:
    await asyncio.sleep(choice.uniform(*HOLDS_S[kind]))


async def _worker(run: Run, choice: random.Random) -> Seen:
    """One of the run's workers."""
    await until(run.workers, 10, f"{run.name} has no worker")
    return choice.choice(run.workers())


def _host(run: Run, choice: random.Random) -> tuple[str, Program]:
    return choice.choice(sorted(run.hosts.items(), key=lambda item: item[0]))


def _kill(pid: int, number: signal.Signals) -> None:
    # It may be gone already: workers come and go.
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@asynccontextmanager
async def _stopped(pid: int) -> AsyncIterator[None]:
    _kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        _kill(pid, signal.SIGCONT)


# Workers.


async def kill_worker(run: Run, choice: random.Random) -> None:
    _kill((await _worker(run, choice)).pid, signal.SIGKILL)


async def stop_worker(run: Run, choice: random.Random) -> None:
    async with _stopped((await _worker(run, choice)).pid):
        await _hold("stop_worker", choice)


async def close_descriptors(run: Run, choice: random.Random) -> None:
    _kill((await _worker(run, choice)).pid, signal.SIGUSR1)


async def no_descriptors(run: Run, choice: random.Random) -> None:
    worker = await _worker(run, choice)
    soft, hard = resource.prlimit(run.learner.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(run.learner.pid, resource.RLIMIT_NOFILE, (3, hard))
    try:
        _kill(worker.pid, signal.SIGKILL)
        await _hold("no_descriptors", choice)
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(run.learner.pid, resource.RLIMIT_NOFILE, (soft, hard))


# Hosts.


async def kill_host(run: Run, choice: random.Random) -> None:
    _, host = _host(run, choice)
    await host.kill()
    host.start()


async def stop_host(run: Run, choice: random.Random) -> None:
    async with _stopped(_host(run, choice)[1].pid):
        await _hold("stop_host", choice)


async def end_host(run: Run, choice: random.Random) -> None:
    _, host = _host(run, choice)
    await host.end(END_S)
    host.start()


async def cut_host(run: Run, choice: random.Random) -> None:
    relay = run.relays[_host(run, choice)[0]]
    relay.cut()
    try:
        await _hold("cut_host", choice)
    finally:
        relay.mend()


async def reset_host(run: Run, choice: random.Random) -> None:
    run.relays[_host(run, choice)[0]].reset()


# The port.


async def garbage(run: Run, choice: random.Random) -> None:
    await rubbish.send_bytes(run.port, rubbish.garbage(choice))


async def malformed_zmtp(run: Run, choice: random.Random) -> None:
    await rubbish.send_bytes(run.port, rubbish.malformed_zmtp(choice))


async def wrong_key(run: Run, choice: random.Random) -> None:
    try:
        await rubbish.knock(run.port, run.keys, choice)
    except PermissionError as error:
        raise Broken(str(error)) from None


async def nonsense(run: Run, choice: random.Random) -> None:
    await rubbish.talk_nonsense(run.port, run.keys, choice)


# The learner.


async def kill_learner(run: Run, choice: random.Random) -> None:
    await run.kill_learner()
    run.start_learner()


async def stop_learner(run: Run, choice: random.Random) -> None:
    async with _stopped(run.learner.pid):
        await _hold("stop_learner", choice)
        run.read()  # what it wrote until then shows nothing


async def end_learner(run: Run, choice: random.Random) -> None:
    try:
        await run.learner.end(END_S)
    finally:
        if run.learner.status is not None:
            run.read()
            run.floor = run.frames if run.learner.status == 0 else 0
            run.start_learner()


async def power_cut(run: Run, choice: random.Random) -> None:
    seen = run.seen()
    struck = [one.pid for program in run.programs for one in family(program.pid, seen)]
    for pid in struck:
        _kill(pid, signal.SIGKILL)
    for program in run.programs:
        await program.kill()
    run.read()
    _tear(run.logdir / "metrics.jsonl", choice)
    for path in run.checkpoints()[:1]:
        whole = path.read_bytes()
        (run.logdir / f"{path.stem}9.tmp").write_bytes(whole[: choice.randrange(len(whole))])
    run.start()


def _tear(path: Path, choice: random.Random) -> None:
    """A file whose last bytes did not reach the disk, and zeros where they were to be."""
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.truncate(max(0, size - choice.randrange(1, 200)))
        file.seek(0, os.SEEK_END)
        file.write(bytes(choice.randrange(100)))


async def damaged_checkpoint(run: Run, choice: random.Random) -> None:
    await until(lambda: len(run.checkpoints()) >= 2, 30, "there are no two checkpoints")
    await run.kill_learner()
    newest = run.checkpoints()[0]
    newest.write_bytes(damage(newest.read_bytes(), choice))
    run.damaged = int(newest.stem.rpartition("_")[2])
    run.start_learner()


def damage(whole: bytes, choice: random.Random) -> bytes:
    """A file as something else than its writer left it; never as it was."""
    some = bytearray(whole)
    match choice.randrange(5):
        case 0:
            return whole[: choice.randrange(len(whole))]
        case 1:
            for _ in range(8):
                some[choice.randrange(len(some))] ^= 1 << choice.randrange(8)
        case 2:
            at = choice.randrange(len(some))
            lost = some[at : at + 4096]
            some[at : at + 4096] = bytes(len(lost))
        case 3:
            return choice.randbytes(len(whole))
        case 4:
            return b""
    return bytes(some) if some != whole else whole[:-1]


async def full_disk(run: Run, choice: random.Random) -> None:
    async with _full(run):
        await _hold("full_disk", choice)
        if run.learner.status is not None:
            raise Broken(run.learner.obituary())
        run.read()


@asynccontextmanager
async def _full(run: Run) -> AsyncIterator[None]:
    """Fill the disk; without one of the run's own, let its learner write no byte to any file."""
    if not run.place.has_mounts:
        soft, hard = resource.prlimit(run.learner.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(run.learner.pid, resource.RLIMIT_FSIZE, (0, hard))
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(run.learner.pid, resource.RLIMIT_FSIZE, (soft, hard))
        return
    ballast = run.logdir / "ballast"
    filling = asyncio.create_task(_fill(ballast))
    try:
        yield
    finally:
        filling.cancel()
        ballast.unlink(missing_ok=True)


async def _fill(ballast: Path) -> None:
    """Take all room there is, and what becomes free."""
    with ballast.open("wb", buffering=0) as file:
        while True:
            for size in (CHUNK, 4096):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass
            await asyncio.sleep(TICK_S)


Injection = Callable[[Run, random.Random], Awaitable[None]]

INJECT: Mapping[str, Injection] = {
    injection.__name__: injection
    for injection in (
        *(kill_worker, stop_worker, close_descriptors, no_descriptors),
        *(kill_host, stop_host, end_host, cut_host, reset_host),
        *(garbage, malformed_zmtp, wrong_key, nonsense),
        *(kill_learner, stop_learner, end_learner, power_cut, damaged_checkpoint, full_disk),
    )
}
