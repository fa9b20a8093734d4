"""Tasks that say who they are when they fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from asyncagent.errors import TaskEnded

R = TypeVar("R")


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel and wait; a task that failed before has its say in its TaskGroup."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def named(name: str, work: Coroutine[Any, Any, None]) -> None:
    """A whole task: await ``work``; a note of its exception says in which task it arose.

    Raises TaskEnded where a TaskGroup would take the end for an orderly one, or end the program:
    ``work`` raised CancelledError although nobody has cancelled the task, or SystemExit.
    """
    task = asyncio.current_task()
    assert task is not None
    task.set_name(name)
    try:
        await work
    except asyncio.CancelledError as error:
        if task.cancelling():
            raise
        raise TaskEnded(f"task {name!r} awaited something that was cancelled") from error
    except SystemExit as error:
        raise TaskEnded(f"task {name!r} raised {error!r}") from error
    except Exception as error:
        _note(name, error)
        raise


async def endless(name: str, work: Coroutine[Any, Any, None]) -> None:
    """``named``, for what must not return: TaskEnded if it does."""
    await named(name, work)
    raise TaskEnded(f"task {name!r} has ended, although it must not")


def noted(name: str, function: Callable[..., R]) -> Callable[..., R]:
    """``function``, with a note of the task in its exceptions."""

    def call(*args: Any) -> R:
        try:
            return function(*args)
        except Exception as error:
            _note(name, error)
            raise

    return call


def first_of(failures: BaseException) -> BaseException:
    """The first single exception in what may be a group of groups."""
    while isinstance(failures, BaseExceptionGroup):
        failures = failures.exceptions[0]
    return failures


def _note(name: str, error: Exception) -> None:
    """Say where it began: an exception of the inference comes out of every actor, too."""
    if not any(note.startswith("in task") for note in getattr(error, "__notes__", ())):
        error.add_note(f"in task {name!r}")
