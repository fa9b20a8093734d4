"""Actor hosts that join, stall, are cut off, come back and leave in any order: each unroll once.

The hosts are models of ``conversation`` and ``host_duties``, the network keeps the order of each
connection and nothing else: what was sent before a connection broke may arrive long after.  The
bridge, its members and its intake are the real ones; unrolls are decoded when the program says so.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import zmq
from hypothesis import example, given, settings

from asyncagent import wire
from asyncagent.config import Config
from asyncagent.formats import UnrollFormat
from asyncagent.remote import Learning, Listener, RemoteBridge, Weights
from asyncagent.structs import Unroll, map_nest
from asyncagent.unroll import UnrollQueue, empty_unroll
from asyncagent.wire import Accepted, Bye, Group, Hello, Ping, Pong, Unknown, UnrollSent, Welcome
from tests.programs import Program, programs, statements_of
from tests.remote_fakes import CONFIG, SPEC
from tests.virtual_clock import run_virtual, turns

T, E, GROUPS = CONFIG.unroll_length, 2, 2
FRAMES = 7
"""That each unroll says it acted."""
MOST_HOSTS = 3
BATCH = 3
FORMAT = UnrollFormat(SPEC, T, E, ())


class Network:
    """In the place of the bridge's socket: a queue per connection and direction."""

    def __init__(self) -> None:
        self.up: dict[bytes, deque[list[bytes]]] = {}
        self.down: dict[bytes, deque[Any]] = {}
        self.arrived: asyncio.Queue[list[bytes]] = asyncio.Queue()

    def connect(self) -> bytes:
        """Another connection."""
        routing = b"%d" % len(self.up)
        self.up[routing], self.down[routing] = deque(), deque()
        return routing

    def send(self, routing: bytes, header: wire.FromHost, *parts: Any) -> None:
        self.up[routing].append([routing, wire.encode_header(header), *map(bytes, parts)])

    def deliver(self, routing: bytes) -> None:
        """The oldest message of a connection reaches the bridge, if there is one."""
        if self.up[routing]:
            self.arrived.put_nowait(self.up[routing].popleft())

    async def recv_multipart(self, copy: bool) -> list[zmq.Frame]:
        return [zmq.Frame(part) for part in await self.arrived.get()]

    def send_multipart(self, frames: list[Any], copy: bool) -> None:
        self.down[frames[0]].append(wire.read_from_learner(frames[1]))


class Decoder:
    """In the place of the bridge's thread; a call that nobody waits for any more happens, too."""

    def __init__(self) -> None:
        self.calls: deque[Callable[[], None]] = deque()

    def run(self, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()

        def call() -> None:
            result = function(*args)
            if not future.done():
                future.set_result(result)

        self.calls.append(call)
        return future

    def close(self) -> None:
        pass


class Host:
    """What an honest host does."""

    def __init__(self, network: Network, number: int) -> None:
        self.network = network
        self.incarnation = bytes([number]) * 16
        self.name = f"host{number}"
        self.groups: list[Group] = []
        self.seq = 0
        self.kept: dict[int, tuple[int, int]] = {}
        """By seq: slot and mark of what has not been acknowledged."""
        self.acknowledged: list[int] = []
        self.given_up: set[int] = set()
        """Marks of what was kept when there were other groups to run."""
        self.connect()

    def connect(self) -> None:
        """As after a silence: another connection, and a Hello on it."""
        self.routing = self.network.connect()
        self.say_hello()

    def say_hello(self) -> None:
        self.welcomed = False
        hello = Hello(wire.PROTOCOL, self.incarnation, self.name, "host", E * GROUPS, GROUPS, 1)
        self.network.send(self.routing, hello)

    def act(self, mark: int, slot_index: int) -> bool:
        """Another unroll, if there is a credit for it."""
        if not self.welcomed or len(self.kept) >= len(self.groups):
            return False
        self.seq += 1
        self.kept[self.seq] = self.groups[slot_index % len(self.groups)].slot, mark
        self.send(self.seq)
        return True

    def send(self, seq: int) -> None:
        slot, mark = self.kept[seq]
        header = UnrollSent(self.incarnation, seq, slot, "none", FRAMES, [], [])
        self.network.send(self.routing, header, *parts_of(mark))

    def hear(self) -> None:
        """The oldest message that is here for it, if there is one."""
        if not self.network.down[self.routing]:
            return
        header = self.network.down[self.routing].popleft()
        match header:
            case Welcome():
                self.welcomed = True
                self.on_welcome(header)
            case Unknown():
                if self.welcomed:
                    self.say_hello()
            case Accepted() | Pong() if self.welcomed:
                for seq in [seq for seq in self.kept if seq <= header.accepted]:
                    self.acknowledged.append(self.kept.pop(seq)[1])

    def on_welcome(self, welcome: Welcome) -> None:
        if welcome.groups != self.groups:
            self.given_up |= {mark for _, mark in self.kept.values()}
            self.groups, self.seq, self.kept = welcome.groups, welcome.received, {}
        for seq in self.kept:
            if seq > welcome.received:
                self.send(seq)


def parts_of(mark: int) -> list[Any]:
    """Of an unroll that carries a mark."""
    unroll = empty_unroll(T, E, SPEC, ())
    map_nest(lambda leaf: leaf.fill(0), unroll)
    unroll.reward.fill(mark)
    return FORMAT.encode(unroll)


class Play:
    """Plays a program on a bridge and its hosts, and is the oracle."""

    def __init__(self, config: Config) -> None:
        self.network, self.decoder = Network(), Decoder()
        self.queue = UnrollQueue(BATCH + 1, BATCH)
        self.hosts: list[Host] = []
        self.gone: list[Host] = []
        self.num_marks = 0
        self.arrived: list[int] = []
        """Marks, as the queue took them."""
        self.learned = 0
        """How many of them the learner has."""
        self.told: list[int] = []
        self.owners: dict[int, bytes] = {}
        """Of environments, by their first index: an incarnation."""
        learning = Learning(
            initial_state=lambda rows: (),
            version=lambda: 0,
            num_weights=1,
            encode_weights=lambda: Weights(0, b""),
            put=self.put,
            act=lambda name, level_name, group: asyncio.sleep(0),
            tell=lambda episodes, losses, frames: self.told.append(frames),
        )
        listener = Listener(config.listen, None, None)
        clock = asyncio.get_running_loop().time
        self.bridge = RemoteBridge(config, SPEC, listener, learning, 1, clock)
        self.bridge._socket.close()
        self.bridge._thread.close()
        self.bridge._socket = self.network  # type: ignore[assignment]
        self.bridge._thread = self.bridge._intake._thread = self.decoder  # type: ignore[assignment]

    async def put(
        self, level_name: str, unroll: Unroll, give_back: Callable[[Unroll], None]
    ) -> None:
        mark = int(unroll.reward[0, 0])
        await self.queue.put(unroll, give_back)
        self.arrived.append(mark)

    def check(self) -> None:
        """What holds at any time."""
        present = self.bridge._members.present.values()
        slots = [slot for member in present for slot in member.slots]
        assert len(slots) == len(set(slots)), "no two hosts run the same group"
        for member in present:
            assert member.accepted <= member.received
            assert len(member.inbox) <= len(member.groups)
        for host in self.hosts:
            for group in host.groups:
                owner = self.owners.setdefault(group.first_env_index, host.incarnation)
                assert owner == host.incarnation, "nor, ever, the same environments"
        assert len(self.arrived) == len(set(self.arrived)), "nothing is counted twice"
        assert self.told == [FRAMES] * len(self.arrived)
        for host in self.hosts + self.gone:
            assert set(host.acknowledged) <= set(self.arrived), "what is acknowledged is here"
        assert self.bridge.rejected == 0, "nobody did anything wrong"

    # The program.

    async def play(self, name: str, number: int) -> None:
        """One statement."""
        host = self.hosts[number % len(self.hosts)] if self.hosts else None
        await getattr(self, f"do_{name}")(number, host)
        self.check()

    async def do_start(self, number: int, host: Host | None) -> None:
        if len(self.hosts) < MOST_HOSTS:
            self.hosts.append(Host(self.network, len(self.hosts) + len(self.gone)))

    async def do_act(self, number: int, host: Host | None) -> None:
        if host and host.act(self.num_marks + 1, number):
            self.num_marks += 1

    async def do_deliver(self, number: int, host: Host | None) -> None:
        """Of any connection, the broken ones too."""
        full = [routing for routing, sent in self.network.up.items() if sent]
        if full:
            self.network.deliver(full[number % len(full)])
            await turns(4)

    async def do_talk(self, number: int, host: Host | None) -> None:
        """Of one host's connection, both ways."""
        if host:
            for _ in range(3):
                self.network.deliver(host.routing)
                await turns(4)
                host.hear()

    async def do_hear(self, number: int, host: Host | None) -> None:
        if host:
            host.hear()

    async def do_reconnect(self, number: int, host: Host | None) -> None:
        if host:
            host.connect()

    async def do_cut(self, number: int, host: Host | None) -> None:
        """The connection breaks and is there again, which the host does not notice."""
        if host:
            host.routing = self.network.connect()

    async def do_lose(self, number: int, host: Host | None) -> None:
        """What was on its way when a connection broke is lost."""
        for routing, sent in self.network.up.items():
            if all(routing != host.routing for host in self.hosts) and number % 2:
                sent.clear()

    async def do_hello(self, number: int, host: Host | None) -> None:
        """Said again every few seconds until there is an answer."""
        if host and not host.welcomed:
            host.say_hello()

    async def do_ping(self, number: int, host: Host | None) -> None:
        if host and host.welcomed:
            self.network.send(host.routing, Ping(0.0, 0.0, 0))

    async def do_decode(self, number: int, host: Host | None) -> None:
        if self.decoder.calls:
            self.decoder.calls.popleft()()
            await turns(number % 4)

    async def do_learn(self, number: int, host: Host | None) -> None:
        """The learner takes a batch of columns, which are what arrived, in order."""
        if len(self.queue) < BATCH:
            return
        parts = await self.queue.get()
        for part in parts:
            for column in range(part.start, part.stop):
                expected = self.arrived[self.learned // E]
                assert (part.unroll.reward[:, column] == expected).all()
                self.learned += 1
        self.queue.release(parts)
        await turns(4)

    async def do_wait(self, number: int, host: Host | None) -> None:
        """Seconds pass; all hosts but one say that they are there, that one perhaps."""
        for other in self.hosts:
            if other is not host or number % 3:
                self.network.send(other.routing, Ping(0.0, 0.0, 0))
                self.network.deliver(other.routing)
        await asyncio.sleep(1 + number % 9)

    async def do_leave(self, number: int, host: Host | None) -> None:
        if host:
            self.network.send(host.routing, Bye())
            self.hosts.remove(host)
            self.gone.append(host)

    def is_quiet(self) -> bool:
        """Nothing is on its way."""
        sent = [*self.network.up.values(), *(self.network.down[one.routing] for one in self.hosts)]
        return not (any(sent) or self.decoder.calls or len(self.queue) >= BATCH)

    async def finish(self) -> None:
        """The network heals; whoever is there soon has all its unrolls acknowledged."""
        for _ in range(4):
            for host in self.hosts:
                if not host.welcomed:
                    host.connect()
                elif host.kept:
                    await self.play("ping", self.hosts.index(host))
            for _ in range(1000):
                if self.is_quiet():
                    break
                for routing in self.network.up:
                    self.network.deliver(routing)
                await turns(4)
                for host in self.hosts:
                    host.hear()
                await self.play("decode", 0)
                await self.play("learn", 0)
            assert self.is_quiet()
        for host in self.hosts:
            assert host.welcomed and not host.kept
            marks = [mark for mark in self.arrived if mark in host.acknowledged]
            assert marks == host.acknowledged, "in order"
        left = {mark for host in self.gone for _, mark in host.kept.values()}
        left |= {mark for host in self.hosts + self.gone for mark in host.given_up}
        assert set(range(1, self.num_marks + 1)) == set(self.arrived) | left


OFTEN = (
    *("act", "act", "act", "act", "talk", "talk", "talk", "talk", "decode", "decode"),
    *("deliver", "deliver", "learn", "wait", "wait", "reconnect"),
)
BEGINNING = [(name, number) for number in range(MOST_HOSTS) for name in ("start", "talk")]
PROGRAMS = programs([*statements_of(Play), *OFTEN])


CROSSING: Program = [
    *[("act", 1), ("act", 1), ("deliver", 0), ("cut", 1), ("reconnect", 1), ("hello", 1)],
    *[("wait", 4), ("wait", 39), ("talk", 1)],
]
"""A welcome is on its way while its host is lost, with an unroll that was not yet counted."""


def any_program(examples: int) -> None:
    """So many of them."""

    @settings(max_examples=examples, deadline=None)
    @given(PROGRAMS)
    @example(CROSSING)
    def check(program: Program) -> None:
        async def main() -> None:
            play = Play(CONFIG)
            serving = asyncio.create_task(play.bridge.serve())
            try:
                for name, number in [*BEGINNING, *program]:
                    await play.play(name, number)
                await play.finish()
                assert not serving.done()
            finally:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
                play.bridge.close()

        run_virtual(main())

    check()


def test_any_program() -> None:
    """Slots never overlap, no unroll is lost or counted twice, and whoever stays goes on."""
    any_program(100)


@pytest.mark.slow
def test_many_programs() -> None:
    """The same for thousands."""
    any_program(3_000)
