"""Acting and learning in turn, so that nothing depends on what happened to be faster.

One group acts one unroll, then the learner learns from all of it, then the next unroll begins: with
one thread each, the same seed gives the same weights, bit by bit.  Between two unrolls nothing is
under way: what is saved there, and only there, is all that what follows depends on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch

from asyncagent.actor import Carried
from asyncagent.envs.base import EnvGroup
from asyncagent.envs.pool import PoolGroup
from asyncagent.errors import CheckpointError, UsageError
from asyncagent.structs import EnvStep, Nest
from asyncagent.unroll import UnrollQueue

_log = logging.getLogger(__name__)


class Begin(NamedTuple):
    """Where a deterministic run begins."""

    group: PoolGroup
    carried: Carried | None
    """None: with a reset of the group."""


class Lockstep:
    """Holds the one actor up between two unrolls. Belongs to the event loop's thread."""

    def __init__(
        self, begin: Begin, queue: UnrollQueue, stop: asyncio.Event,
        save: Callable[[], Awaitable[None]], wait_s: Callable[[], float],
    ) -> None:  # fmt: skip
        """``save()`` writes a checkpoint, at the first opportunity ``wait_s()`` after the last."""
        self.begin = begin.carried
        """What the actor begins with."""
        self._parked = asyncio.Event()
        self._group = begin.group
        self._queue = queue
        self._stop = stop
        self._save = save
        self._wait_s = wait_s
        self._due_s = asyncio.get_running_loop().time() + wait_s()
        self._carried: Carried | None = None

    async def between(self, carried: Carried) -> None:
        """Wait until all has been learned from; save where it is time; see ``act``."""
        await self._queue.join()
        self._carried = carried
        if self._stop.is_set():
            self._parked.set()
            await asyncio.Event().wait()
        loop = asyncio.get_running_loop()
        if loop.time() >= self._due_s:
            await self._save()
            self._due_s = loop.time() + self._wait_s()
        self._carried = None

    async def park(self, learner: asyncio.Task[None], timeout_s: float) -> None:
        """Once ``stop`` is set: wait until the actor stands, or the learner has ended."""
        parked = asyncio.create_task(self._parked.wait())
        await asyncio.wait(
            {parked, learner}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        parked.cancel()

    async def state(self) -> dict[str, Any] | None:
        """What the group and its actor go on from; None unless they stand between two unrolls."""
        if self._carried is None:
            return None
        row = self._carried.row._replace(episodes=(), losses=())
        nest: Nest = self._carried._replace(row=row)
        leaves: list[Any] = optree.tree_leaves(nest)
        return {
            "group": await self._group.state(),
            "carried": [torch.from_numpy(leaf.copy()) for leaf in leaves],
        }


async def begin_lockstep(
    groups: Sequence[EnvGroup], checkpoint: dict[str, Any] | None,
    initial_state: Callable[[int], Nest],
) -> Begin:  # fmt: skip
    """Bring a run's one group, and what its actor carries, to where ``checkpoint`` was taken.

    Args:
      initial_state: core state of so many rows.

    Raises:
      UsageError: the group cannot save itself.
      CheckpointError: it has another number of environments than the one that was saved.
    """
    (group,) = groups
    if not isinstance(group, PoolGroup) or not group.can_save:
        raise UsageError(
            "deterministic=True needs environments that can save themselves, as memory's can: "
            "leave it out for this level"
        )
    if checkpoint is None:
        return Begin(group, None)
    state = checkpoint.get("lockstep")
    if state is None:
        _log.warning(
            "the checkpoint is of a run that was complete, or not deterministic: games begin anew"
        )
        return Begin(group, None)
    num_envs = len(state["group"]["ended"])
    if num_envs != group.num_envs:
        raise CheckpointError(
            f"the checkpoint is of num_actors={num_envs}, not {group.num_envs}: a deterministic "
            "run keeps them"
        )
    await group.restore(state["group"])
    row = EnvStep(group.spec.observation, 0, 0, 0, 0, 0)  # type: ignore[arg-type]
    example: Nest = Carried(row, 0, initial_state(group.num_envs))  # type: ignore[arg-type]
    leaves = [leaf.numpy() for leaf in state["carried"]]
    carried: Any = optree.tree_structure(example).unflatten(leaves)
    return Begin(group, carried)
