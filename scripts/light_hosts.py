"""The processes of simulate_hosts: a learner that takes at a limited rate, and light actor hosts.

``python -m light_hosts learner|hosts FLAGS`` (FLAGS: JSON of ``Flags``) tells what it sees in lines
of JSON on stdout, and ends in good order with the first line on stdin.

The learner is a real RemoteBridge with a real UnrollQueue.  The hosts speak the real protocol over
a socket each, but share an event loop and have no environments: they send one tiny unroll of catch
over and over, as many as they have credits for.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import random
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import uvloop
import zmq
import zmq.asyncio

from asyncagent import wire
from asyncagent.config import Config, resolve
from asyncagent.conversation import PING_S, SILENCE_S
from asyncagent.envs import env_spec
from asyncagent.envs.shared import spec_from_json
from asyncagent.formats import UnrollFormat
from asyncagent.keys import load_public, load_secret
from asyncagent.placement import keep_freed_memory
from asyncagent.remote import Learning, RemoteBridge, Weights, make_listener
from asyncagent.structs import Unroll, map_nest
from asyncagent.tasks import cancel
from asyncagent.unroll import UnrollQueue, empty_unroll

LEVEL = "catch"
GROUPS = 2
"""Of each host, of one environment each: two credits."""
NUM_WEIGHTS = 5_000
TICK_S = 0.25
MS = 1000


class Flags(NamedTuple):
    """What every process of a simulation is told."""

    endpoint: str
    keys: str
    """Folder of learner.key_secret, allowed/, host.key_secret, learner.key; empty: plain."""
    unrolls_per_s: float
    """What the learner takes, of all hosts together."""
    hosts: int
    """Of this process."""
    first: int
    """Number of its first host."""
    every: int
    """Numbers between one of its hosts and the next."""
    join_leave_per_s: float
    """Of this process's hosts: so many leave, and as many join."""
    joins_per_s: float
    """While the first ones join."""


def tell(**what: Any) -> None:
    """A line to the parent."""
    print(json.dumps(what), flush=True)


async def told_to_end() -> None:
    """Until the parent says anything, or is gone."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    await reader.readline()


def raise_limits() -> None:
    """As many file descriptors as we may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def memory_mb() -> float:
    """Resident, of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# The learner.


class _Membership(logging.Handler):
    """What the bridge says of hosts that come and go, and when."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line of the bridge's log."""
        words = record.getMessage()
        if words.startswith("actor host "):
            _, _, name, *rest = words.split()
            what = " ".join(rest).partition(":")[0]
            tell(host=name, event=what, at_s=time.monotonic())
        elif record.levelno >= logging.WARNING:
            tell(warning=words)


async def learn(flags: Flags) -> None:
    """Take unrolls at a limited rate until told to end."""
    security: dict[str, Any] = {}
    if flags.keys:
        secret, allowed = f"{flags.keys}/learner.key_secret", f"{flags.keys}/allowed"
        security = {"secret_key": secret, "allowed_keys": allowed}
    config = resolve(LEVEL, listen=flags.endpoint, num_actors=0, **security)
    logging.basicConfig(level=logging.INFO, handlers=[_Membership()])
    queue = UnrollQueue(config.batch_size, config.batch_size)
    version = taken = 0

    async def put(level_name: str, unroll: Unroll, give_back: Callable[[Unroll], None]) -> None:
        nonlocal taken
        await queue.put(unroll, give_back)
        taken += 1

    async def take() -> None:
        nonlocal version
        due_s = time.monotonic()
        while True:
            queue.release(await queue.get())
            version += 1
            due_s = max(due_s + config.batch_size / flags.unrolls_per_s, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())

    weights = np.zeros(NUM_WEIGHTS, np.float32).tobytes()
    learning = Learning(
        initial_state=lambda num_envs: (),
        version=lambda: version,
        num_weights=NUM_WEIGHTS,
        encode_weights=lambda: Weights(version, weights),
        put=put,
        act=_nobody,
        tell=lambda *told: None,
    )
    bridge = RemoteBridge(config, env_spec(config), make_listener(config), learning, seed=1)
    tell(endpoint=bridge.endpoint)

    async def watch() -> None:
        for tick in itertools.count(1):
            await asyncio.sleep(0.1)
            tell(at_s=time.monotonic(), hosts=len(bridge.progress()), taken=taken)
            if tick % 10 == 0:
                tell(memory_mb=memory_mb(), cpu_s=time.process_time(), updates=version,
                     rejected=bridge.rejected, refused=bridge.refused)  # fmt: skip

    async with asyncio.TaskGroup() as tasks:
        work = [tasks.create_task(task) for task in (bridge.serve(), take(), watch())]
        await told_to_end()
        tell(left_over=sorted(bridge.progress()))
        await cancel(*work)
    bridge.close()


async def _nobody(*group: Any) -> None:
    raise NotImplementedError


# The hosts.


class _Agreed(NamedTuple):
    """What all hosts of this process are told by the learner, and send."""

    parts: list[bytes]
    compression: wire.Compression


class LightHost:
    """One host: a socket and an incarnation."""

    def __init__(self, crew: Crew, name: str) -> None:
        self.name = name
        self.accepted = 0
        self.round_trips_s: deque[float] = deque(maxlen=100)
        self.silences = 0
        """Times that the learner said nothing for so long that a host would look for it anew."""
        self.unknown = 0
        """Times that the learner no longer knew us."""
        self.began_s = 0.0
        """When the weights were there."""
        self._crew = crew
        self._incarnation = os.urandom(16)
        self._socket = crew.connect()
        self._welcome: wire.Welcome | None = None
        self._seq = 0
        self._version = self._have = -1
        now_s = time.monotonic()
        self._heard_s = self._hello_s = now_s
        self._pinged_s = now_s - PING_S * random.random()
        self._asked_s = 0.0
        self._say_hello()

    async def listen(self) -> None:
        """Answer the learner, for ever."""
        while True:
            parts = await self._socket.recv_multipart()
            self._heard_s = time.monotonic()
            self._on_message(wire.read_from_learner(parts[0]))

    def tick(self, now_s: float) -> None:
        """What is due."""
        if now_s - self._heard_s > SILENCE_S:
            self.silences += 1
            self._heard_s = now_s
            self._say_hello()
        if self._welcome is None:
            if now_s - self._hello_s > SILENCE_S / 2:
                self._say_hello()
        elif now_s - self._pinged_s >= PING_S:
            self._pinged_s = now_s
            round_trip_s = self.round_trips_s[-1] if self.round_trips_s else 0.0
            self._send(wire.Ping(now_s, round_trip_s, 0))
            self._ask_for_weights()

    def leave(self, politely: bool) -> None:
        """Say so, or vanish."""
        if politely:
            self._send(wire.Bye())
        self._socket.close(linger=2000 if politely else 0)
        now_s = time.monotonic()
        tell(
            left=self.name,
            politely=politely,
            at_s=now_s,
            present_s=now_s - self.began_s if self.began_s else 0.0,
            accepted=self.accepted,
            silences=self.silences,
            unknown=self.unknown,
            round_trip_ms=MS * max(self.round_trips_s, default=0.0),
        )

    def _on_message(self, header: wire.FromLearner) -> None:
        match header:
            case wire.Welcome():
                self._on_welcome(header)
            case wire.Unknown():
                self.unknown += 1
                self._welcome = None
                self._say_hello()
            case wire.Pong():
                self.round_trips_s.append(time.monotonic() - header.sent_s)
                self._on_accepted(header.accepted, header.version)
            case wire.Accepted():
                self._on_accepted(header.accepted, header.version)
            case wire.WeightsSent():
                self.began_s = self.began_s or time.monotonic()
                self._have, self._asked_s = header.version, 0.0
                self._fill()
            case wire.Refused():
                tell(warning=f"{self.name} is refused: {header.reason}")

    def _on_welcome(self, welcome: wire.Welcome) -> None:
        self._welcome, self._version = welcome, welcome.version
        self._crew.agree(welcome)
        self._seq = self.accepted = welcome.received
        self._ask_for_weights()

    def _on_accepted(self, accepted: int, version: int) -> None:
        self.accepted, self._version = max(self.accepted, accepted), version
        self._ask_for_weights()
        self._fill()

    def _ask_for_weights(self) -> None:
        now_s = time.monotonic()
        if self._have < self._version and now_s - self._asked_s > 2 * PING_S:
            self._asked_s = now_s
            self._send(wire.WantWeights(self._have))

    def _fill(self) -> None:
        """Send what there are credits for."""
        welcome, agreed = self._welcome, self._crew.agreed
        if welcome is None or agreed is None or not self.began_s:
            return
        while self._seq - self.accepted < welcome.credits:
            self._seq += 1
            slot = welcome.groups[self._seq % len(welcome.groups)].slot
            header = wire.UnrollSent(
                self._incarnation, self._seq, slot, agreed.compression, 0, [], []
            )
            self._send(header, *agreed.parts)

    def _say_hello(self) -> None:
        self._hello_s = time.monotonic()
        # Its groups begin anew: what it had sent before is not gone on with.
        hello = wire.Hello(wire.PROTOCOL, self._incarnation, self.name, "host", GROUPS, GROUPS, 1)
        self._send(hello)

    def _send(self, header: wire.FromHost, *parts: bytes) -> None:
        self._socket.send_multipart([wire.encode_header(header), *parts])


class Crew:
    """The hosts of one process, and who of them leaves next."""

    def __init__(self, flags: Flags) -> None:
        self.agreed: _Agreed | None = None
        self._flags = flags
        self._keys = None
        if flags.keys:
            folder = Path(flags.keys)
            own = load_secret(folder / "host.key_secret")
            self._keys = (own, load_public(folder / "learner.key"))
        self._context = zmq.asyncio.Context()
        self._context.set(zmq.MAX_SOCKETS, 2 * flags.hosts + 1000)
        self._next = flags.first
        self._random = random.Random(flags.first)
        self._hosts: dict[LightHost, asyncio.Task[None]] = {}

    def connect(self) -> zmq.asyncio.Socket:
        """A socket of one host, as a real one's."""
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2_000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6_000)
        socket.rcvhwm, socket.sndhwm = 256, 64
        if self._keys is not None:
            own, learner = self._keys
            own.connect(socket, learner)
        socket.connect(self._flags.endpoint)
        return socket

    def agree(self, welcome: wire.Welcome) -> None:
        """Make the one unroll that all send."""
        if self.agreed is None:
            config = Config.from_json(welcome.config, "the learner's configuration")
            spec = spec_from_json(json.loads(welcome.spec))
            unroll = map_nest(np.zeros_like, empty_unroll(config.unroll_length, 1, spec, ()))
            unroll.valid.fill(True)
            format_ = UnrollFormat(spec, config.unroll_length, 1, ())
            parts = [bytes(part) for part in format_.encode(unroll, config.compression)]
            self.agreed = _Agreed(parts, config.compression)

    async def work(self) -> None:
        """Until told to end."""
        async with asyncio.TaskGroup() as tasks:
            churning = tasks.create_task(self._churn(tasks))
            ticking = tasks.create_task(self._tick())
            await told_to_end()
            await cancel(churning, ticking)
            for host in [*self._hosts]:
                await self._leave(host, politely=True)
        self._context.destroy(linger=2000)

    async def _churn(self, tasks: asyncio.TaskGroup) -> None:
        for _ in range(self._flags.hosts):
            self._join(tasks)
            await asyncio.sleep(1 / self._flags.joins_per_s)
        while self._flags.join_leave_per_s:
            await asyncio.sleep(1 / self._flags.join_leave_per_s)
            host = self._random.choice([*self._hosts])
            await self._leave(host, politely=self._random.random() < 0.5)
            self._join(tasks)

    def _join(self, tasks: asyncio.TaskGroup) -> None:
        host = LightHost(self, f"host-{self._next}")
        self._next += self._flags.every
        self._hosts[host] = tasks.create_task(host.listen())

    async def _leave(self, host: LightHost, politely: bool) -> None:
        await cancel(self._hosts.pop(host))
        host.leave(politely)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now_s = time.monotonic()
            for host in self._hosts:
                host.tick(now_s)


def main(role: str, given: str) -> None:
    """Do what ``role`` says."""
    flags = Flags(**json.loads(given))
    raise_limits()
    if role == "learner":
        keep_freed_memory()
    uvloop.run(learn(flags) if role == "learner" else Crew(flags).work())


if __name__ == "__main__":
    main(*sys.argv[1:])
