"""One measuring process: ``python -m asyncagent.bench.child INDEX``.

JSON lines on stdin and stdout.  The first answer is ``{"started": true}``.  A job is answered by
``{"ready": true}`` once the component is warm; it goes on working.  ``"go"`` starts the
measurement, ``{"rate": steps per second}`` ends it, and the work goes on until ``"stop"``, so that
no other process measures on a machine that has become idle; ``{"stopped": true}`` is the last
answer.  ``{"usage_error": line}`` or ``{"error": line}`` may take the place of any of them: then
the process ends, as it does at the end of stdin.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO, TypeAlias

import torch

from asyncagent.bench import components, reference
from asyncagent.bench.job import Job
from asyncagent.errors import UsageError
from asyncagent.placement import keep_freed_memory

KINDS = {"ours": components.COMPONENTS, "reference": reference.COMPONENTS}

END_S = 5.0
"""Longest that the work goes on after the parent has gone."""

Say: TypeAlias = Callable[[dict[str, Any]], None]
Hear: TypeAlias = Callable[[], str | None]
"""The next word from the parent; None if there is none yet; "stop" once it has gone."""


class Meter:
    """What a component calls after each piece of work: counts steps, says when to stop.

    The measurement begins and ends where pieces do: its time is that of whole pieces.
    """

    def __init__(
        self, warm_up_s: float, seconds: float, say: Say, hear: Hear,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self._say = say
        self._hear = hear
        self._clock = clock
        self._seconds = seconds
        self._due_s = clock() + warm_up_s
        self._started_s = 0.0
        self._steps = 0
        self._stage = "warming"

    def __call__(self, steps: int) -> bool:
        """So many more steps are done; False: stop now."""
        now_s = self._clock()
        self._steps += steps
        word = self._hear()
        if word == "stop":
            self._stage = "stopped"
        if self._stage == "stopped":
            return False  # to each of the component's coroutines
        if word == "go":
            self._stage = "measuring"
            self._started_s, self._due_s, self._steps = now_s, now_s + self._seconds, 0
        elif now_s >= self._due_s and self._stage == "warming":
            self._stage = "ready"
            self._say({"ready": True})
        elif now_s >= self._due_s and self._stage == "measuring":
            self._stage = "measured"
            self._say({"rate": self._steps / (now_s - self._started_s)})
        return True


def main(index: int, heard: TextIO, said: TextIO, alone: Callable[[], None] | None = None) -> int:
    """Work at jobs until ``heard`` ends or one fails; returns the exit status.

    ``alone()`` is called on a thread once ``heard`` has ended.
    """
    torch.set_num_threads(1)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(heard, lines, alone), daemon=True).start()

    def say(answer: dict[str, Any]) -> None:
        said.write(json.dumps(answer) + "\n")
        said.flush()

    def hear() -> str | None:
        if lines.empty():
            return None
        line = lines.get()
        if line is None:
            lines.put(None)  # for the loop below
            return "stop"
        word: str = json.loads(line)
        return word

    say({"started": True})
    while (line := lines.get()) is not None:
        try:
            work(Job.decode(json.loads(line)), index, say, hear)
        except UsageError as error:
            say({"usage_error": str(error)})
            return 0
        except Exception as error:
            traceback.print_exc()
            say({"error": f"{type(error).__name__}: {error}"})
            return 1
        say({"stopped": True})
    return 0


def work(job: Job, index: int, say: Say, hear: Hear) -> None:
    """Make the component and let it run until the parent has heard enough."""
    if job.kind == "ours":
        keep_freed_memory()
    component = KINDS[job.kind][job.component](job.config, job.parameters, index)
    try:
        component.run(Meter(job.warm_up_s, job.seconds, say, hear))
    finally:
        component.close()


def _listen(
    heard: TextIO, lines: queue.SimpleQueue[str | None], alone: Callable[[], None] | None
) -> None:
    for line in heard:
        lines.put(line)
    lines.put(None)
    if alone is not None:
        alone()


def _leave() -> None:
    """Nobody hears us any more, and we may be in a call that never returns."""
    time.sleep(END_S)
    os._exit(1)


if __name__ == "__main__":
    # What an engine prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    status = main(int(sys.argv[1]), sys.stdin, answers, _leave)
    sys.stderr.flush()
    os._exit(status)  # an engine's threads may be in calls that never return
