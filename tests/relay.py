"""A TCP relay that does to its connections what networks do.

In a test's event loop (``Relay``), or as a process that obeys lines of its standard input::

    python -m tests.relay --to=127.0.0.1:5555 [--delay_s=0.05] [--bytes_per_s=4e6] ...

It prints the port it listens on.  Lines: ``cut``, ``mend``, ``reset``; it ends with the input.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import socket
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

CHUNK = 16_384
QUEUED = 64
"""Chunks that are on their way in one direction at most: what a network holds."""


class Weather(NamedTuple):
    """What happens on the way, each way alike."""

    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    """Of each connection; 0: no limit."""
    stalls: float = 0.0
    """Share of the segments that arrive ``stall_s`` later, and all that follow with them."""
    stall_s: float = 0.2
    reset_bytes: float = 0.0
    """Reset a connection after so many bytes on average; 0: never."""
    reset_s: float = 0.0
    """Reset all connections every so many seconds on average; 0: never."""
    seed: int = 0


class Relay:
    """Relays connections to ``to``; belongs to one event loop."""

    def __init__(self, to: tuple[str, int], weather: Weather | None = None) -> None:
        self.port = 0
        self.resets = 0
        """Connections that were reset."""
        self._to = to
        self._weather = weather or Weather()
        self._random = random.Random(self._weather.seed)
        self._writers: set[asyncio.StreamWriter] = set()
        self._whole = asyncio.Event()
        self._whole.set()

    @asynccontextmanager
    async def running(self, host: str = "127.0.0.1") -> AsyncIterator[Relay]:
        """Listen on a free port of ``host``."""
        server = await asyncio.start_server(self._relay, host, 0, limit=CHUNK)
        self.port = server.sockets[0].getsockname()[1]
        resetter = asyncio.create_task(self._reset_now_and_then())
        try:
            yield self
        finally:
            resetter.cancel()
            self._whole.set()
            server.close()
            self.reset()

    def cut(self) -> None:
        """Nothing passes any more; nobody is told."""
        self._whole.clear()

    def mend(self) -> None:
        """What was held up passes, and all that follows."""
        self._whole.set()

    def reset(self) -> None:
        """End all connections, as a machine does that has forgotten them."""
        for writer in [*self._writers]:
            self._reset(writer)

    def _reset(self, writer: asyncio.StreamWriter) -> None:
        if writer in self._writers:
            self._writers.discard(writer)
            self.resets += 1
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
            writer.transport.abort()

    async def _reset_now_and_then(self) -> None:
        while self._weather.reset_s:
            await asyncio.sleep(self._weather.reset_s * self._random.uniform(0.5, 1.5))
            self.reset()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._whole.wait()
        try:
            to_reader, to_writer = await asyncio.open_connection(*self._to, limit=CHUNK)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, to_writer)
        self._writers.update(pair)
        lasts = self._weather.reset_bytes * self._random.uniform(0.2, 1.8)
        budget = [lasts if lasts else float("inf")]
        try:
            ways = ((reader, to_writer), (to_reader, writer))
            await asyncio.gather(*(self._pass_on(*way, budget) for way in ways))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            for one in pair:
                self._writers.discard(one)
                one.transport.abort()

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, budget: list[float]
    ) -> None:
        # A chunk and when it arrives; None: the end.
        way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED)

        async def take() -> None:
            loop = asyncio.get_running_loop()
            free_s = due_s = 0.0
            while chunk := await reader.read(CHUNK):
                budget[0] -= len(chunk)
                if budget[0] < 0:
                    # In the middle of a message, as a rule.
                    await way.put((due_s, chunk[: len(chunk) // 2]))
                    while not way.empty():
                        await asyncio.sleep(0)
                    raise ConnectionResetError
                now_s = loop.time()
                if self._weather.bytes_per_s:
                    free_s = max(free_s, now_s) + len(chunk) / self._weather.bytes_per_s
                stall_s = self._weather.stall_s * (self._random.random() < self._weather.stalls)
                due_s = max(due_s, max(free_s, now_s) + self._weather.delay_s + stall_s)
                await way.put((due_s, chunk))
            raise ConnectionResetError  # one way is as good as none

        async def give() -> None:
            loop = asyncio.get_running_loop()
            while True:
                due_s, chunk = await way.get()
                if due_s > loop.time():
                    await asyncio.sleep(due_s - loop.time())
                await self._whole.wait()
                writer.write(chunk)
                await writer.drain()

        taker, giver = asyncio.create_task(take()), asyncio.create_task(give())
        try:
            done, _ = await asyncio.wait((taker, giver), return_when=asyncio.FIRST_COMPLETED)
            if budget[0] < 0:
                self._reset(writer)
            for task in done:
                task.result()
        finally:
            taker.cancel()
            giver.cancel()


async def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--to", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    for name, default in Weather()._asdict().items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    flags = vars(parser.parse_args())
    to, _, port = flags.pop("to").rpartition(":")
    host = flags.pop("host")
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    async with Relay((to, int(port)), Weather(**flags)).running(host) as relay:
        print(relay.port, flush=True)
        orders = {"cut": relay.cut, "mend": relay.mend, "reset": relay.reset}
        while line := await lines.readline():
            orders[line.decode().strip()]()


if __name__ == "__main__":
    asyncio.run(_main())
