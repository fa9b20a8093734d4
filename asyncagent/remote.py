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
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import zmq
import zmq.asyncio

from asyncagent import wire
from asyncagent.config import Config
from asyncagent.envs.shared import spec_to_json
from asyncagent.errors import ActorLost, EndOfUnrolls, UsageError, WireError
from asyncagent.intake import Intake, Learning, Weights
from asyncagent.keys import (
    AllowedKeys,
    Gate,
    KeyPair,
    check_endpoint,
    check_listening,
    failures_of,
    load_secret,
    sender,
)
from asyncagent.members import MAX_GROUP, Member, Members
from asyncagent.metrics import HostReport, HostsReport
from asyncagent.remote_group import RemoteGroup
from asyncagent.structs import EnvSpec
from asyncagent.tasks import endless, named
from asyncagent.threads import NamedThread
from asyncagent.wire import (
    Accepted,
    Bye,
    Ended,
    FromLearner,
    Hello,
    Ping,
    Pong,
    Refused,
    RowSent,
    Unknown,
    UnrollSent,
    WantWeights,
    WeightsSent,
    Welcome,
)

__all__ = ["Learning", "Listener", "RemoteBridge", "Weights", "make_listener"]

LOST_S = 7.0
"""A host that says nothing for so long is lost; it says something every two seconds."""
TICK_S = 1.0
HANDSHAKE_MS = 5_000
FAREWELL_MS = 1_000
"""Longest that the hosts' last message may take to leave."""
MAX_COMPLAINTS = 3
"""Log lines about what one host gets wrong."""
MAX_REFUSALS = 10
"""Log lines about hosts that are refused."""

_log = logging.getLogger(__name__)


class Listener(NamedTuple):
    """What ``--listen`` and the keys come to; made before anything else of a run."""

    endpoint: str
    secret: KeyPair | None
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
        self.rejected = 0
        """Messages that were not what was agreed on."""
        self._refused = 0
        self._config = config
        self._spec = spec
        self._learning = learning
        self._seed = seed
        self._clock = clock
        self._members = Members(config)
        self._thread = NamedThread("hosts")
        self._intake = Intake(config, spec, learning, self._thread, self._accept, self._reject)
        self._weights: Weights | None = None
        self._weights_wanted = asyncio.Event()
        self._closed = False
        self._linger_ms = 0
        self._tasks: asyncio.TaskGroup | None = None
        # Not what concerns this machine alone.
        self._public = dataclasses.replace(
            config, secret_key="", allowed_keys="", logdir="-", tuned=""
        ).to_json()
        self._spec_json = json.dumps(spec_to_json(spec))
        self._allowed = listener.allowed
        self._gate: Gate | None = None
        self._failures: zmq.asyncio.Socket | None = None
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            self._bind(listener)
        except zmq.ZMQError as error:
            self.close()
            raise UsageError(f"listen={listener.endpoint!r}: {error.strerror}") from None
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _bind(self, listener: Listener) -> None:
        socket = self._socket
        socket.ipv6 = "[" in listener.endpoint
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2_000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6_000)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        largest = self._intake.format(max(MAX_GROUP, self._config.group_size))
        socket.setsockopt(zmq.MAXMSGSIZE, max(largest.max_part_bytes, wire.MAX_HEADER))
        socket.rcvhwm = 64
        # What exceeds this is dropped. A host has an Act on its way for each group at most, an
        # Accepted for each credit, and one message with weights.
        socket.sndhwm = 16_384
        if listener.secret is not None and listener.allowed is not None:
            listener.secret.serve(socket)
            self._gate = Gate(self._context, listener.allowed)
            self._gate.start()
            self._failures = failures_of(socket)
        socket.bind(listener.endpoint)

    async def serve(self) -> None:
        """Serve for ever; whatever goes wrong on our side comes out."""
        async with asyncio.TaskGroup() as self._tasks:
            work = {
                "hosts' messages": self._receive(),
                "hosts' membership": self._tick(),
                "hosts' weights": self._send_weights(),
            }
            if self._gate is not None and self._failures is not None:
                work["refusals"] = self._gate.watch(self._failures)
                work["authentication"] = self._gate.answer()
            for name, task in work.items():
                self._tasks.create_task(endless(name, task))

    def farewell(self) -> None:
        """The run is complete: send the hosts home."""
        for member in self._members.present.values():
            self._send(member.routing, Ended())
        self._linger_ms = FAREWELL_MS

    def close(self) -> None:
        """Let the socket and the thread go; harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        for member in self._members.present.values():
            for group in member.remote_groups.values():
                group.lose("the learner ends")
        if self._gate is not None:
            self._gate.stop()
            self._socket.disable_monitor()
        self._context.destroy(linger=self._linger_ms)
        self._thread.close()

    @property
    def refused(self) -> int:
        """Requests of hosts that were not met, and handshakes that no allowed key opened."""
        return self._refused + (0 if self._gate is None else self._gate.refused)

    def progress(self) -> dict[str, Any]:
        """Hosts at work."""
        return {member.hello.name: member.received for member in self._members.present.values()}

    def report(self) -> HostsReport:
        """Hosts by name, those of one name told apart by a number; who was refused; what was."""
        reports: dict[str, HostReport] = {}
        for member in self._members.present.values():
            name, count = member.hello.name, 2
            while name in reports:
                name, count = f"{member.hello.name}#{count}", count + 1
            reports[name] = member.report()
        return HostsReport(reports, self.refused, self.rejected)

    # Messages.

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            try:
                self._on_message(frames)
            except WireError as error:
                member = self._members.by_routing.get(frames[0].bytes)
                self._reject(member, str(error))

    def _on_message(self, frames: list[zmq.Frame]) -> None:
        routing = frames[0].bytes
        member = self._members.by_routing.get(routing)
        user = b"" if self._allowed is None else sender(frames[-1])
        if self._allowed is not None and user not in self._allowed:
            if member is not None:
                self._revoke(member)
            return
        if not 2 <= len(frames) <= wire.MAX_PARTS:
            raise WireError(f"a message of {len(frames) - 1} parts")
        header = wire.read_from_host(frames[1].buffer)
        if isinstance(header, Hello):
            self._on_hello(routing, user, header)
            return
        if member is None:
            self._send(routing, Unknown())
            return
        member.heard_s = self._clock()
        member.figures.received_bytes += sum(len(frame) for frame in frames[1:])
        match header:
            case Ping():
                member.on_ping(header)
                version = self._learning.version()
                self._send(routing, Pong(header.sent_s, member.accepted, version))
            case WantWeights():
                member.weights_wanted = header.version
                self._weights_wanted.set()
            case UnrollSent():
                self._intake.on_unroll(member, header, [frame.buffer for frame in frames[2:]])
            case RowSent():
                try:
                    self._intake.on_row(member, header, [frame.buffer for frame in frames[2:]])
                except WireError as error:
                    # No Act would ever come, and the host would wait for it.
                    self._send(routing, Refused(f"a row of it is none: {error}"[:500], True))
                    raise
            case Bye():
                self._lose(member, "leaves", comes_back=False)

    def _send(self, routing: bytes, header: FromLearner, *parts: Any) -> None:
        frames = [routing, wire.encode_header(header), *parts]
        # A ROUTER never waits: what is for nobody, or too much, is dropped, and asked for again.
        self._socket.send_multipart(frames, copy=False)
        member = self._members.by_routing.get(routing)
        if member is not None:
            member.figures.sent_bytes += sum(memoryview(frame).nbytes for frame in frames[1:])

    def _accept(self, member: Member) -> None:
        self._send(member.routing, Accepted(member.accepted, self._learning.version()))

    def _reject(self, member: Member | None, what: str) -> None:
        self.rejected += 1
        if member is None:
            if self.rejected <= MAX_COMPLAINTS:
                _log.warning("a stranger's message is ignored: %s", what)
            return
        member.complaints += 1
        if member.complaints <= MAX_COMPLAINTS:
            _log.warning("a message of actor host %s is ignored: %s", member.hello.name, what)

    # Membership.

    def _on_hello(self, routing: bytes, user: bytes, hello: Hello) -> None:
        if hello.protocol != wire.PROTOCOL:
            mine = wire.PROTOCOL
            self._refuse(routing, f"protocol {hello.protocol} here is {mine}: update asyncagent")
            return
        known = self._members.known(hello.incarnation)
        if known is not None and known.user != user:
            self._refuse(routing, "this incarnation belongs to another key")
            return
        if known is not None and known.hello.inference != hello.inference:
            self._refuse(routing, "an incarnation keeps its place of inference")
            return
        if known is not None and routing in known.past_routings:
            return  # overtaken by one that was said later
        before = self._members.by_routing.get(routing)
        if before is not None and before.hello.incarnation != hello.incarnation:
            self._lose(before, "has become another", comes_back=False)
        member = self._members.present.get(hello.incarnation)
        if member is None:
            member = self._members.join(hello, user)
            if member is None:
                self._refuse(routing, "there are too many hosts", for_good=False)
                return
            self._start(member, "joins" if known is None else "is back")
        # A host that is here either runs these groups, and then goes on with them, or has not
        # begun with anything, and nothing has come from it.
        self._members.connect(member, routing)
        member.heard_s = self._clock()
        member.weights_sent = -1
        self._send(
            routing,
            Welcome(
                protocol=wire.PROTOCOL,
                session=self.session,
                config=self._public,
                spec=self._spec_json,
                num_weights=self._learning.num_weights if hello.inference == "host" else 0,
                groups=member.groups,
                seed=self._seed,
                received=member.received,
                credits=len(member.groups),
                version=self._learning.version(),
            ),
        )

    def _start(self, member: Member, how: str) -> None:
        _log.info(
            "actor host %s %s: %d environments in %d groups, inference by the %s",
            member.hello.name,
            how,
            member.actors,
            len(member.groups),
            member.hello.inference,
        )
        assert self._tasks is not None
        if member.hello.inference == "host":
            member.tasks = [self._tasks.create_task(self._take_in(member))]
            return
        for group in member.groups:
            remote = RemoteGroup(
                group.slot,
                self._spec,
                group.num_envs,
                self._config.compression,
                lambda act, part: self._send(member.routing, act, part),
            )
            member.remote_groups[group.slot] = remote
            name = f"{member.hello.name}/{group.slot}"
            member.tasks.append(self._tasks.create_task(self._play(name, group.level_name, remote)))

    # What a host that leaves at once has cancelled before it begins is not even made.

    async def _take_in(self, member: Member) -> None:
        await named(f"unrolls of {member.hello.name}", self._intake.take_in(member))

    async def _play(self, name: str, level_name: str, group: RemoteGroup) -> None:
        # The host has gone, or the run ends.
        with contextlib.suppress(ActorLost, EndOfUnrolls):
            await named(name, self._learning.act(name, level_name, group))

    def _lose(self, member: Member, why: str, comes_back: bool) -> None:
        _log.warning("actor host %s %s", member.hello.name, why)
        for group in member.remote_groups.values():
            group.lose(f"actor host {member.hello.name} {why}")
        for task in member.tasks:
            task.cancel()
        member.tasks = []
        self._members.lose(member, comes_back)

    def _revoke(self, member: Member) -> None:
        self._refused += 1
        self._send(member.routing, Refused("its key is no longer allowed", for_good=True))
        self._lose(member, "has a key that is no longer allowed", comes_back=False)

    def _refuse(self, routing: bytes, reason: str, for_good: bool = True) -> None:
        self._refused += 1
        if self._refused <= MAX_REFUSALS:
            _log.warning("an actor host is refused: %s", reason)
        self._send(routing, Refused(reason, for_good))

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + TICK_S
            await asyncio.sleep(TICK_S)
            late_s = loop.time() - due_s
            if late_s > TICK_S:  # what was said while we were held up has yet to be heard
                for member in self._members.present.values():
                    member.heard_s += late_s
            self.look_round()

    def look_round(self) -> None:
        """Once a second: who has fallen silent, whose key is no longer allowed."""
        now_s = self._clock()
        for member in [*self._members.present.values()]:
            if now_s - member.heard_s > LOST_S:
                why = f"is lost: silent for {now_s - member.heard_s:.0f} s"
                self._lose(member, why, comes_back=True)
        if self._allowed is not None:
            self._allowed.refresh()
            for member in [*self._members.present.values()]:
                if member.user not in self._allowed:
                    self._revoke(member)

    # Weights.

    async def _send_weights(self) -> None:
        while True:
            await self._weights_wanted.wait()
            self._weights_wanted.clear()
            if self._weights is None or self._weights.version != self._learning.version():
                self._weights = await self._thread.run(self._learning.encode_weights)
            version, part = self._weights
            header = WeightsSent(version, self._config.weights_precision)
            for member in self._members.present.values():
                if member.weights_wanted is None or member.weights_wanted >= version:
                    continue
                # One message at a time: a host that does not read fills no memory.
                waited_s = self._clock() - member.weights_sent_s
                if member.weights_wanted >= member.weights_sent or waited_s > LOST_S:
                    member.weights_wanted = None
                    member.weights_sent, member.weights_sent_s = version, self._clock()
                    self._send(member.routing, header, part)
