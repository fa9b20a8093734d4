"""What an actor host does for one session of a learner: infer itself, or leave that to it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from asyncagent import formats, wire
from asyncagent.actor import act
from asyncagent.batcher import DynamicBatcher
from asyncagent.config import Config
from asyncagent.envs.base import EnvGroup
from asyncagent.errors import WireError
from asyncagent.formats import RowFormat, UnrollFormat
from asyncagent.structs import EnvSpec, EnvStep, Episode, Loss, Unroll
from asyncagent.tasks import named, noted
from asyncagent.threads import NamedThread
from asyncagent.tracks import KEEPS_BOOKS, STEPS, WAITS_LEARNER, Track
from asyncagent.watchdog import Component
from asyncagent.wire import (
    Accepted,
    Act,
    FromHost,
    FromLearner,
    Pong,
    RowSent,
    UnrollSent,
    WantWeights,
    WeightsSent,
    Welcome,
)

if TYPE_CHECKING:
    from asyncagent.host_policy import HostPolicy

ASK_AGAIN_S = 4.0
"""Weights that have not come after so long are asked for again."""

_log = logging.getLogger(__name__)

Send = Callable[..., None]
"""(header, *parts): see ``Conversation.send``."""


class Assignment(NamedTuple):
    """What a learner wants done."""

    welcome: Welcome
    config: Config
    """The learner's, on this machine."""
    spec: EnvSpec


class Duty(Protocol):
    """One assignment's work. What has not been acknowledged is kept, and sent again."""

    async def play(self, groups: Sequence[EnvGroup]) -> None:
        """Run the groups, for ever."""
        ...

    def go_on(self, welcome: Welcome) -> None:
        """We are welcome again, and so is our work."""
        ...

    async def on_message(self, header: FromLearner, parts: list[Any]) -> None:
        """Whatever else the learner says."""
        ...

    def survey(self) -> dict[str, Component]:
        """For the watchdog: its groups."""
        ...

    def shares(self) -> tuple[float, float]:
        """Of the time since the last call: environments step, groups wait for the learner."""
        ...

    def end(self) -> None:
        """There is other work: send nothing any more."""
        ...


class _Waiting(NamedTuple):
    """A row that waits for its action."""

    header: RowSent
    parts: list[wire.Buffer]
    action: asyncio.Future[wire.Buffer]


class LearnerInfers:
    """Rows go to the learner, actions come back."""

    def __init__(self, given: Assignment, send: Send) -> None:
        self._given = given
        self._send = send
        self._waiting: dict[int, _Waiting] = {}  # by slot
        self._groups: dict[int, EnvGroup] = {}
        self._tracks: list[Track] = []

    async def play(self, groups: Sequence[EnvGroup]) -> None:
        """See ``Duty``."""
        slots = [dealt.slot for dealt in self._given.welcome.groups]
        self._groups = dict(zip(slots, groups, strict=True))
        self._tracks = [Track(4) for _ in groups]
        async with asyncio.TaskGroup() as tasks:
            for group, slot, track in zip(groups, slots, self._tracks, strict=True):
                tasks.create_task(named(f"group {slot}", self._serve(group, slot, track)))

    async def _serve(self, group: EnvGroup, slot: int, track: Track) -> None:
        space, compression = self._given.spec.actions, self._given.config.compression
        format_ = RowFormat(self._given.spec, group.num_envs)
        row, before, number = await group.reset(), None, 0
        while True:
            track.enter(KEEPS_BOOKS)
            happened = (wire.episodes_to_wire(row.episodes), wire.losses_to_wire(row.losses))
            header = RowSent(slot, number, compression, *happened)
            parts = format_.encode(row, before, compression)
            answer: asyncio.Future[wire.Buffer] = asyncio.get_running_loop().create_future()
            self._waiting[slot] = _Waiting(header, parts, answer)
            self._send(header, *parts)
            track.enter(WAITS_LEARNER)
            action = formats.decode_action(await answer, group.num_envs, space)
            before, number = row.observation, number + 1
            track.enter(STEPS)
            row = await group.step(action)

    def shares(self) -> tuple[float, float]:
        """See ``Duty``."""
        return _shares(self._tracks)

    def go_on(self, welcome: Welcome) -> None:
        """See ``Duty``."""
        for waiting in self._waiting.values():
            if not waiting.action.done():
                self._send(waiting.header, *waiting.parts)

    async def on_message(self, header: FromLearner, parts: list[Any]) -> None:
        """See ``Duty``."""
        if isinstance(header, Act):
            waiting = self._waiting.get(header.slot)
            if waiting and waiting.header.number == header.number and not waiting.action.done():
                waiting.action.set_result(bytes(parts[0]))

    def survey(self) -> dict[str, Component]:
        """See ``Duty``."""
        survey = {}
        for slot, group in self._groups.items():
            waiting = self._waiting.get(slot)
            sent = -1 if waiting is None else waiting.header.number
            idle = waiting is not None and not waiting.action.done()
            survey[f"group {slot}"] = Component(f"row {sent:,}", (sent, group.progress()), idle)
        return survey

    def end(self) -> None:
        """See ``Duty``."""
        self._send = _nowhere


class _Kept(NamedTuple):
    """An unroll that has not been acknowledged."""

    header: UnrollSent
    parts: list[wire.Buffer]
    unroll: Unroll
    give_back: Callable[[Unroll], None]


class HostInfers:
    """Weights come from the learner, unrolls go to it."""

    def __init__(
        self, given: Assignment, send: Send, incarnation: bytes, threads: tuple[NamedThread, ...],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """``threads``: one to encode unrolls on, one to decode weights on."""
        self.given = given
        self.incarnation = incarnation
        self._send = send
        self._encoder, self._decoder = threads
        self._clock = clock
        self._seq = given.welcome.received
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._accepted = asyncio.Event()
        self._version = given.welcome.version
        self._policy: HostPolicy | None = None
        self._policy_version = -1  # no weights yet
        self._new_weights = asyncio.Event()
        self._asked_s = -math.inf
        self._actors: list[_Actor] = []

    async def play(self, groups: Sequence[EnvGroup]) -> None:
        """See ``Duty``."""
        config, welcome = self.given.config, self.given.welcome
        self._policy = await self._decoder.run(self._make_policy)
        await self._fresh_weights(config.max_policy_lag)
        policy = self._policy.policy
        batcher = DynamicBatcher(
            noted("inference", policy.infer),
            config.min_inference_rows,
            max(config.max_inference_rows, config.group_size),
            config.inference_timeout_ms,
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                for group, dealt in zip(groups, welcome.groups, strict=True):
                    state = policy.initial_state(group.num_envs)
                    format_ = UnrollFormat(
                        self.given.spec, config.unroll_length, group.num_envs, state
                    )
                    actor = _Actor(self, group, dealt.slot, batcher, format_)
                    self._actors.append(actor)
                    tasks.create_task(named(f"group {dealt.slot}", actor.run(state)))
        finally:
            batcher.close()

    def _make_policy(self) -> HostPolicy:
        from asyncagent.host_policy import HostPolicy

        config, welcome = self.given.config, self.given.welcome
        # Groups draw other actions than those of other hosts.
        seed = (config.seed + 1 + welcome.groups[0].first_env_index) % 2**31
        return HostPolicy(config, self.given.spec, welcome.num_weights, seed)

    def go_on(self, welcome: Welcome) -> None:
        """See ``Duty``."""
        for seq, kept in self._kept.items():
            if seq > welcome.received:
                self._send(kept.header, *kept.parts)
        self._asked_s = -math.inf
        self._on_version(welcome.version)

    async def on_message(self, header: FromLearner, parts: list[Any]) -> None:
        """See ``Duty``."""
        match header:
            case Accepted() | Pong():
                while self._kept and next(iter(self._kept)) <= header.accepted:
                    _, kept = self._kept.popitem(last=False)
                    kept.give_back(kept.unroll)
                self._accepted.set()
                self._on_version(header.version)
            case WeightsSent() if self._policy is not None:
                try:
                    await self._decoder.run(
                        self._policy.load, parts[0], header.version, header.precision
                    )
                except WireError as error:
                    _log.warning("the learner's weights are of no use: %s", error)
                    return
                self._policy_version = header.version
                self._asked_s = -math.inf
                self._new_weights.set()
                self._on_version(header.version)

    def survey(self) -> dict[str, Component]:
        """See ``Duty``."""
        return {f"group {actor.slot}": actor.component() for actor in self._actors}

    def end(self) -> None:
        """See ``Duty``."""
        self._send = _nowhere

    def shares(self) -> tuple[float, float]:
        """See ``Duty``."""
        return _shares([actor.track for actor in self._actors])

    def _on_version(self, version: int) -> None:
        """So many updates have been made: ask for them, unless they are on their way."""
        self._version = max(self._version, version)
        now_s = self._clock()
        if (
            self._policy is not None
            and self._policy_version < self._version
            and now_s - self._asked_s > ASK_AGAIN_S
        ):
            self._asked_s = now_s
            self._send(WantWeights(self._policy_version))

    async def put(
        self, header: Callable[[int], UnrollSent], format_: UnrollFormat, unroll: Unroll,
        give_back: Callable[[Unroll], None], track: Track,
    ) -> None:  # fmt: skip
        """Send an unroll once there is a credit, with ``header(seq)``, which is made then.

        Returns when the weights are fresh enough for the next.
        """
        compression = self.given.config.compression
        track.enter(KEEPS_BOOKS)
        parts = await self._encoder.run(format_.encode, unroll, compression)
        track.enter(WAITS_LEARNER)
        while len(self._kept) >= self.given.welcome.credits:
            self._accepted.clear()
            await self._accepted.wait()
        self._seq += 1
        kept = _Kept(header(self._seq), parts, unroll, give_back)
        self._kept[self._seq] = kept
        self._send(kept.header, *parts)
        await self._fresh_weights(self.given.config.max_policy_lag)

    async def _fresh_weights(self, max_policy_lag: int) -> None:
        """Wait while the weights are more updates old than that; or there are none."""
        while self._policy_version < max(0, self._version - max_policy_lag):
            self._new_weights.clear()
            self._on_version(self._version)
            await self._new_weights.wait()


class _Actor:
    """One group that acts here, and what happened to it since its last unroll."""

    def __init__(
        self, duty: HostInfers, group: EnvGroup, slot: int, batcher: DynamicBatcher,
        format_: UnrollFormat,
    ) -> None:  # fmt: skip
        self._duty = duty
        self._config = duty.given.config
        self._group = group
        self.slot = slot
        self.track = Track(4)
        self._rows = 0
        self._putting = False
        self._batcher = batcher
        self._format = format_
        self._episodes: list[Episode] = []
        self._losses: list[Loss] = []
        self._frames = 0
        self._caller = batcher.register()

    async def run(self, initial_state: Any) -> None:
        """Act, for ever."""
        length = self._config.unroll_length
        try:
            await act(
                self._group,
                self._batcher,
                self._put,
                length,
                initial_state,
                self._on_row,
                track=self.track,
            )
        finally:
            self._caller.close()

    def component(self) -> Component:
        """For the watchdog; where it waits for the learner it has nothing to do."""
        moves = (self._rows, self._group.progress())
        return Component(f"row {self._rows:,}", moves, self._putting)

    def _on_row(self, row: EnvStep) -> None:
        self._rows += 1
        self._episodes += row.episodes
        self._losses += row.losses
        present = self._group.num_envs - int(row.lost.sum())
        self._frames += present * self._config.num_action_repeats

    async def _put(self, unroll: Unroll, give_back: Callable[[Unroll], None]) -> None:
        self._caller.close()  # nobody needs to wait for an actor that waits for the learner
        self._putting = True
        await self._duty.put(self._header, self._format, unroll, give_back, self.track)
        self._putting = False
        self._caller = self._batcher.register()

    def _header(self, seq: int) -> UnrollSent:
        told = UnrollSent(
            self._duty.incarnation,
            seq,
            self.slot,
            self._config.compression,
            self._frames,
            wire.episodes_to_wire(self._episodes),
            wire.losses_to_wire(self._losses),
        )
        self._episodes, self._losses, self._frames = [], [], 0
        return told


def _shares(tracks: Sequence[Track]) -> tuple[float, float]:
    """(stepping, waiting for the learner), means over the tracks of groups; 0 of none."""
    taken = [track.take() for track in tracks]
    steps = sum(shares[STEPS] for shares in taken) / max(1, len(taken))
    waits = sum(shares[WAITS_LEARNER] for shares in taken) / max(1, len(taken))
    return (steps, waits) if steps >= 0 <= waits else (0.0, 0.0)  # nan where no time has passed


def _nowhere(header: FromHost, *parts: wire.Buffer) -> None:
    """Where an ended duty sends."""
