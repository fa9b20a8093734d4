"""Whatever is sent to the learner's bridge, it goes on, says little, and loses no good unroll."""

from __future__ import annotations

import asyncio
import logging
import random
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncagent import wire
from asyncagent.config import Config
from asyncagent.envs.base import EnvGroup
from asyncagent.errors import WireError
from asyncagent.formats import RowFormat, UnrollFormat
from asyncagent.members import MAX_HOSTS
from asyncagent.remote import (
    MAX_COMPLAINTS,
    MAX_REFUSALS,
    Learning,
    RemoteBridge,
    Weights,
    make_listener,
)
from asyncagent.structs import EnvStep, Unroll
from asyncagent.wire import (
    Accepted,
    Act,
    Bye,
    Hello,
    Ping,
    Pong,
    RowSent,
    UnrollSent,
    WantWeights,
    Welcome,
)
from tests.wire_samples import SPECS, rows_of, same, state_of, unroll_of

Message = list[bytes]
"""Routing, header and parts."""
SPEC = SPECS["mixed"]
T, E, VERSION = 3, 2, 5
GOOD, ROWS = b"good", b"rows"
STRANGERS = [b"peer%d" % i for i in range(20)]
INCARNATIONS = [bytes([i]) * 16 for i in range(34)]


class Socket:
    """In the place of the bridge's: messages go in by hand, and who is answered what is kept."""

    def __init__(self) -> None:
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: dict[bytes, deque[Any]] = {}
        self.changed = asyncio.Event()
        self.serving: asyncio.Task[None] | None = None

    async def recv_multipart(self, copy: bool) -> list[zmq.Frame]:
        return [zmq.Frame(part) for part in await self.incoming.get()]

    def send_multipart(self, frames: list[Any], copy: bool) -> None:
        routing, header, *_ = frames
        kept = self.sent.setdefault(routing, deque(maxlen=50))
        kept.append(wire.read_from_learner(header))
        self.changed.set()

    async def answer(self, routing: bytes, fits: Callable[[Any], bool]) -> Any:
        """Wait for such an answer to that peer."""
        await self.until(lambda: any(map(fits, self.sent.get(routing, ()))))
        return next(filter(fits, self.sent[routing]))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until that is so; whoever it depends on sends something then."""
        async with asyncio.timeout(120):
            while not holds():
                if self.serving is not None and self.serving.done():
                    self.serving.result()  # raises what ended it
                self.changed.clear()
                await self.changed.wait()


class Run:
    """A bridge that serves a good host of each kind, whose every unroll and row is looked at."""

    def __init__(self) -> None:
        config = Config(
            level_name="catch", listen="tcp://127.0.0.1:*", num_actors=0, num_groups=0,
            unroll_length=T,
        )  # fmt: skip
        learning = Learning(
            initial_state=lambda n: state_of(n, True),
            version=lambda: VERSION,
            num_weights=3,
            encode_weights=lambda: Weights(VERSION, b"weights"),
            put=self._put,
            act=self._act,
            tell=lambda episodes, losses, frames: None,
        )
        self.now_s = 0.0
        self.bridge = RemoteBridge(
            config, SPEC, make_listener(config), learning, 1, lambda: self.now_s
        )
        self.socket = Socket()
        self.bridge._socket = self.socket  # type: ignore[assignment]
        self.arrived: list[int] = []
        """Marks of the good unrolls that the queue took."""
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_rows = 0
        rng = np.random.default_rng(0)
        self.format = UnrollFormat(SPEC, T, E, state_of(E, True))
        self.unrolls = [unroll_of(SPEC, T, E, state_of(E, True), rng, VERSION) for _ in range(4)]
        self.row_format = RowFormat(SPEC, E)
        self.rows = rows_of(SPEC, 50, E, rng)
        self._row: Message = []
        self._pings = 0

    async def __aenter__(self) -> Run:
        self.serving = self.socket.serving = asyncio.create_task(self.bridge.serve())
        self.serving.add_done_callback(lambda _: self.socket.changed.set())
        self.slots = {}
        for name, inference in ((GOOD, "host"), (ROWS, "learner")):
            self.give(name, self.hello(name, inference))
            welcome = await self.socket.answer(name, lambda header: isinstance(header, Welcome))
            self.slots[name] = welcome.groups[0].slot
        return self

    async def __aexit__(self, *_: object) -> None:
        assert not self.serving.done(), self.serving.exception()
        self.serving.cancel()
        await asyncio.gather(self.serving, return_exceptions=True)
        self.bridge.close()

    def hello(self, name: bytes, inference: Any) -> Hello:
        own = {GOOD: b"g" * 16, ROWS: b"r" * 16}[name]
        actors = 2 * E if name == GOOD else E
        return Hello(wire.PROTOCOL, own, name.decode(), inference, actors, actors // E, 1)

    def give(self, routing: bytes, header: wire.FromHost, *parts: Any) -> Message:
        message = [routing, wire.encode_header(header), *map(bytes, parts)]
        self.socket.incoming.put_nowait(message)
        return message

    # The good hosts.

    def unroll(self, mark: int) -> Unroll:
        unroll = self.unrolls[mark % len(self.unrolls)]
        unroll.reward[:] = mark
        return unroll

    def unroll_message(self, mark: int, ahead: int = 0) -> Message:
        seq = self.bridge.progress()["good"] + 1 + ahead
        header = UnrollSent(b"g" * 16, seq, self.slots[GOOD], "none", E * T, [], [])
        parts = self.format.encode(self.unroll(mark))
        return [GOOD, wire.encode_header(header), *(bytes(part) for part in parts)]

    async def send_good_unroll(self, mark: int) -> None:
        message = self.unroll_message(mark)
        header = wire.read_from_host(message[1])
        assert isinstance(header, UnrollSent)
        for _ in range(2):  # the second as if the answer had been lost
            self.socket.incoming.put_nowait(message)
        await self.socket.answer(
            GOOD, lambda sent: isinstance(sent, Accepted) and sent.accepted >= header.seq
        )

    def row_message(self, number: int) -> Message:
        row = self.rows[number % len(self.rows)]
        if number == 0:
            self._before = None
        header = RowSent(self.slots[ROWS], number, "none", [], [])
        parts = self.row_format.encode(row, self._before, "none")
        return [ROWS, wire.encode_header(header), *(bytes(part) for part in parts)]

    async def send_good_row(self) -> None:
        number = self.num_rows
        message = self.row_message(number)
        for _ in range(2):
            self.socket.incoming.put_nowait(message)
        await self.socket.answer(ROWS, lambda sent: isinstance(sent, Act) and sent.number == number)
        self._before = self.rows[number % len(self.rows)].observation

    async def settle(self, whole: bool = True) -> None:
        """All that was given has been looked at, and (``whole``) accepted or refused for good."""
        self._pings += 1
        for name in (ROWS, GOOD):
            self.give(name, Ping(float(self._pings), 0.001, 0))
            await self.socket.answer(
                name, lambda sent: isinstance(sent, Pong) and sent.sent_s == self._pings
            )
        if whole:
            present = self.bridge._members.present
            await self.socket.until(
                lambda: all(member.accepted == member.received for member in present.values())
            )

    # The run.

    async def _put(self, level_name: str, unroll: Unroll, give_back: Any) -> None:
        await self.gate.wait()
        mark = float(unroll.reward[0, 0])
        if mark >= 1 and (unroll.reward == mark).all():
            assert mark == int(mark)
            self.arrived.append(int(mark))
            assert same(unroll, self.unroll(int(mark)))
        give_back(unroll)

    async def _act(self, name: str, level_name: str, group: EnvGroup) -> None:
        row = await group.reset()
        while True:
            if name.startswith("rows/"):
                self._look_at(row)
            row = await group.step(np.zeros((group.num_envs, 3), np.int64))

    def _look_at(self, row: EnvStep) -> None:
        assert same(row, self.rows[self.num_rows % len(self.rows)])
        self.num_rows += 1

    def may_be_sent(self, message: Message) -> bool:
        """Not what a peer without keys could rightfully ask for in a good host's name."""
        if len(message) < 2 or len(message) > wire.MAX_PARTS:
            return True
        routing = message[0]
        try:
            header = wire.read_from_host(message[1])
        except WireError:
            return True
        if isinstance(header, Hello):
            ours = routing in (GOOD, ROWS) or header.incarnation in (b"g" * 16, b"r" * 16)
            return not ours or header.protocol != wire.PROTOCOL
        if isinstance(header, Bye):
            return routing not in (GOOD, ROWS)
        if isinstance(header, RowSent) and routing == ROWS:
            expected = len(self.row_message(self.num_rows))
            return header.number != self.num_rows or len(message) != expected
        return True

    def held(self) -> Counter[str]:
        """What the bridge keeps of its peers."""
        members = self.bridge._members
        present = members.present.values()
        for member in present:
            assert len(member.inbox) <= len(member.groups)
            assert len(member.tasks) <= max(1, len(member.groups))
        assert members.by_routing.keys() <= {member.routing for member in present}
        return Counter(present=len(present), departed=len(members._departed))


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """Lines of the whole package."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("asyncagent"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def check_lines(lines: list[str]) -> None:
    """Few about each peer's mistakes, and each of them one printable line."""
    assert all(line.isprintable() and len(line) < 400 for line in lines)
    ignored = Counter(line.split(" is ignored")[0] for line in lines if " is ignored" in line)
    joins = Counter(line.split()[2] for line in lines if " joins: " in line or " is back: " in line)
    for who, count in ignored.items():
        name = who.split()[-1]
        times = 1 if name == "message" else joins[name]
        assert count <= MAX_COMPLAINTS * times, who
    assert sum("is refused" in line for line in lines) <= MAX_REFUSALS


# Malformed messages.

NASTY: list[Any] = [
    None, True, -1, 0, 1, 2, 3, 255, 257, 2**31, 2**53, 2**63, 2**64 - 1, -(2**63), 0.5,
    float("nan"), float("inf"), -1e300, "", "x", "lz4", "zstd", "host", "learner", "\x1b[2J\n",
    "x" * 600, b"", b"g" * 16, b"r" * 16, INCARNATIONS[0], b"\xff" * 17, [], [[]], [1] * 5000, {},
    {"a": 1}, [["catch", 1.0, 1, 0, False]], [["x", float("nan"), 1, 0, False]],
    [["a", 1, 0, "\n"]],
]  # fmt: skip


class Mutations:
    """Messages that are nearly real ones."""

    def __init__(self, run: Run, seed: int) -> None:
        self.run = run
        self.random = random.Random(seed)
        self.past: deque[Message] = deque(maxlen=20)
        self.parts = run.unroll_message(-1)[2:]

    def real(self) -> Message:
        """From one of the hosts, or of those that would like to be one."""
        run, choice = self.run, self.random
        who = choice.choice([GOOD, GOOD, ROWS, *STRANGERS])
        slot = run.slots.get(who, choice.randrange(40))
        own = {GOOD: b"g" * 16, ROWS: b"r" * 16}.get(who) or choice.choice(INCARNATIONS)
        kind = choice.randrange(8)
        if kind == 0:
            where: wire.Inference = "host" if choice.random() < 0.5 else "learner"
            hello = Hello(wire.PROTOCOL, own, who.decode(), where, 4, 2, 1)
            return [who, wire.encode_header(hello)]
        if kind == 1:
            return [who, wire.encode_header(Ping(1.0, 0.1, 0))]
        if kind == 2:
            return [who, wire.encode_header(WantWeights(-1))]
        if kind == 3:
            return [who, wire.encode_header(Bye())]
        if kind == 4:
            return [who, *run.row_message(run.num_rows)[1:]]
        received = run.bridge.progress()["good"]
        seq = received + 1 if who == GOOD else choice.randrange(1, 4)
        header = UnrollSent(own, seq, slot, "none", 1, [], [])
        return [who, wire.encode_header(header), *self.parts]

    def malformed(self) -> Message:
        message = self.real()
        for _ in range(self.random.randrange(1, 3)):
            message = self.mutate(message)
        self.past.append(message)
        return message

    def mutate(self, message: Message) -> Message:
        choice = self.random
        changed = list(message)
        place = choice.randrange(1, len(changed)) if len(changed) > 1 else 0
        kind = choice.randrange(10)
        if not place or kind == 0:
            return choice.choice(self.past) if self.past else changed  # again
        if kind == 1:
            del changed[place]
        elif kind == 2:
            changed[place:place] = [choice.randbytes(choice.randrange(9))] * choice.choice(
                [1, 2, 99]
            )
        elif kind == 3:
            changed[place] = changed[place][: choice.randrange(len(changed[place]) + 1)]
        elif kind == 4:
            changed[place] += choice.randbytes(choice.choice([1, 8, 70_000]))
        elif kind == 5:
            other = choice.randrange(1, len(changed))
            changed[place], changed[other] = changed[other], changed[place]
        elif kind == 6:
            frame = bytearray(changed[place])
            for _ in range(choice.randrange(1, 4) if frame else 0):
                frame[choice.randrange(len(frame))] = choice.randrange(256)
            changed[place] = bytes(frame)
        elif kind == 7:
            huge = choice.choice(
                [b"\xdd\xff\xff\xff\xff", b"\x9f", b"\xc6\xff\xff\xff\xff", b"\xdf"]
            )
            cut = choice.randrange(len(changed[1]) + 1)
            changed[1] = changed[1][:cut] + huge + changed[1][cut + 1 :]
        else:
            self.change_field(changed)
        return changed

    def change_field(self, message: Message) -> None:
        """Another value in the header: other versions, sequences, slots, hosts."""
        try:
            fields = msgspec.msgpack.decode(message[1])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return
        if isinstance(fields, list) and fields:
            place = self.random.randrange(len(fields))
            if isinstance(fields[place], int) and self.random.random() < 0.5:
                value = fields[place] + self.random.choice([-2, -1, 1, 2, 100])
                fields[place] = max(-(2**63), min(value, 2**63))
            else:
                fields[place] = self.random.choice(NASTY)
            message[1] = msgspec.msgpack.encode(fields)


async def survive(run: Run, messages: Callable[[], Message], count: int, batch: int) -> int:
    """Feed ``count`` malformed messages, good ones in between; how many there were."""
    fed = 0
    while fed < count:
        for _ in range(batch):
            message = messages()
            if run.may_be_sent(message):
                run.socket.incoming.put_nowait(message)
                fed += 1
        await run.settle()
        await run.send_good_unroll(len(run.arrived) + 1)
        await run.send_good_row()
        run.now_s += 3.0
        run.bridge.look_round()
        held = run.held()
        assert held["present"] <= MAX_HOSTS and held["departed"] <= MAX_HOSTS
        assert not run.serving.done()
    return fed


def mutated(count: int, seed: int) -> None:
    async def main() -> None:
        async with Run() as run:
            mutations = Mutations(run, seed)
            await survive(run, mutations.malformed, count // 2, 20)
            if count > 10_000:
                tracemalloc.start()
                held_bytes = tracemalloc.get_traced_memory()[0]
            await survive(run, mutations.malformed, count - count // 2, 20)
            if count > 10_000:
                run.socket.sent.clear()
                assert tracemalloc.get_traced_memory()[0] - held_bytes < 8_000_000
                tracemalloc.stop()
            assert run.arrived == list(range(1, len(run.arrived) + 1))
            assert len(run.arrived) == run.num_rows >= count // 20
            assert run.bridge.rejected > count // 4

    with log_lines() as lines:
        asyncio.run(main())
    check_lines(lines)


def test_messages_that_are_nearly_real() -> None:
    """Thousands of them: the bridge serves on, and every good unroll and row arrives once."""
    mutated(3_000, 1)


@pytest.mark.slow
def test_many_messages_that_are_nearly_real() -> None:
    """The same with 90,000; nothing of them is kept, either."""
    mutated(90_000, 2)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8)
    | st.binary(max_size=17) | st.sampled_from(NASTY),
    lambda values: st.lists(values, max_size=4),
    max_leaves=6,
)  # fmt: skip
NAMES = st.sampled_from(
    ["Hello", "Ping", "WantWeights", "UnrollSent", "RowSent", "Bye", "Welcome", "Act", ""]
)
HEADERS = st.binary(max_size=40) | st.builds(
    lambda name, values: msgspec.msgpack.encode([name, *values]),
    NAMES,
    st.lists(VALUES, max_size=10),
)
MESSAGES = st.builds(
    lambda who, header, parts: [who, *header, *parts],
    st.sampled_from([GOOD, ROWS, *STRANGERS[:3]]),
    st.lists(HEADERS, max_size=1),
    st.lists(st.binary(max_size=40), max_size=3),
)


def invented(examples: int) -> None:
    """Feed what hypothesis thinks of, ten messages at a time."""
    runner = asyncio.Runner()
    runs: list[Run] = []
    fed = 0

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(MESSAGES, min_size=10, max_size=10))
    def feed(messages: list[Message]) -> None:
        nonlocal fed
        todo = iter(messages)
        sent = [message for message in todo if runs[0].may_be_sent(message)]
        ready = iter(sent)
        if sent:
            fed += runner.run(survive(runs[0], lambda: next(ready), len(sent), len(sent)))

    with log_lines() as lines, runner:

        async def begin() -> Run:
            return await Run().__aenter__()

        runs.append(runner.run(begin()))
        feed()
        run = runs[0]
        assert run.arrived == list(range(1, len(run.arrived) + 1))
        assert fed > 9 * examples
        runner.run(run.__aexit__())
    check_lines(lines)


def test_messages_that_were_made_up() -> None:
    """Headers and parts of any kind, of which hypothesis makes up a few hundred."""
    invented(40)


@pytest.mark.slow
def test_many_messages_that_were_made_up() -> None:
    """The same with 10,000."""
    invented(1_100)


def test_more_than_the_credits() -> None:
    """While the queue takes nothing, what exceeds a host's credits is refused, and comes later."""

    async def main() -> None:
        async with Run() as run:
            run.gate.clear()
            messages = [run.unroll_message(mark, mark - 1) for mark in (1, 2, 3)]
            for message in messages:
                run.socket.incoming.put_nowait(message)
            await run.settle(whole=False)
            assert run.bridge.progress()["good"] == 2  # as many as it has groups
            assert run.bridge.rejected == 1
            for message in messages:  # the first two are on their way, the third still too many
                run.socket.incoming.put_nowait(message)
            await run.settle(whole=False)
            assert run.arrived == [] and run.bridge.rejected == 2
            run.gate.set()
            await run.socket.answer(
                GOOD, lambda sent: isinstance(sent, Accepted) and sent.accepted == 2
            )
            run.socket.incoming.put_nowait(messages[2])
            await run.socket.answer(
                GOOD, lambda sent: isinstance(sent, Accepted) and sent.accepted == 3
            )
            assert run.arrived == [1, 2, 3]

    asyncio.run(main())


def test_what_is_said_of_one_mistake() -> None:
    """Each kind of malformed unroll is named in one line, three times per host at most."""
    cases: list[tuple[Callable[[Run], Message], str]] = [
        (lambda run: run.unroll_message(1, ahead=1), "unroll 2 follows 0"),
        (lambda run: run.unroll_message(1)[:1], "a message of 0 parts"),
        (lambda run: [*run.unroll_message(1), *[b""] * 99], "a message of "),
        (lambda run: [*run.unroll_message(1)[:-1]], " parts instead of "),
        (lambda run: [*run.unroll_message(1)[:-1], b""], "an array of 0 bytes instead of "),
        (lambda run: [GOOD, b"\0" * 70_000], "a header of 70000 bytes is longer than 65536"),
        (lambda run: [GOOD, wire.encode_header(wire.Unknown())], "no header: "),
        (lambda run: [GOOD, *run.row_message(0)[1:]], "a row of slot"),
        (lambda run: [ROWS, *run.unroll_message(1)[1:]], "an unroll of another incarnation"),
    ]  # fmt: skip

    async def main(make: Callable[[Run], Message], expected: str) -> None:
        with log_lines() as lines:
            async with Run() as run:
                for _ in range(5):
                    run.socket.incoming.put_nowait(make(run))
                    await run.settle()
                await run.send_good_unroll(1)
                assert run.arrived == [1] and run.bridge.rejected == 5
        told = [line for line in lines if " is ignored: " in line]
        assert len(told) == MAX_COMPLAINTS and all(expected in line for line in told), told

    for make, expected in cases:
        asyncio.run(main(make, expected))
