"""After all faults an agent still learns: catch, struck on its way."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import NamedTuple

from endurance.accounts import Tail, read_line
from endurance.faults import END_S, damage
from endurance.programs import Broken, Place, Program, until

FRAMES = 250_000
LEAST_RETURN = 0.8
"""Of 1; a policy that has learnt nothing has about -0.6."""
WITHIN_S = 300.0
BLOWS = ("killed", "newest checkpoint damaged", "asked to end")


class Learned(NamedTuple):
    """What catch came to."""

    frames: int
    episode_return_mean: float
    problem: str


async def learn_catch(place: Place, seed: int, say: Callable[[str], None]) -> Learned:
    """Train it from the beginning; each blow falls after another quarter of the frames."""
    logdir, within_s = place.disk("catch"), place.patience * WITHIN_S
    program = Program(
        place, "catch", 0, "train", "--level_name=catch", f"--logdir={logdir}", f"--seed={seed}",
        f"--total_environment_frames={FRAMES}",
        "--report_interval_s=0.5",
        "--checkpoint_interval_s=1",
    )  # fmt: skip
    tail = Tail(logdir / "metrics.jsonl")
    frames, returned = 0, float("nan")

    def read() -> int:
        nonlocal frames, returned
        for line in filter(None, map(read_line, tail.read())):
            frames = line.frames
            returned = line.episode_return_mean or returned
        return frames

    def due(share: float) -> bool:
        if program.status is not None:
            raise Broken(program.obituary())
        enough = len([*logdir.glob("checkpoint_*.pt")]) >= 2
        return read() >= share * FRAMES and enough

    try:
        program.start()
        for number, blow in enumerate(BLOWS, 1):
            await until(functools.partial(due, number / 4), within_s, "catch came no further")
            say(f"catch: {frames:,} frames, {blow}")
            if number == 3:
                await program.end(END_S)
            else:
                await program.kill()
            if number == 2:
                newest = max(logdir.glob("checkpoint_*.pt"))
                newest.write_bytes(damage(newest.read_bytes(), random.Random(seed)))
            program.start()
        await until(lambda: program.status is not None, within_s, "catch did not end")
        if program.status:
            raise Broken(program.obituary())
    except Broken as broken:
        await program.kill()
        return Learned(read(), returned, f"catch: {broken}")
    read()
    least = f"catch: a mean return of {returned:.2f} is less than {LEAST_RETURN}"
    return Learned(frames, returned, "" if returned >= LEAST_RETURN else least)
