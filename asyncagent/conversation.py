"""An actor host's side of the conversation with its learner, which outlives connections."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import zmq
import zmq.asyncio

from asyncagent import wire
from asyncagent.errors import UsageError, WireError
from asyncagent.keys import KeyPair
from asyncagent.tasks import endless
from asyncagent.wire import (
    Buffer,
    Bye,
    FromHost,
    FromLearner,
    Hello,
    Ping,
    Pong,
    Refused,
    Unknown,
    Welcome,
)

PING_S = 2.0
SILENCE_S = 6.0
"""A learner that says nothing for so long is looked for anew."""
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 10.0
BYE_MS = 500
"""Longest that leaving waits for the last message to leave."""

_log = logging.getLogger(__name__)

Handler = Callable[[FromLearner, list[Any]], Awaitable[None]]
"""(header, parts)"""


class Conversation:
    """Says Hello until there is a Welcome, and again whenever it may have been forgotten.

    What is sent while we are not welcome is dropped: whoever sends it keeps it until it has been
    acknowledged, and sends it again at the next Welcome.
    """

    def __init__(
        self, endpoint: str, keys: tuple[KeyPair, bytes] | None, give_up_s: float,
        hello: Callable[[], Hello], handler: Handler, is_bulky: bool,
        shares: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0),
    ) -> None:  # fmt: skip
        """
        Args:
          keys: our own, and the learner's public one.
          give_up_s: see ``run``; 0: never.
          hello: what to say now.
          handler: gets every Welcome, and whatever is said between one and the next Hello.
          shares: (steps, waits) of the next Ping.
          is_bulky: messages are so large that a Ping should not stand behind many.
        """
        self.welcomed = False
        self._endpoint = endpoint
        self._keys = keys
        self._give_up_s = give_up_s
        self._hello = hello
        self._handler = handler
        self._shares = shares
        self._most_sent = 2 if is_bulky else 1024
        self._outbox: deque[list[Buffer]] = deque()
        self._outgoing = asyncio.Event()
        self._heard_s = time.monotonic()
        self._round_trip_s = 0.0
        self._reconnects = 0

    def send(self, header: FromHost, *parts: Buffer) -> None:
        """Send soon, in order; nothing happens while we are not welcome."""
        if self.welcomed:
            self._post(header, *parts)

    async def run(self) -> None:
        """Talk, for ever; says Bye when cancelled.

        Raises:
          UsageError: the learner refuses us, speaks another language, or the address is wrong.
          TimeoutError: nothing was heard for ``give_up_s``.
        """
        context = zmq.asyncio.Context()
        backoff_s, attempts = FIRST_BACKOFF_S, 0
        try:
            while True:
                await self._connected(context)
                attempts = 1 if self.welcomed else attempts + 1
                if attempts in (1, 4) or attempts % 30 == 0:
                    _log.warning("no answer from a learner at %s: trying on", self._endpoint)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S) if attempts > 1 else FIRST_BACKOFF_S
                self.welcomed = False
                self._reconnects += 1
                await asyncio.sleep(backoff_s)
        finally:
            context.destroy(linger=BYE_MS)

    async def _connected(self, context: zmq.asyncio.Context) -> None:
        """One socket's life: until the learner has been silent for too long."""
        socket = self._connect(context)
        self._say_hello()
        try:
            async with asyncio.TaskGroup() as tasks:
                others = [
                    tasks.create_task(endless("messages out", self._send_all(socket))),
                    tasks.create_task(endless("messages in", self._receive(socket))),
                ]
                await self._keep_alive()
                for task in others:
                    task.cancel()
        except asyncio.CancelledError:
            socket.send(wire.encode_header(Bye()))
            socket.close(linger=BYE_MS)
            raise
        finally:
            if not socket.closed:
                socket.close(linger=0)

    def _connect(self, context: zmq.asyncio.Context) -> zmq.asyncio.Socket:
        socket = context.socket(zmq.DEALER)
        socket.ipv6 = "[" in self._endpoint
        socket.immediate = True  # what cannot be sent yet stays with us, and may be thought over
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2_000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6_000)
        socket.setsockopt(zmq.RECONNECT_IVL, 200)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
        socket.rcvhwm = 256
        socket.sndhwm = self._most_sent
        if self._keys is not None:
            own, learner = self._keys
            own.connect(socket, learner)
        try:
            socket.connect(self._endpoint)
        except zmq.ZMQError as error:
            raise UsageError(f"connect={self._endpoint!r}: {error.strerror}") from None
        return socket

    async def _keep_alive(self) -> None:
        """Say what is due, until the learner has been silent for too long."""
        now_s = asked_s = pinged_s = time.monotonic()
        heard_s, silent_s = self._heard_s, 0.0
        while silent_s <= SILENCE_S:
            if not self.welcomed and now_s - asked_s >= SILENCE_S / 2:
                asked_s = now_s
                self._say_hello()
            if self.welcomed and now_s - pinged_s >= PING_S:
                pinged_s = now_s
                ping = Ping(now_s, self._round_trip_s, self._reconnects, *self._shares())
                self._outbox.appendleft([wire.encode_header(ping)])
                self._outgoing.set()
            away_s = now_s - self._heard_s
            if self._give_up_s and away_s > self._give_up_s:
                raise TimeoutError(f"{self._endpoint}: no learner for {away_s:.0f} s")
            await asyncio.sleep(PING_S / 8)
            before_s, now_s = now_s, time.monotonic()
            # Where we are held up ourselves, that is no silence of the learner's.
            silent_s += min(now_s - before_s, PING_S / 2)
            if heard_s != self._heard_s:
                heard_s, silent_s = self._heard_s, 0.0

    async def _send_all(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            while self._outbox:
                await socket.poll(flags=zmq.POLLOUT)  # type: ignore[call-arg]
                if not self._outbox:
                    break  # all is being said anew
                await socket.send_multipart(self._outbox.popleft(), copy=False)
            self._outgoing.clear()
            await self._outgoing.wait()

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            frames = await socket.recv_multipart(copy=False)
            self._heard_s = time.monotonic()
            try:
                header = wire.read_from_learner(frames[0].buffer)
                parts = [frame.buffer for frame in frames[1:]]
                wanted = isinstance(header, wire.WeightsSent | wire.Act)
                if len(parts) != wanted:
                    raise WireError(f"{len(parts)} parts instead of {int(wanted)}")
            except WireError as error:
                raise UsageError(
                    f"{self._endpoint} does not speak our language ({error}): the same version of "
                    "asyncagent must run on both sides"
                ) from None
            await self._on_message(header, parts)

    async def _on_message(self, header: FromLearner, parts: list[Any]) -> None:
        match header:
            case Refused(reason, for_good):
                if for_good:
                    raise UsageError(f"the learner refuses this host: {reason}")
                _log.warning("the learner refuses this host for now: %s", reason)
                return
            case Unknown():
                if self.welcomed:
                    self._say_hello()
                return
            case Welcome():
                if header.protocol != wire.PROTOCOL:
                    theirs, ours = header.protocol, wire.PROTOCOL
                    raise UsageError(f"protocol {theirs} there is {ours} here: update asyncagent")
                self.welcomed = True
            case Pong():
                self._round_trip_s = time.monotonic() - header.sent_s
        if self.welcomed:
            await self._handler(header, parts)

    def _say_hello(self) -> None:
        self.welcomed = False
        self._outbox.clear()
        self._post(self._hello())

    def _post(self, header: FromHost, *parts: Buffer) -> None:
        self._outbox.append([wire.encode_header(header), *parts])
        self._outgoing.set()
