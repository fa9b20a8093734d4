"""Tasks that say who they are when they fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

R = TypeVar("R")


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel and wait; a task that failed before has its say in its TaskGroup."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def named(name: str, work: Coroutine[Any, Any, None]) -> None:
    """Await ``work``; a note of its exception says in which task it arose."""
    try:
        await work
    except Exception as error:
        _note(name, error)
        raise


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
