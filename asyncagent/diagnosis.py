"""Where every task and every thread of the program is just now, as text for a person."""

from __future__ import annotations

import asyncio
import linecache
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

MAX_FRAMES = 50
"""Of one stack: the innermost so many are shown."""
MAX_TASKS = 500

# Frame of, and what is awaited by: coroutines, generators, asynchronous generators.
_KINDS = (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await"))


def describe_tasks(loop: asyncio.AbstractEventLoop) -> str:
    """Every unfinished task: its name, its stack (outermost call first), what it waits for.

    From any thread: what moves meanwhile may be shown as it was or as it is.
    """
    tasks = sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())
    lines = [f"Tasks ({len(tasks)}):"]
    for task in tasks[:MAX_TASKS]:
        lines.append(f"  {task.get_name()}")
        lines += [_line(frame) for frame in _frames(task.get_coro())]
        waits_for = getattr(task, "_fut_waiter", None)
        if waits_for is not None:
            lines.append(f"    waits for {repr(waits_for)[:200]}")
    if len(tasks) > MAX_TASKS:
        lines.append(f"  ... and {len(tasks) - MAX_TASKS} more")
    return "\n".join(lines)


def describe_threads() -> str:
    """Every thread of Python's: its name and its stack, outermost call first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    lines = [f"Threads ({len(frames)}):"]
    for ident, frame in sorted(frames.items(), key=lambda item: names.get(item[0], "")):
        lines.append(f"  {names.get(ident, f'not of Python, {ident}')}")
        stack = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=MAX_FRAMES)
        for entry in reversed(stack):
            lines.append(f"    {entry.filename}:{entry.lineno} in {entry.name}: {entry.line}")
    return "\n".join(lines)


def _frames(coroutine: Any) -> Iterator[FrameType]:
    """Of the coroutine, of what it awaits, of what that awaits ..."""
    for _ in range(MAX_FRAMES):
        kind = next((kind for kind in _KINDS if hasattr(coroutine, kind[0])), None)
        if kind is None:
            return
        frame = getattr(coroutine, kind[0])
        if frame is not None:
            yield frame
        coroutine = getattr(coroutine, kind[1])


def _line(frame: FrameType) -> str:
    code, number = frame.f_code, frame.f_lineno
    text = linecache.getline(code.co_filename, number).strip()
    return f"    {code.co_filename}:{number} in {code.co_qualname}: {text}"
