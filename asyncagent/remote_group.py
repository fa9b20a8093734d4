"""RemoteGroup: environments on another machine, an ``EnvGroup`` like any other."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optree

from asyncagent import formats, wire
from asyncagent.errors import ActorLost, WireError
from asyncagent.formats import RowFormat
from asyncagent.structs import ActionArray, EnvSpec, EnvStep, Nest
from asyncagent.tracks import AWAY, HERE, Track
from asyncagent.wire import Act, RowSent


class RemoteGroup:
    """E environments on a host: rows come over the network, actions go back."""

    def __init__(
        self, slot: int, spec: EnvSpec, num_envs: int, compression: wire.Compression,
        send: Callable[[Act, Any], None],
    ) -> None:  # fmt: skip
        """``send(header, part)`` brings an action to the host."""
        self.spec = spec
        self.num_envs = num_envs
        self.track = Track(2)
        """Whether its rows are on the host, or on the way, or here."""
        self._slot = slot
        self._format = RowFormat(spec, num_envs)
        self._compression = compression
        self._send = send
        self._rows = 0  # taken
        self._act: tuple[Act, Any] | None = None
        self._observation: Nest = None
        # A row lives until the step after the next is asked for.
        self._spare: deque[Nest] = deque()
        self._waiter: asyncio.Future[EnvStep] | None = None
        self._early: EnvStep | None = None
        self._lost: str | None = None

    async def reset(self) -> EnvStep:
        """The first row."""
        return await self._next()

    async def step(self, action: ActionArray) -> EnvStep:
        """The row that follows ``action`` [E, ...]; ActorLost once the host is gone."""
        act = Act(self._slot, self._rows - 1)
        self.track.enter(AWAY)
        self._act = (act, formats.encode_action(action, self.spec.actions))
        if self._lost is None:
            self._send(*self._act)
        return await self._next()

    def progress(self) -> Any:
        """Rows taken."""
        return self._rows

    async def close(self) -> None:
        """Nothing: the environments are the host's."""

    def take(self, header: RowSent, parts: Sequence[wire.Buffer]) -> EnvStep | None:
        """A row has come; None for one that was there before. WireError if it cannot be."""
        if header.number < self._rows:
            if header.number == self._rows - 1 and self._act is not None:
                self._send(*self._act)  # which was lost on the way
            return None
        if header.number > self._rows or (self._rows and self._act is None):
            raise WireError(f"row {header.number} of slot {self._slot} was not asked for")
        if header.compression != self._compression:
            raise WireError("another compression than was agreed on")
        target = self._spare.popleft() if len(self._spare) == 3 else self._empty_row()
        try:
            row = self._format.decode(parts, target, self._observation, self._compression)
            if self._rows == 0 and not row.first.all():
                raise WireError("the first row does not open every episode")
        except WireError:
            self._spare.appendleft(target)
            raise
        self._spare.append(target)
        episodes, losses = wire.happened(header)
        row = row._replace(episodes=episodes, losses=losses)
        self._observation = target
        self._rows += 1
        self.track.enter(HERE)
        self._act = None
        if self._waiter is None:
            self._early = row
        elif not self._waiter.done():
            self._waiter.set_result(row)
        return row

    def lose(self, why: str) -> None:
        """The host is gone: let the actor know."""
        self._lost = why
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(ActorLost(why))

    def _empty_row(self) -> Nest:
        # Made when a row has come whose sizes are right: to be announced costs us nothing.
        return optree.tree_map(
            lambda leaf: np.empty((self.num_envs, *leaf.shape), leaf.dtype), self.spec.observation
        )

    async def _next(self) -> EnvStep:
        if self._lost is not None:
            raise ActorLost(self._lost)
        if self._early is not None:
            row, self._early = self._early, None
            return row
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            return await self._waiter
        finally:
            self._waiter = None
