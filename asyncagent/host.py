"""An actor host: runs the environments that a learner on another machine gives it.

The conversation outlives connections and learners: what has not been acknowledged is kept, and
sent again where the learner says that it is the same one.  With inference on the host this is the
trainer without its learner: ``act``, ``DynamicBatcher``, ``Policy``; with inference at the learner
it is environments alone, and torch is never imported.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import uvloop
import zmq
import zmq.asyncio

from asyncagent import wire
from asyncagent.actor import act
from asyncagent.batcher import DynamicBatcher
from asyncagent.config import Config
from asyncagent.envs import env_spec, make_group
from asyncagent.envs.base import EnvGroup
from asyncagent.envs.shared import spec_from_json
from asyncagent.errors import UsageError, WireError
from asyncagent.keys import check_endpoint, load_public, load_secret
from asyncagent.placement import cores, place
from asyncagent.signals import AskedToStop
from asyncagent.structs import EnvSpec, EnvStep, Episode, Loss, Nest, Unroll
from asyncagent.tasks import cancel, first_of, named, noted
from asyncagent.threads import NamedThread
from asyncagent.wire import (
    Accepted,
    Act,
    Bye,
    FromHost,
    Hello,
    Ping,
    Pong,
    Refused,
    RowFormat,
    RowSent,
    Unknown,
    UnrollFormat,
    UnrollSent,
    WantWeights,
    WeightsSent,
    Welcome,
)

if TYPE_CHECKING:
    from asyncagent.host_policy import HostPolicy

PING_S = 2.0
SILENCE_S = 6.0
"""A learner that says nothing for so long is looked for anew."""
MAX_BACKOFF_S = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostFlags:
    """What a host decides for itself; the rest is the learner's."""

    connect: str = "tcp://127.0.0.1:5555"
    """Where the learner listens."""
    num_actors: int = 64
    """Environments to run here."""
    num_groups: int = 0
    """Groups they step in; 0: the learner chooses."""
    inference: wire.Inference = "host"
    """Where to infer: here, with weights from the learner, or at the learner (needs no torch)."""
    name: str = ""
    """In the learner's reports; the machine's own name if empty."""
    secret_key: str = ""
    """This host's secret key file (see asyncagent keys)."""
    learner_key: str = ""
    """The learner's public key file."""
    device: str = "auto"
    """Where to infer here: auto, cpu, cuda or cuda:N."""
    env_threads: int = 0
    """Threads that step the environments of one group; 0: by the cores there are."""
    give_up_s: float = 0.0
    """End once the learner has been away for so many seconds; 0: wait for ever."""

    def __post_init__(self) -> None:
        check_endpoint(self.connect, "connect", listening=False)
        if not 1 <= self.num_actors <= 4096:
            raise UsageError(f"num_actors={self.num_actors} must be in [1, 4096]")
        if self.num_groups < 0 or (self.num_groups and self.num_actors % self.num_groups):
            raise UsageError(
                f"num_groups={self.num_groups} must be 0 or a divisor of num_actors="
                f"{self.num_actors}: groups are of equal size"
            )
        if bool(self.secret_key) != bool(self.learner_key):
            raise UsageError("secret_key and learner_key belong together: give both, or neither")
        if self.env_threads < 0 or not self.give_up_s >= 0:
            raise UsageError("env_threads and give_up_s must be >= 0")
        if len(self.name) > 64:
            raise UsageError("name must have at most 64 characters")


def run_host(flags: HostFlags) -> None:
    """Act for the learner until it refuses, or the first SIGINT or SIGTERM.

    Raises:
      UsageError: keys, address or environments are not what they should be, or we are refused.
      TimeoutError: the learner was away for longer than ``give_up_s``.
      BaseExceptionGroup: a task died.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(ActorHost(flags).run())
        except BaseExceptionGroup as group:
            for kind in (UsageError, TimeoutError):
                told = group.subgroup(kind)
                if told is not None:
                    raise first_of(told) from None
            raise


class _Kept(NamedTuple):
    """An unroll that has not been acknowledged."""

    header: UnrollSent
    parts: list[wire.Buffer]
    unroll: Unroll
    give_back: Callable[[Unroll], None]


class _Assignment(NamedTuple):
    """What one Welcome, that was not to go on, asks for."""

    welcome: Welcome
    config: Config
    spec: EnvSpec


class ActorHost:
    """One host process. Belongs to one event loop."""

    def __init__(self, flags: HostFlags) -> None:
        """Reads the key files."""
        self._flags = flags
        self._name = flags.name or os.uname().nodename[:64] or "host"
        self._keys = None
        if flags.secret_key:
            self._keys = (load_secret(Path(flags.secret_key)), load_public(Path(flags.learner_key)))
        self._incarnation = os.urandom(16)
        self._context: zmq.asyncio.Context | None = None
        self._stop = asyncio.Event()
        # The conversation.
        self._welcomed = False
        self._outbox: deque[list[wire.Buffer]] = deque()
        self._outgoing = asyncio.Event()
        self._heard_s = time.monotonic()
        self._round_trip_s = 0.0
        self._reconnects = -1
        # What was agreed on.
        self._assignment: _Assignment | None = None
        self._changed = asyncio.Event()
        self._version = 0
        self._seq = 0
        self._credits = 1
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._accepted = asyncio.Event()
        # Inference here.
        self._policy: HostPolicy | None = None
        self._new_weights = asyncio.Event()
        self._asked_s = 0.0
        # Inference at the learner.
        self._rows: dict[int, tuple[RowSent, list[wire.Buffer]]] = {}
        self._actions: dict[int, asyncio.Future[wire.Buffer]] = {}
        self._threads = [NamedThread("wire"), NamedThread("weights")]

    async def run(self) -> None:
        """See ``run_host``."""
        self._context = zmq.asyncio.Context()
        try:
            with AskedToStop(self._stop.set):
                async with asyncio.TaskGroup() as tasks:
                    work = [
                        tasks.create_task(named("conversation", self._talk())),
                        tasks.create_task(named("environments", self._play())),
                    ]
                    await self._stop.wait()
                    await cancel(*work)
        finally:
            for thread in self._threads:
                thread.close()
            self._context.destroy(linger=500)

    # The conversation.

    async def _talk(self) -> None:
        backoff_s = 0.5
        while True:
            self._reconnects += 1
            self._welcomed = False
            self._outbox.clear()
            socket = self._connect()
            try:
                await self._converse(socket)
            except asyncio.CancelledError:
                socket.send(wire.encode_header(Bye()))
                socket.close(linger=500)
                raise
            finally:
                if not socket.closed:
                    socket.close(linger=0)
            away_s = time.monotonic() - self._heard_s
            if self._flags.give_up_s and away_s > self._flags.give_up_s:
                raise TimeoutError(f"{self._flags.connect}: no learner for {away_s:.0f} s")
            if self._reconnects in (0, 3) or self._reconnects % 30 == 0:
                _log.warning("no answer from a learner at %s: trying on", self._flags.connect)
            backoff_s = 0.5 if self._welcomed else min(2 * backoff_s, MAX_BACKOFF_S)
            await asyncio.sleep(backoff_s)

    def _connect(self) -> zmq.asyncio.Socket:
        assert self._context is not None
        socket = self._context.socket(zmq.DEALER)
        socket.ipv6 = "[" in self._flags.connect
        socket.immediate = True  # what cannot be sent yet stays with us, and may be thought over
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2_000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6_000)
        socket.setsockopt(zmq.RECONNECT_IVL, 200)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
        socket.rcvhwm = 256
        socket.sndhwm = 64
        if self._keys is not None:
            own, learner = self._keys
            socket.curve_publickey, socket.curve_secretkey = own.public, own.secret
            socket.curve_serverkey = learner
        try:
            socket.connect(self._flags.connect)
        except zmq.ZMQError as error:
            raise UsageError(f"connect={self._flags.connect!r}: {error.strerror}") from None
        return socket

    async def _converse(self, socket: zmq.asyncio.Socket) -> None:
        """Until the learner has been silent for too long."""
        sender = asyncio.create_task(self._send_all(socket))
        began_s = asked_s = pinged_s = time.monotonic()
        self._say_hello()
        try:
            while True:
                now_s = time.monotonic()
                if now_s - max(began_s, self._heard_s) > SILENCE_S:
                    return
                if not self._welcomed and now_s - asked_s >= SILENCE_S / 2:
                    asked_s = now_s
                    self._say_hello()
                if now_s - pinged_s >= PING_S:
                    pinged_s = now_s
                    if self._welcomed:
                        self._send(Ping(now_s, self._round_trip_s, self._reconnects))
                        self._ask_for_weights()
                if sender.done():
                    sender.result()
                if await socket.poll(500):
                    parts = await socket.recv_multipart(copy=False)
                    self._heard_s = time.monotonic()
                    await self._on_message([part.buffer for part in parts])
        finally:
            sender.cancel()

    async def _send_all(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            while self._outbox:
                await socket.poll(flags=zmq.POLLOUT)
                if not self._outbox:
                    break  # all is being said anew
                await socket.send_multipart(self._outbox.popleft(), copy=False)
            self._outgoing.clear()
            await self._outgoing.wait()

    def _send(self, header: FromHost, *parts: wire.Buffer) -> None:
        self._outbox.append([wire.encode_header(header), *parts])
        self._outgoing.set()

    def _say_hello(self) -> None:
        given = self._assignment.welcome if self._assignment else None
        self._outbox.clear()
        self._send(
            Hello(
                protocol=wire.PROTOCOL,
                incarnation=self._incarnation,
                name=self._name,
                inference=self._flags.inference,
                num_actors=self._flags.num_actors,
                num_groups=self._flags.num_groups,
                num_cores=min(cores(), 4096),
                session=given.session if given else b"",
                slots=[group.slot for group in given.groups] if given else [],
            )
        )

    async def _on_message(self, parts: list[Any]) -> None:
        try:
            header = wire.read_from_learner(parts[0])
        except WireError as error:
            raise UsageError(
                f"{self._flags.connect} does not speak our language ({error}): the same version of "
                "asyncagent must run on both sides"
            ) from None
        match header:
            case Welcome():
                self._on_welcome(header)
            case Refused():
                if header.for_good:
                    raise UsageError(f"the learner refuses this host: {header.reason}")
                _log.warning("the learner refuses this host for now: %s", header.reason)
            case Unknown():
                if self._welcomed:
                    self._welcomed = False
                    self._say_hello()
            case Pong():
                self._round_trip_s = time.monotonic() - header.sent_s
                self._on_accepted(header.accepted, header.version)
            case Accepted():
                self._on_accepted(header.accepted, header.version)
            case WeightsSent():
                await self._on_weights(header, parts[1])
            case Act():
                self._on_act(header, parts[1])

    def _on_welcome(self, welcome: Welcome) -> None:
        if welcome.protocol != wire.PROTOCOL:
            raise UsageError(
                f"protocol {welcome.protocol} there is {wire.PROTOCOL} here: update asyncagent"
            )
        self._welcomed = True
        self._version = welcome.version
        self._credits = welcome.credits
        present = self._assignment
        if present is not None and welcome.go_on and welcome.session == present.welcome.session:
            for seq, kept in self._kept.items():
                if seq > welcome.received:
                    self._send(kept.header, *kept.parts)
            for header, parts in self._rows.values():
                self._send(header, *parts)
            return
        config = Config.from_json(welcome.config, "the learner's configuration")
        spec = spec_from_json(json.loads(welcome.spec))
        # Of what was not taken, some may be in the checkpoint that the learner began with.
        self._kept.clear()
        self._rows.clear()
        self._seq = welcome.received
        self._assignment = _Assignment(welcome, self._placed(config, welcome), spec)
        self._changed.set()
        _log.info(
            "%s: %d environments in %d groups of %s",
            self._flags.connect,
            self._flags.num_actors,
            len(welcome.groups),
            config.level_name,
        )

    def _placed(self, config: Config, welcome: Welcome) -> Config:
        """The learner's configuration on this machine."""
        size = welcome.groups[0].num_envs
        placement = place(cores(), len(welcome.groups), size, in_workers=False, even_steps=False)
        return dataclasses.replace(
            config,
            num_actors=size * len(welcome.groups),
            num_groups=len(welcome.groups),
            device=self._flags.device,
            learner_device="auto",
            inference_device="auto",
            env_threads=self._flags.env_threads or placement.env_threads,
            env_niceness=0,
            pin_workers=False,
            inference_threads=placement.inference_threads,
            listen=config.listen or self._flags.connect,
        )

    # Unrolls.

    def _on_accepted(self, accepted: int, version: int) -> None:
        self._version = max(self._version, version)
        while self._kept and next(iter(self._kept)) <= accepted:
            _, kept = self._kept.popitem(last=False)
            kept.give_back(kept.unroll)
        self._accepted.set()
        self._ask_for_weights()

    def _ask_for_weights(self) -> None:
        if self._policy is None or self._policy.policy.version >= self._version:
            return
        now_s = time.monotonic()
        if now_s - self._asked_s > 2 * PING_S:  # else they are on their way
            self._asked_s = now_s
            self._send(WantWeights(self._policy.policy.version))

    async def _on_weights(self, header: WeightsSent, part: wire.Buffer) -> None:
        if self._policy is None:
            return
        await self._threads[1].run(self._policy.load, part, header.version, header.precision)
        self._asked_s = 0.0
        self._new_weights.set()
        self._ask_for_weights()

    def _on_act(self, header: Act, part: wire.Buffer) -> None:
        row = self._rows.get(header.slot)
        waiter = self._actions.get(header.slot)
        if row is not None and row[0].number == header.number and waiter and not waiter.done():
            waiter.set_result(bytes(part))

    # Environments.

    async def _play(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            assert self._assignment is not None
            async with asyncio.TaskGroup() as tasks:
                playing = tasks.create_task(self._play_assignment(self._assignment))
                await self._changed.wait()
                await cancel(playing)

    async def _play_assignment(self, given: _Assignment) -> None:
        builder = NamedThread("build-envs")
        groups: list[EnvGroup] = []
        try:
            spec = await builder.run(env_spec, given.config)
            if spec != given.spec:
                raise UsageError(
                    f"{given.config.level_name} differs here from the learner's ({spec} and "
                    f"{given.spec}): the same versions must be installed on both sides"
                )
            for group in given.welcome.groups:
                groups.append(
                    await builder.run(
                        lambda group=group: make_group(
                            given.config,
                            level_name=group.level_name,
                            num_envs=group.num_envs,
                            first_env_index=group.first_env_index,
                            seed=given.welcome.seed,
                        )
                    )
                )
            if self._flags.inference == "host":
                await self._act_here(given, groups)
            else:
                await self._act_there(given, groups)
        finally:
            await asyncio.gather(*(group.close() for group in groups))
            builder.close()

    async def _act_there(self, given: _Assignment, groups: list[EnvGroup]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for group, dealt in zip(groups, given.welcome.groups, strict=True):
                tasks.create_task(
                    named(f"group {dealt.slot}", self._serve_group(given, group, dealt.slot))
                )

    async def _serve_group(self, given: _Assignment, group: EnvGroup, slot: int) -> None:
        format_ = RowFormat(given.spec, group.num_envs)
        compression = given.config.compression
        row, before, number = await group.reset(), None, 0
        while True:
            happened = (wire.episodes_to_wire(row.episodes), wire.losses_to_wire(row.losses))
            header = RowSent(slot, number, compression, *happened)
            parts = format_.encode(row, before, compression)
            waiter = self._actions[slot] = asyncio.get_running_loop().create_future()
            self._rows[slot] = (header, parts)
            if self._welcomed:  # else it is sent with the others once we are
                self._send(header, *parts)
            action = wire.decode_action(await waiter, group.num_envs, given.spec.actions)
            before = row.observation
            row = await group.step(action)
            number += 1

    async def _act_here(self, given: _Assignment, groups: list[EnvGroup]) -> None:
        from asyncagent.host_policy import HostPolicy

        config, welcome = given.config, given.welcome
        # Groups draw other actions than those of other hosts.
        seed = (config.seed + 1 + welcome.groups[0].first_env_index) % 2**31
        self._policy = HostPolicy(config, given.spec, welcome.num_weights, seed)
        self._new_weights.clear()
        self._asked_s = time.monotonic()
        self._send(WantWeights(-1))
        await self._new_weights.wait()
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
                    actor = _Actor(self, given, group, dealt.slot, batcher, policy.initial_state)
                    tasks.create_task(named(f"group {dealt.slot}", actor.run()))
        finally:
            batcher.close()

    async def put(
        self, header: Callable[[int], UnrollSent], parts: list[wire.Buffer], unroll: Unroll,
        give_back: Callable[[Unroll], None],
    ) -> None:  # fmt: skip
        """Send an unroll once there is a credit; ``header(seq)`` is made then."""
        while len(self._kept) >= self._credits:
            self._accepted.clear()
            await self._accepted.wait()
        self._seq += 1
        kept = _Kept(header(self._seq), parts, unroll, give_back)
        self._kept[self._seq] = kept
        if self._welcomed:
            self._send(kept.header, *parts)

    async def fresh_weights(self, max_policy_lag: int) -> None:
        """Wait while the weights are more updates old than that."""
        assert self._policy is not None
        while self._version - self._policy.policy.version > max_policy_lag:
            self._new_weights.clear()
            self._ask_for_weights()
            await self._new_weights.wait()

    @property
    def incarnation(self) -> bytes:
        """Of this process."""
        return self._incarnation

    async def encode(self, function: Callable[..., list[wire.Buffer]], *args: Any) -> Any:
        """``function(*args)`` on the thread that encodes."""
        return await self._threads[0].run(function, *args)


class _Actor:
    """One group that acts here, and what happened to it since its last unroll."""

    def __init__(
        self, host: ActorHost, given: _Assignment, group: EnvGroup, slot: int,
        batcher: DynamicBatcher, initial_state: Callable[[int], Nest],
    ) -> None:  # fmt: skip
        self._host = host
        self._config = given.config
        self._group = group
        self._slot = slot
        self._batcher = batcher
        self._state = initial_state(group.num_envs)
        length = given.config.unroll_length
        self._format = UnrollFormat(given.spec, length, group.num_envs, self._state)
        self._episodes: list[Episode] = []
        self._losses: list[Loss] = []
        self._frames = 0
        self._caller = batcher.register()

    async def run(self) -> None:
        length = self._config.unroll_length
        try:
            await act(self._group, self._batcher, self._put, length, self._state, self._on_row)
        finally:
            self._caller.close()

    def _on_row(self, row: EnvStep) -> None:
        self._episodes += row.episodes
        self._losses += row.losses
        present = self._group.num_envs - int(row.lost.sum())
        self._frames += present * self._config.num_action_repeats

    async def _put(self, unroll: Unroll, give_back: Callable[[Unroll], None]) -> None:
        self._caller.close()  # nobody needs to wait for an actor that waits for the learner
        compression = self._config.compression
        parts = await self._host.encode(self._format.encode, unroll, compression)

        def header(seq: int) -> UnrollSent:
            told = UnrollSent(
                self._host.incarnation,
                seq,
                self._slot,
                compression,
                self._frames,
                wire.episodes_to_wire(self._episodes),
                wire.losses_to_wire(self._losses),
            )
            self._episodes, self._losses, self._frames = [], [], 0
            return told

        await self._host.put(header, parts, unroll, give_back)
        await self._host.fresh_weights(self._config.max_policy_lag)
        self._caller = self._batcher.register()
