"""What actor hosts send becomes unrolls in the learner's queue, each of them once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NamedTuple

import numpy as np

from asyncagent import wire
from asyncagent.config import Config
from asyncagent.envs.base import EnvGroup
from asyncagent.errors import EndOfUnrolls, WireError
from asyncagent.formats import UnrollFormat
from asyncagent.members import Member
from asyncagent.structs import EnvSpec, Episode, Loss, Nest, Unroll
from asyncagent.threads import NamedThread
from asyncagent.unroll import UnrollBuffers, empty_unroll
from asyncagent.wire import RowSent, UnrollSent

MAX_WAITING = 4
"""Decoded unrolls that wait for the queue, of all hosts together; the others stay packed."""


class Weights(NamedTuple):
    """The newest weights, encoded."""

    version: int
    part: Any


class Learning(NamedTuple):
    """What hosts are served from: the run."""

    initial_state: Callable[[int], Nest]
    """Core state of so many rows, nest of float32 arrays."""
    version: Callable[[], int]
    """Updates until now."""
    num_weights: int
    encode_weights: Callable[[], Weights]
    """On a thread of the bridge's."""
    put: Callable[[str, Unroll, Callable[[Unroll], None]], Awaitable[None]]
    """(level_name, unroll, give_back): see ``UnrollQueue.put``."""
    act: Callable[[str, str, EnvGroup], Coroutine[Any, Any, None]]
    """(name, level_name, group): play it, for ever."""
    tell: Callable[[Sequence[Episode], Sequence[Loss], int], None]
    """Games ended, environments lost, frames acted on a host that infers itself."""


class Intake:
    """Checks and takes what hosts send. Belongs to the event loop's thread."""

    def __init__(
        self, config: Config, spec: EnvSpec, learning: Learning, thread: NamedThread,
        accept: Callable[[Member], None], reject: Callable[[Member, str], None],
    ) -> None:  # fmt: skip
        """``accept(member)`` tells a host how far it has come; ``reject(member, why)`` us."""
        self._config = config
        self._spec = spec
        self._learning = learning
        self._thread = thread
        self._accept = accept
        self._reject = reject
        self._turns = asyncio.Semaphore(MAX_WAITING)
        self._formats: dict[int, UnrollFormat] = {}
        self._buffers: dict[int, UnrollBuffers] = {}

    def on_unroll(self, member: Member, header: UnrollSent, parts: list[Any]) -> None:
        """An unroll has come. WireError if it cannot be."""
        if header.incarnation != member.hello.incarnation:
            raise WireError("an unroll of another incarnation")
        if member.hello.inference != "host":
            raise WireError("an unroll, although inference is the learner's")
        if header.seq <= member.received:
            self._accept(member)  # sent again because the answer was lost
            return
        if header.seq != member.received + 1:
            if member.may_skip:
                return  # it crossed the Welcome that asks for those before it, too
            raise WireError(f"unroll {header.seq} follows {member.received}")
        if header.slot not in member.slots:
            raise WireError(f"an unroll of slot {header.slot}, which is not this host's")
        if member.received - member.accepted >= len(member.groups):
            raise WireError("more unrolls than there are credits for")
        member.received += 1
        member.may_skip = False
        member.inbox.append((header, parts))
        member.filled.set()

    def on_row(self, member: Member, header: RowSent, parts: list[Any]) -> None:
        """A row has come. WireError if it cannot be."""
        group = member.remote_groups.get(header.slot)
        if group is None:
            raise WireError(f"a row of slot {header.slot}, which is not this host's")
        wire.check_happened(header, member.slots[header.slot].level_name, group.num_envs)
        row = group.take(header, parts)
        if row is not None:
            present = group.num_envs - int(np.count_nonzero(row.lost))
            member.figures.frames += present * self._config.num_action_repeats

    async def take_in(self, member: Member) -> None:
        """Put a host's unrolls into the queue, in order, and say so only then; for ever."""
        while True:
            while not member.inbox:
                member.filled.clear()
                await member.filled.wait()
            header, parts = member.inbox[0]
            failure = ""
            try:
                async with self._turns:
                    await self._take(member, header, parts)
            except WireError as error:
                failure = str(error)
            except EndOfUnrolls:
                return
            # No await since the queue took it: what is counted is accepted, whatever comes.
            member.inbox.popleft()
            member.accepted = header.seq
            self._accept(member)
            if failure:
                self._reject(member, failure)

    async def _take(self, member: Member, header: UnrollSent, parts: list[Any]) -> None:
        if header.compression != self._config.compression:
            raise WireError("another compression than was agreed on")
        group = member.slots[header.slot]
        wire.check_happened(header, group.level_name, group.num_envs)
        rows = (self._config.unroll_length + 1) * group.num_envs
        if header.acted_frames > rows * self._config.num_action_repeats:
            raise WireError(f"{header.acted_frames} frames, more than an unroll has")
        buffers = self._buffers_of(group.num_envs)
        unroll = buffers.take()
        version = self._learning.version()
        decode = self.format(group.num_envs).decode
        try:
            await self._thread.run(decode, parts, unroll, version, self._config.compression)
        except WireError:
            buffers.give_back(unroll)
            raise
        lag = version - unroll.policy_version[unroll.valid]
        # Once the queue has it, it may be given back at any time.
        await self._learning.put(group.level_name, unroll, buffers.give_back)
        member.figures.frames += header.acted_frames
        member.figures.lag_sum += int(lag.sum())
        member.figures.lag_rows += lag.size
        self._learning.tell(*wire.happened(header), header.acted_frames)

    def format(self, num_envs: int) -> UnrollFormat:
        """Of unrolls of so many environments."""
        if num_envs not in self._formats:
            length, state = self._config.unroll_length, self._learning.initial_state(num_envs)
            self._formats[num_envs] = UnrollFormat(self._spec, length, num_envs, state)
        return self._formats[num_envs]

    def _buffers_of(self, num_envs: int) -> UnrollBuffers:
        if num_envs not in self._buffers:
            length, state = self._config.unroll_length, self._learning.initial_state(num_envs)
            self._buffers[num_envs] = UnrollBuffers(
                lambda: empty_unroll(length, num_envs, self._spec, state)
            )
        return self._buffers[num_envs]
