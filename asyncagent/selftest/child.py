"""The checks' process: ``python -m asyncagent.selftest.child``.

JSON lines on stdin and stdout: ``{"function": "module:name", "arguments": [...]}`` is answered by
``{"state": ..., "detail": ...}``.  It ends with stdin, wherever a check is at.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import sys
import threading
import traceback
from typing import Any, TextIO

from asyncagent.placement import keep_freed_memory
from asyncagent.selftest.outcome import Absent, Failed, Outcome
from asyncagent.tasks import first_of


def answer(function: str, arguments: list[Any]) -> Outcome:
    """Run one check; whatever it raises makes it fail."""
    module, _, name = function.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)(*arguments)
    except Absent as absent:
        return Outcome("not installed", _one_line(absent))
    except Exception as error:
        first = first_of(error)
        if isinstance(first, Failed):
            return Outcome("failed", _one_line(first))
        traceback.print_exc()
        return Outcome("failed", f"{type(first).__name__}: {_one_line(first)}")
    return found if isinstance(found, Outcome) else Outcome("passed", str(found))


def main(heard: TextIO, said: TextIO) -> None:
    """Answer until ``heard`` ends."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(heard, lines), name="parent", daemon=True).start()
    said.write('{"started": true}\n')
    said.flush()
    while True:
        job = json.loads(lines.get())
        said.write(json.dumps(answer(job["function"], job["arguments"])._asdict()) + "\n")
        said.flush()


def _listen(heard: TextIO, lines: queue.SimpleQueue[str]) -> None:
    for line in heard:
        lines.put(line)
    sys.stderr.flush()
    os._exit(0)  # a check may be in a call that never returns


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


if __name__ == "__main__":
    keep_freed_memory()
    # What an engine prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.stdin, answers)
