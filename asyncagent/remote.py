"""RemoteBridge: actor hosts join over ZeroMQ, and the learner does not notice the difference.

One ROUTER socket on the event loop.  A host that infers itself sends whole unrolls: they are
checked, written to buffers of ours and put into the learner's queue, one after the other; only
then is the host told, so a slow learner slows its hosts.  A host that leaves inference to us sends
rows: each of its groups is a ``RemoteGroup``, an environment group like any other.  What a host
says is believed only as far as it has been compared with what was agreed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import heapq
import json
import logging
import os
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optree
import zmq
import zmq.asyncio

from asyncagent import wire
from asyncagent.config import Config, family_of, split_groups
from asyncagent.envs import levels_of
from asyncagent.envs.base import EnvGroup
from asyncagent.envs.shared import spec_to_json
from asyncagent.errors import ActorLost, EndOfUnrolls, UsageError, WireError
from asyncagent.keys import AllowedKeys, Gate, check_endpoint, check_listening, load_secret
from asyncagent.metrics import HostReport
from asyncagent.structs import ActionArray, EnvSpec, EnvStep, Episode, Loss, Nest, Unroll
from asyncagent.threads import NamedThread
from asyncagent.unroll import UnrollBuffers, empty_unroll
from asyncagent.wire import (
    Accepted,
    Act,
    Bye,
    FromLearner,
    Group,
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

LOST_S = 8.0
"""A host that says nothing for so long is lost; it says something every two seconds."""
TICK_S = 1.0
HANDSHAKE_MS = 5_000
MAX_HOSTS = 4096
MAX_GROUP = 256
"""Environments of one group of a host at most."""
MAX_COMPLAINTS = 3
"""Log lines about what one host gets wrong."""

_log = logging.getLogger(__name__)


class Weights(NamedTuple):
    """The newest weights, encoded."""

    version: int
    part: Any


class Learning(NamedTuple):
    """What the bridge asks of the run that it serves."""

    initial_state: Callable[[int], Nest]
    """Core state of so many rows, nest of float32 arrays."""
    version: Callable[[], int]
    """Updates until now."""
    num_weights: int
    encode_weights: Callable[[], Weights]
    """On the bridge's thread."""
    put: Callable[[str, Unroll, Callable[[Unroll], None]], Awaitable[None]]
    """(level_name, unroll, give_back): see ``UnrollQueue.put``."""
    act: Callable[[str, str, EnvGroup], Awaitable[None]]
    """(name, level_name, group): play it, for ever."""
    tell: Callable[[Sequence[Episode], Sequence[Loss], int], None]
    """Games ended, environments lost, frames acted on a host that infers itself."""


class RemoteGroup:
    """E environments on a host: an ``EnvGroup`` whose rows come over the network."""

    def __init__(
        self, slot: int, spec: EnvSpec, num_envs: int, compression: wire.Compression,
        send: Callable[[Act, Any], None],
    ) -> None:  # fmt: skip
        """``send(header, part)`` brings an action to the host."""
        self.spec = spec
        self.num_envs = num_envs
        self._slot = slot
        self._format = RowFormat(spec, num_envs)
        self._compression = compression
        self._send = send
        self._rows = 0  # taken
        self._act: tuple[Act, Any] | None = None
        self._observation: Nest = None
        # A row lives until the step after the next is asked for.
        self._spare: deque[Nest] = deque(
            optree.tree_map(
                lambda leaf: np.empty((num_envs, *leaf.shape), leaf.dtype), spec.observation
            )
            for _ in range(3)
        )
        self._waiter: asyncio.Future[EnvStep] | None = None
        self._early: EnvStep | None = None
        self._lost: str | None = None

    async def reset(self) -> EnvStep:
        """The first row."""
        return await self._next()

    async def step(self, action: ActionArray) -> EnvStep:
        """The row that follows ``action``; ActorLost once the host is gone."""
        act = Act(self._slot, self._rows - 1)
        self._act = (act, wire.encode_action(action, self.spec.actions))
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
        if header.number == self._rows - 1:
            if self._act is not None:
                self._send(*self._act)  # which was lost on the way
            return None
        if header.number != self._rows or (self._waiter is None and self._rows):
            raise WireError(f"row {header.number} of slot {self._slot}, not {self._rows}")
        target = self._spare.popleft()
        self._spare.append(target)
        row = self._format.decode(parts, target, self._observation, self._compression)
        if (self._rows == 0) != bool(row.first.all()) and self._rows == 0:
            raise WireError("the first row does not open every episode")
        episodes, losses = wire.happened(header)
        row = row._replace(episodes=episodes, losses=losses)
        self._observation = target
        self._rows += 1
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


class _Figures:
    """Of one host, since its last report."""

    def __init__(self) -> None:
        self.frames = 0
        self.lag_sum = 0
        self.lag_rows = 0
        self.received_bytes = 0
        self.sent_bytes = 0
        self.since_s = time.monotonic()


class _Host:
    """One host that has been welcomed."""

    def __init__(self, hello: Hello, user: str, groups: list[Group]) -> None:
        self.hello = hello
        self.user = user
        self.routing = b""
        self.groups = groups
        self.slots = {group.slot: group for group in groups}
        self.remote_groups: dict[int, RemoteGroup] = {}
        self.heard_s = 0.0
        self.received = 0
        self.accepted = 0
        self.inbox: deque[tuple[UnrollSent, list[Any]]] = deque()
        self.filled = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []
        self.weights_sent = -1
        self.weights_sent_s = 0.0
        self.wants_weights = False
        self.complaints = 0
        self.round_trip_s = 0.0
        self.reconnects = 0
        self.figures = _Figures()

    @property
    def actors(self) -> int:
        return sum(group.num_envs for group in self.groups)


class Listener(NamedTuple):
    """What ``--listen`` and the keys come to; made before anything else of a run."""

    endpoint: str
    secret: Any
    allowed: AllowedKeys | None


def make_listener(config: Config) -> Listener:
    """UsageError, one line, for an address or keys with which nobody may or can listen."""
    check_endpoint(config.listen, "listen", listening=True)
    if bool(config.secret_key) != bool(config.allowed_keys):
        raise UsageError("secret_key and allowed_keys belong together: give both, or neither")
    check_listening(config.listen, bool(config.secret_key), config.insecure)
    if not config.secret_key:
        return Listener(config.listen, None, None)
    return Listener(
        config.listen, load_secret(Path(config.secret_key)), AllowedKeys(Path(config.allowed_keys))
    )


class RemoteBridge:
    """Serves the actor hosts of one run. Belongs to the event loop's thread."""

    def __init__(
        self, config: Config, spec: EnvSpec, listener: Listener, learning: Learning, seed: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Bind at once: UsageError where the address is taken or not ours."""
        self.session = os.urandom(16)
        self.refused = 0
        """Requests of hosts that were not met, and keys that were not allowed."""
        self.rejected = 0
        """Messages that were not what was agreed on."""
        self._config = config
        self._spec = spec
        self._learning = learning
        self._seed = seed
        self._clock = clock
        self._levels = levels_of(config.level_name)
        self._hosts: dict[bytes, _Host] = {}  # by incarnation
        self._by_routing: dict[bytes, _Host] = {}
        # Hosts that were lost: what they may still come back with.
        self._departed: OrderedDict[bytes, _Host] = OrderedDict()
        self._free_slots: list[int] = []
        self._next_slot = config.num_groups
        self._next_env = config.num_actors
        self._weights: Weights | None = None
        self._weights_wanted = asyncio.Event()
        self._thread = NamedThread("hosts")
        self._formats: dict[int, UnrollFormat] = {}
        self._buffers: dict[int, UnrollBuffers] = {}
        self._closed = False
        self._tasks: asyncio.TaskGroup | None = None
        self._public = dataclasses.replace(
            config, listen=config.listen, secret_key="", allowed_keys="", logdir="-", tuned=""
        ).to_json()
        self._spec_json = json.dumps(spec_to_json(spec))
        self._context = zmq.asyncio.Context()
        self._allowed = listener.allowed
        self._gate: Gate | None = None
        self._socket = self._bind(listener)

    def _bind(self, listener: Listener) -> zmq.asyncio.Socket:
        socket = self._context.socket(zmq.ROUTER)
        socket.linger = 500
        socket.ipv6 = "[" in listener.endpoint
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2_000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6_000)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, self._most_bytes())
        socket.rcvhwm = 64
        socket.sndhwm = 256
        if listener.secret is not None and listener.allowed is not None:
            socket.curve_server = True
            socket.curve_publickey = listener.secret.public
            socket.curve_secretkey = listener.secret.secret
            self._gate = Gate(self._context, listener.allowed)
            self._gate.start()
        try:
            socket.bind(listener.endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise UsageError(f"listen={listener.endpoint!r}: {error.strerror}") from None
        self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        return socket

    def _most_bytes(self) -> int:
        largest = max(MAX_GROUP, self._config.group_size)
        return max(self._format(largest).max_part_bytes, wire.MAX_HEADER)

    async def serve(self) -> None:
        """Serve for ever; whatever goes wrong on our side comes out."""
        async with asyncio.TaskGroup() as self._tasks:
            self._tasks.create_task(self._receive())
            self._tasks.create_task(self._tick())
            self._tasks.create_task(self._send_weights())

    def close(self) -> None:
        """Let the socket and the thread go; harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        for host in self._hosts.values():
            for group in host.remote_groups.values():
                group.lose("the learner ends")
        if self._gate is not None:
            self._gate.stop()
        self._context.destroy(linger=0)
        self._thread.close()

    def progress(self) -> dict[str, Any]:
        """Hosts at work."""
        return {host.hello.name: host.received for host in self._hosts.values()}

    def reports(self) -> dict[str, HostReport]:
        """By name of the host; those of one name are told apart by a number."""
        reports: dict[str, HostReport] = {}
        for host in self._hosts.values():
            figures, host.figures = host.figures, _Figures()
            seconds = max(host.figures.since_s - figures.since_s, 1e-9)
            name, count = host.hello.name, 2
            while name in reports:
                name, count = f"{host.hello.name}#{count}", count + 1
            reports[name] = HostReport(
                actors=host.actors,
                frames_per_s=figures.frames / seconds,
                policy_lag_mean=figures.lag_sum / figures.lag_rows if figures.lag_rows else 0.0,
                received_bytes_per_s=figures.received_bytes / seconds,
                sent_bytes_per_s=figures.sent_bytes / seconds,
                round_trip_ms=1000 * host.round_trip_s,
                reconnects=host.reconnects,
            )
        return reports

    # Messages.

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            try:
                self._on_message(frames)
            except WireError as error:
                self._reject(self._by_routing.get(frames[0].bytes), str(error))

    def _on_message(self, frames: list[zmq.Frame]) -> None:
        routing = frames[0].bytes
        user = self._user_of(frames[-1])
        if self._allowed is not None and user.encode() not in self._allowed:
            self._forget_revoked(routing)
            return
        if not 2 <= len(frames) <= wire.MAX_PARTS:
            raise WireError(f"a message of {len(frames) - 1} parts")
        header = wire.read_from_host(frames[1].buffer)
        host = self._by_routing.get(routing)
        if isinstance(header, Hello):
            self._on_hello(routing, user, header)
            return
        if host is None:
            self._send(routing, Unknown())
            return
        host.heard_s = self._clock()
        host.figures.received_bytes += sum(len(frame) for frame in frames[1:])
        match header:
            case Ping():
                host.round_trip_s, host.reconnects = header.round_trip_s, header.reconnects
                self._send(routing, Pong(header.sent_s, host.accepted, self._learning.version()))
            case WantWeights():
                host.wants_weights = True
                self._weights_wanted.set()
            case UnrollSent():
                self._on_unroll(host, header, [frame.buffer for frame in frames[2:]])
            case RowSent():
                self._on_row(host, header, [frame.buffer for frame in frames[2:]])
            case Bye():
                self._lose(host, "left", departed=False)

    @staticmethod
    def _user_of(frame: zmq.Frame) -> str:
        try:
            return str(frame.get("User-Id"))
        except zmq.ZMQError:
            return ""  # no authentication

    def _reject(self, host: _Host | None, what: str) -> None:
        self.rejected += 1
        if host is None:
            if self.rejected <= MAX_COMPLAINTS:
                _log.warning("a stranger's message is ignored: %s", what)
            return
        host.complaints += 1
        if host.complaints <= MAX_COMPLAINTS:
            _log.warning("a message of actor host %s is ignored: %s", host.hello.name, what)

    def _forget_revoked(self, routing: bytes) -> None:
        host = self._by_routing.get(routing)
        if host is not None:
            self.refused += 1
            self._lose(host, "has a key that is no longer allowed", departed=False)

    # Membership.

    def _on_hello(self, routing: bytes, user: str, hello: Hello) -> None:
        if hello.protocol != wire.PROTOCOL:
            mine = wire.PROTOCOL
            self._refuse(routing, f"protocol {hello.protocol} here is {mine}: update asyncagent")
            return
        host = self._hosts.get(hello.incarnation) or self._departed.get(hello.incarnation)
        if host is not None and host.user != user:
            self._refuse(routing, "this incarnation belongs to another key")
            return
        if host is not None and host.hello.inference != hello.inference:
            self._refuse(routing, "an incarnation keeps its place of inference")
            return
        known = hello.session == self.session and host is not None
        present = self._hosts.get(hello.incarnation)
        if present is None:
            host = self._join(hello, user, host)
            if host is None:
                self._refuse(routing, "there are too many hosts", for_good=False)
                return
        else:
            host = present
            self._by_routing.pop(host.routing, None)
        go_on = known and hello.slots == [group.slot for group in host.groups]
        if present is None:
            # The rows of groups that were given up on cannot be gone on with.
            go_on = go_on and hello.inference == "host"
        elif not go_on:
            self._restart(host)
        host.routing = routing
        host.heard_s = self._clock()
        host.weights_sent = -1
        self._by_routing[routing] = host
        self._send(
            routing,
            Welcome(
                protocol=wire.PROTOCOL,
                session=self.session,
                config=self._public,
                spec=self._spec_json,
                num_weights=self._learning.num_weights if hello.inference == "host" else 0,
                groups=host.groups,
                seed=self._seed,
                go_on=go_on,
                received=host.received,
                credits=len(host.groups),
                version=self._learning.version(),
            ),
        )

    def _join(self, hello: Hello, user: str, before: _Host | None) -> _Host | None:
        """Welcome a host; ``before``: what it was when it was lost."""
        if len(self._hosts) >= MAX_HOSTS:
            return None
        groups = self._take_back(before) if before is not None else None
        if groups is None:
            groups = self._deal(hello)
        host = _Host(hello, user, groups)
        if before is not None:
            del self._departed[hello.incarnation]
            host.received = host.accepted = before.accepted
        self._hosts[hello.incarnation] = host
        _log.info(
            "actor host %s %s: %d environments in %d groups, inference by the %s",
            hello.name,
            "is back" if before is not None else "joins",
            host.actors,
            len(groups),
            hello.inference,
        )
        self._start(host)
        return host

    def _take_back(self, before: _Host) -> list[Group] | None:
        """The groups that a lost host had, if nobody else has been given them."""
        if not before.slots.keys() <= set(self._free_slots):
            return None
        self._free_slots = [slot for slot in self._free_slots if slot not in before.slots]
        heapq.heapify(self._free_slots)
        return before.groups

    def _deal(self, hello: Hello) -> list[Group]:
        """Free numbers first, so that the levels of lost hosts are played again."""
        count = hello.num_groups or max(4, hello.num_cores)
        level = self._config.level_name.partition(",")[0]
        if family_of(level) != "dmlab" and hello.num_groups == 0:
            count = min(hello.num_actors, count)
            while hello.num_actors % count:
                count -= 1
        elif family_of(level) == "dmlab":
            count = split_groups(level, hello.num_actors, count)
        count = max(count, -(-hello.num_actors // MAX_GROUP))
        while hello.num_actors % count:
            count += 1
        groups = []
        size = hello.num_actors // count
        for _ in range(count):
            if self._free_slots:
                slot = heapq.heappop(self._free_slots)
            else:
                slot, self._next_slot = self._next_slot, self._next_slot + 1
            level_name = self._levels[slot % len(self._levels)]
            groups.append(Group(slot, level_name, size, self._next_env))
            self._next_env += size
        return groups

    def _start(self, host: _Host) -> None:
        assert self._tasks is not None
        if host.hello.inference == "host":
            host.tasks = [self._tasks.create_task(self._take_in(host))]
            return
        for group in host.groups:
            remote = RemoteGroup(
                group.slot,
                self._spec,
                group.num_envs,
                self._config.compression,
                lambda act, part: self._send(host.routing, act, part),
            )
            host.remote_groups[group.slot] = remote
            name = f"{host.hello.name}/{group.slot}"
            host.tasks.append(self._tasks.create_task(self._play(name, group.level_name, remote)))

    async def _play(self, name: str, level_name: str, group: RemoteGroup) -> None:
        # The host has gone, or the run ends.
        with contextlib.suppress(ActorLost, EndOfUnrolls):
            await self._learning.act(name, level_name, group)

    def _restart(self, host: _Host) -> None:
        """The host begins its groups anew, without having been missed."""
        self._stop(host)
        host.remote_groups = {}
        host.inbox.clear()
        host.received = host.accepted
        self._start(host)

    def _stop(self, host: _Host) -> None:
        for group in host.remote_groups.values():
            group.lose(f"actor host {host.hello.name} has gone")
        for task in host.tasks:
            task.cancel()
        host.tasks = []

    def _lose(self, host: _Host, why: str, departed: bool = True) -> None:
        _log.warning("actor host %s %s", host.hello.name, why)
        self._stop(host)
        del self._hosts[host.hello.incarnation]
        self._by_routing.pop(host.routing, None)
        for slot in host.slots:
            heapq.heappush(self._free_slots, slot)
        if departed:
            host.inbox.clear()
            host.remote_groups = {}
            self._departed[host.hello.incarnation] = host
            if len(self._departed) > MAX_HOSTS:
                self._departed.popitem(last=False)

    def _refuse(self, routing: bytes, reason: str, for_good: bool = True) -> None:
        self.refused += 1
        if self.refused <= 10:
            _log.warning("an actor host is refused: %s", reason)
        self._send(routing, Refused(reason, for_good))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.look_round()

    def look_round(self) -> None:
        """Once a second: who has fallen silent, whose key is no longer allowed."""
        now_s = self._clock()
        for host in [*self._hosts.values()]:
            if now_s - host.heard_s > LOST_S:
                self._lose(host, f"is lost: silent for {now_s - host.heard_s:.0f} s")
        if self._allowed is not None:
            self._allowed.refresh()
            for host in [*self._hosts.values()]:
                if host.user.encode() not in self._allowed:
                    self._forget_revoked(host.routing)

    # Unrolls.

    def _on_unroll(self, host: _Host, header: UnrollSent, parts: list[Any]) -> None:
        if header.incarnation != host.hello.incarnation:
            raise WireError("an unroll of another incarnation")
        if header.slot not in host.slots:
            raise WireError(f"an unroll of slot {header.slot}, which is not this host's")
        if host.hello.inference != "host":
            raise WireError("an unroll, although inference is the learner's")
        if header.seq <= host.received:
            # Sent again because the answer was lost.
            self._send(host.routing, Accepted(host.accepted, self._learning.version()))
            return
        if header.seq != host.received + 1:
            raise WireError(f"unroll {header.seq} follows {host.received}")
        if host.received - host.accepted >= len(host.groups):
            raise WireError("more unrolls than there are credits for")
        host.received += 1
        host.inbox.append((header, parts))
        host.filled.set()

    async def _take_in(self, host: _Host) -> None:
        """Put a host's unrolls into the queue, in order; say so only then."""
        while True:
            while not host.inbox:
                host.filled.clear()
                await host.filled.wait()
            header, parts = host.inbox[0]
            group = host.slots[header.slot]
            buffers = self._buffers_of(group.num_envs)
            unroll = buffers.take()
            format_ = self._format(group.num_envs)
            version = self._learning.version()
            failure = ""
            try:
                await self._thread.run(
                    format_.decode, parts, unroll, version, self._config.compression
                )
            except WireError as error:
                failure = str(error)
            if failure or header.compression != self._config.compression:
                buffers.give_back(unroll)
                self._reject(host, failure or "another compression than was agreed on")
            else:
                lag = version - unroll.policy_version[unroll.valid]
                rows = int(np.count_nonzero(unroll.valid))
                try:
                    await self._learning.put(group.level_name, unroll, buffers.give_back)
                except EndOfUnrolls:
                    return
                host.figures.frames += header.acted_frames
                host.figures.lag_sum += int(lag.sum())
                host.figures.lag_rows += rows
                self._learning.tell(*wire.happened(header), header.acted_frames)
            # No await since the queue took it: what is counted is accepted, whatever comes.
            host.inbox.popleft()
            host.accepted = header.seq
            self._send(host.routing, Accepted(host.accepted, self._learning.version()))

    def _format(self, num_envs: int) -> UnrollFormat:
        if num_envs not in self._formats:
            self._formats[num_envs] = UnrollFormat(
                self._spec,
                self._config.unroll_length,
                num_envs,
                self._learning.initial_state(num_envs),
            )
        return self._formats[num_envs]

    def _buffers_of(self, num_envs: int) -> UnrollBuffers:
        if num_envs not in self._buffers:
            self._buffers[num_envs] = UnrollBuffers(
                lambda: empty_unroll(
                    self._config.unroll_length,
                    num_envs,
                    self._spec,
                    self._learning.initial_state(num_envs),
                )
            )
        return self._buffers[num_envs]

    # Rows.

    def _on_row(self, host: _Host, header: RowSent, parts: list[Any]) -> None:
        group = host.remote_groups.get(header.slot)
        if group is None:
            raise WireError(f"a row of slot {header.slot}, which is not this host's")
        if header.compression != self._config.compression:
            raise WireError("another compression than was agreed on")
        row = group.take(header, parts)
        if row is not None:
            host.figures.frames += group.num_envs * self._config.num_action_repeats

    # Weights.

    async def _send_weights(self) -> None:
        while True:
            await self._weights_wanted.wait()
            self._weights_wanted.clear()
            if self._weights is None or self._weights.version != self._learning.version():
                self._weights = await self._thread.run(self._learning.encode_weights)
            version, part = self._weights
            for host in self._hosts.values():
                # A host gets a version once in a while: who does not read fills no memory.
                waited_s = self._clock() - host.weights_sent_s
                if host.wants_weights and (version > host.weights_sent or waited_s > LOST_S):
                    host.wants_weights = False
                    host.weights_sent, host.weights_sent_s = version, self._clock()
                    header = WeightsSent(version, self._config.weights_precision)
                    self._send(host.routing, header, part)

    def _send(self, routing: bytes, header: FromLearner, *parts: Any) -> None:
        frames = [routing, wire.encode_header(header), *parts]
        # A ROUTER never waits: what a host does not take is dropped, and asked for again.
        self._socket.send_multipart(frames, copy=False)
        host = self._by_routing.get(routing)
        if host is not None:
            size = sum(memoryview(frame).nbytes for frame in frames[1:])
            host.figures.sent_bytes += size
