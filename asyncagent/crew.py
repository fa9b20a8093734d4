"""Several threads that share one piece of work out among themselves."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

from asyncagent.threads import NamedThread

T = TypeVar("T")


class Crew:
    """The calling thread and helpers of its own; belongs to the one thread that calls ``share``."""

    def __init__(self, name: str, num_threads: int, prepare: Callable[[], None]) -> None:
        """``num_threads`` counts the caller; ``prepare`` is called once on every helper.

        What it raises comes out of the next ``share``.
        """
        self.num_threads = num_threads
        self._helpers = [NamedThread(f"{name}-{index}") for index in range(1, num_threads)]
        self._unprepared: list[BaseException] = []

        def begin() -> None:
            try:
                prepare()
            except BaseException as error:
                self._unprepared.append(error)

        for helper in self._helpers:
            helper.submit(begin)

    def share(self, function: Callable[[T], None], items: Iterable[T]) -> None:
        """Call ``function(item)`` for every item, whoever is free takes the next.

        Returns when all calls have ended.  Raises what the first call to fail raised; items that
        nobody had begun by then are left out.
        """
        waiting = deque(items)
        failures: list[BaseException] = []
        ended: queue.SimpleQueue[None] = queue.SimpleQueue()

        def work() -> None:
            try:
                while waiting:
                    try:
                        item = waiting.popleft()
                    except IndexError:  # somebody else took the last
                        return
                    function(item)
            except BaseException as error:
                failures.append(error)
                waiting.clear()

        def help_out() -> None:
            work()
            ended.put(None)

        helpers = self._helpers[: max(0, len(waiting) - 1)]
        for helper in helpers:
            helper.submit(help_out)
        work()
        for _ in helpers:
            ended.get()
        failures += self._unprepared
        if failures:
            raise failures[0]

    def close(self) -> None:
        """Let the helpers end; harmless when repeated."""
        for helper in self._helpers:
            helper.close()
