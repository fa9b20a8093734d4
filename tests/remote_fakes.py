"""A run for hosts to act for, without a learner; and a host that says what a test wants."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import numpy as np
import torch
import zmq
import zmq.asyncio

from asyncagent import wire
from asyncagent.actor import act
from asyncagent.config import Config
from asyncagent.envs.base import EnvGroup
from asyncagent.formats import UnrollFormat
from asyncagent.host import ActorHost, HostFlags
from asyncagent.keys import KeyPair
from asyncagent.models import make_net
from asyncagent.policy import Policy
from asyncagent.remote import Learning, Listener, RemoteBridge, Weights
from asyncagent.structs import ArraySpec, Discrete, EnvSpec, Episode, Loss, Unroll, map_nest
from asyncagent.unroll import empty_unroll
from asyncagent.weights import encode_weights, num_weights
from asyncagent.wire import FromHost, FromLearner, Hello, UnrollSent, Welcome
from tests.fakes import CounterGroup, CountingPolicy

WATCHDOG_S = 60
SPEC = EnvSpec(ArraySpec((1,), "float32"), Discrete(3), 1)
T = 5
APART = 100_000
"""Rows of one group's counter begin so far from those of the environment before."""

CONFIG = Config(
    level_name="catch",
    listen="tcp://127.0.0.1:*",
    num_actors=0,
    num_groups=0,
    net="mlp",
    unroll_length=T,
    inference_timeout_ms=5.0,
    max_policy_lag=20,
)


async def until(found: Callable[[], Any]) -> None:
    """Wait for what others do."""
    async with asyncio.timeout(WATCHDOG_S):
        while not found():
            await asyncio.sleep(0.005)


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Run:
    """What a learner's run is to the bridge: keeps the unrolls it is given."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.unrolls: list[Unroll] = []
        self.levels: list[str] = []
        self.told: list[int] = []
        """Acted frames, as they were told."""
        self.takes = asyncio.Event()
        """The queue has room."""
        self.takes.set()
        self.version = 0
        self.published = 0
        """Version of the weights there are."""
        self.num_weights, self._part = _weights()
        self._policy = CountingPolicy()

    def learning(self) -> Learning:
        return Learning(
            initial_state=lambda rows: (),
            version=lambda: self.version,
            num_weights=self.num_weights,
            encode_weights=self._encode,
            put=self._put,
            act=self._act,
            tell=self._tell,
        )

    def _encode(self) -> Weights:
        return Weights(self.published, self._part)

    async def _put(
        self, level_name: str, unroll: Unroll, give_back: Callable[[Unroll], None]
    ) -> None:
        await self.takes.wait()
        self.unrolls.append(cast(Unroll, map_nest(np.copy, unroll)))
        self.levels.append(level_name)
        give_back(unroll)

    async def _act(self, name: str, level_name: str, group: EnvGroup) -> None:
        async def put(unroll: Unroll, give_back: Callable[[Unroll], None]) -> None:
            await self._put(level_name, unroll, give_back)

        state = self._policy.initial_state(group.num_envs)
        await act(group, self._policy, put, self.config.unroll_length, state, lambda row: None)

    def _tell(self, episodes: Sequence[Episode], losses: Sequence[Loss], frames: int) -> None:
        self.told.append(frames)

    def counters(self) -> dict[int, list[int]]:
        """By group: the counters in the first rows of its unrolls, in the order of arrival."""
        found: dict[int, list[int]] = {}
        for unroll in self.unrolls:
            first = int(unroll.observation[0, 0, 0])
            found.setdefault(first // APART, []).append(first % APART)
        return found

    def is_whole(self) -> bool:
        """Whether no unroll of any group is missing, and none is there twice."""
        return all(
            starts == [T * index for index in range(len(starts))]
            for starts in self.counters().values()
        )


@functools.cache
def _weights() -> tuple[int, Any]:
    """Of the net of CONFIG: how many, and encoded."""
    net = make_net("mlp", SPEC, False, 1)
    cpu = torch.device("cpu")
    policy = Policy(net, SPEC.actions, cpu, torch.float32, 1, 1, random_actions=False)
    return num_weights(net), encode_weights(policy.snapshot(), "float32")


@asynccontextmanager
async def bridge_of(
    run: Run, clock: Callable[[], float] | None = None, listener: Listener | None = None
) -> AsyncIterator[RemoteBridge]:
    """A bridge that serves."""
    listener = listener or Listener(run.config.listen, None, None)
    extra = {} if clock is None else {"clock": clock}
    bridge = RemoteBridge(run.config, SPEC, listener, run.learning(), 7, **extra)
    serving = asyncio.create_task(bridge.serve())
    try:
        yield bridge
    finally:
        serving.cancel()
        results = await asyncio.gather(serving, return_exceptions=True)
        bridge.close()
        assert isinstance(results[0], asyncio.CancelledError), results


class Environments:
    """In place of ``asyncagent.host.make_group``: groups that count their rows."""

    def __init__(self) -> None:
        self.groups: list[CounterGroup] = []

    def __call__(
        self, config: Config, *, level_name: str, num_envs: int, first_env_index: int, seed: int
    ) -> CounterGroup:
        group = CounterGroup([[7, 4, 11]] * num_envs, level_name=level_name)
        group._row += APART * first_env_index
        self.groups.append(group)
        return group

    def steps(self) -> list[int]:
        """Of each group."""
        return [len(group.actions) for group in self.groups]


@asynccontextmanager
async def host_of(endpoint: str, **flags: Any) -> AsyncIterator[ActorHost]:
    """An actor host at work."""
    host = ActorHost(HostFlags(connect=endpoint, **flags))
    working = asyncio.create_task(host.run())
    try:
        yield host
        assert not working.done(), working
    finally:
        host.stop()
        async with asyncio.timeout(WATCHDOG_S):
            await working


class Peer:
    """Speaks for a host, word for word."""

    def __init__(
        self, endpoint: str, keys: tuple[KeyPair, bytes] | None = None, once: bool = False
    ) -> None:
        """``once``: try to connect once only."""
        self._endpoint = endpoint
        self._once = once
        self._keys = keys
        self._context = zmq.asyncio.Context()
        self.incarnation = np.random.default_rng().bytes(16)
        self.connect()

    def connect(self) -> zmq.asyncio.Socket:
        """Another connection; what was there before stays open."""
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        if self._once:
            socket.reconnect_ivl = -1
        if self._keys is not None:
            own, learner = self._keys
            own.connect(socket, learner)
        socket.connect(self._endpoint)
        self.socket = socket
        return socket

    async def say(self, header: FromHost, *parts: wire.Buffer) -> None:
        await self.socket.send_multipart([wire.encode_header(header), *parts])

    async def hear(self, socket: zmq.asyncio.Socket | None = None) -> FromLearner:
        async with asyncio.timeout(WATCHDOG_S):
            frames = await (socket or self.socket).recv_multipart()
        return wire.read_from_learner(frames[0])

    def hello(self, **changes: Any) -> Hello:
        values: dict[str, Any] = {
            "protocol": wire.PROTOCOL,
            "incarnation": self.incarnation,
            "name": "peer",
            "inference": "host",
            "num_actors": 8,
            "num_groups": 4,
            "num_cores": 2,
        }
        return Hello(**(values | changes))

    async def join(self, **changes: Any) -> Welcome:
        await self.say(self.hello(**changes))
        header = await self.hear()
        assert isinstance(header, Welcome), header
        return header

    async def send_unroll(self, seq: int, slot: int, num_envs: int = 2, frames: int = 10) -> None:
        unroll = empty_unroll(T, num_envs, SPEC, ())
        map_nest(lambda leaf: leaf.fill(0), unroll)
        unroll.observation.fill(seq)
        parts = UnrollFormat(SPEC, T, num_envs, ()).encode(unroll)
        await self.say(UnrollSent(self.incarnation, seq, slot, "none", frames, [], []), *parts)

    def close(self) -> None:
        self._context.destroy(linger=0)
