"""The watchdog: a component that stops moving ends the run, instead of stalling it in silence."""

from __future__ import annotations

import asyncio
import faulthandler
import sys
from collections.abc import Callable, Set
from typing import Any

from asyncagent.errors import Stalled


async def watch(
    progress: Callable[[], dict[str, Any]],
    waits: Callable[[], Set[str]],
    situation: Callable[[], str],
    stall_timeout_s: float,
) -> None:
    """Raise Stalled, with all threads' stacks on stderr, once a component stands still too long.

    One dead component starves the others: the one that stopped first is to blame.  Time is
    counted in ticks of the watchdog, so a program that was suspended has not stalled.

    Args:
      progress: per component, what changes while it moves.
      waits: the components that just now have nothing to do.
      situation: what else helps to find the cause, in one line.
    """
    tick_s = min(1.0, stall_timeout_s / 4)
    before = progress()
    still_s = dict.fromkeys(before, 0.0)
    while True:
        await asyncio.sleep(tick_s)
        now, waiting = progress(), waits()
        for name, moves in now.items():
            moved = moves != before[name] or name in waiting
            still_s[name] = 0.0 if moved else still_s[name] + tick_s
        before = now
        name = max(still_s, key=lambda name: still_s[name])
        if still_s[name] > stall_timeout_s:
            faulthandler.dump_traceback(sys.__stderr__ or 2)
            raise Stalled(
                f"{name} has not moved for {still_s[name]:.0f} s (see --stall_timeout_s); "
                f"{situation()}"
            )
