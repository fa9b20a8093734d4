"""What strangers send to a learner's port."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import zmq
import zmq.asyncio

from asyncagent import wire
from asyncagent.keys import KeyPair, load_public, load_secret

CLIENTS = 20
LISTEN_S = 1.0
"""How long a client stays after it has spoken."""
HTTP = b"GET /metrics HTTP/1.1\r\nHost: learner\r\nUser-Agent: curl/8\r\n\r\n"
TLS = bytes.fromhex("16030100a5010000a10303") + bytes(range(160))


def garbage(choice: random.Random) -> Iterator[bytes]:
    """What knows nothing of ZMTP, for one connection each; an empty one says nothing."""
    yield from (HTTP, TLS, b"", b"\n", b"\0" * 4096)
    for _ in range(CLIENTS):
        yield choice.randbytes(choice.choice((1, 10, 64, 1000, 1 << 20)))


def malformed_zmtp(choice: random.Random) -> Iterator[bytes]:
    """A greeting, good or nearly so, then commands and messages that are none."""
    for _ in range(CLIENTS):
        mechanism = choice.choice((b"NULL", b"PLAIN", b"CURVE", b"CURVE\xff", b"x" * 20))
        version = bytes((choice.choice((1, 2, 3, 3, 3, 200)), choice.choice((0, 1, 255))))
        signature = b"\xff" + bytes(7) + b"\x01\x7f"
        greeting = signature + version + mechanism.ljust(20, b"\0")[:20] + bytes(32)
        yield greeting[: choice.choice((len(greeting), len(greeting), 11, 40))] + b"".join(
            _frame(choice) for _ in range(choice.randrange(4))
        )


def _frame(choice: random.Random) -> bytes:
    body = choice.choice((b"\x05HELLO", b"\x08INITIATE", b"\x05READY", b"\x04PING", b"\xff", b""))
    body += choice.randbytes(choice.choice((0, 1, 194, 300)))
    flags = choice.choice((0, 1, 2, 4, 6, 7, 255))
    length = choice.choice((len(body), len(body), 0, 255, 2**31, 2**63 - 1, 2**64 - 1))
    if flags & 2:
        return struct.pack(">BQ", flags, length) + body
    return struct.pack(">BB", flags, length & 255) + body


async def send_bytes(port: int, payloads: Iterator[bytes]) -> None:
    """A connection for each; reset in the end, or closed."""

    async def send(payload: bytes) -> None:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LISTEN_S):
                        writer.write(payload)
                        await writer.drain()
                        await reader.read()
            finally:
                writer.close()

    await asyncio.gather(*map(send, payloads))


@asynccontextmanager
async def _dealer(
    port: int, keys: tuple[KeyPair, bytes] | None
) -> AsyncIterator[zmq.asyncio.Socket]:
    context = zmq.asyncio.Context()
    dealer = context.socket(zmq.DEALER)
    try:
        if keys is not None:
            own, learner = keys
            own.connect(dealer, learner)
        dealer.connect(f"tcp://127.0.0.1:{port}")
        yield dealer
    finally:
        context.destroy(linger=0)


def _hello(choice: random.Random) -> bytes:
    name = f"stranger-{choice.randrange(100)}"
    hello = wire.Hello(wire.PROTOCOL, choice.randbytes(16), name, "host", 4, 2, 1)
    return wire.encode_header(hello)


async def knock(port: int, keys: Path, choice: random.Random) -> None:
    """Clients with keys of their own making, with a wrong one of the learner's, and with none."""
    learner = load_public(keys / "learner.key")

    async def try_in(number: int) -> None:
        public, secret = zmq.curve_keypair()
        believed = learner if number % 3 else public
        own = (KeyPair(public, secret), believed) if number % 2 else None
        async with _dealer(port, own) as dealer:
            await dealer.send(_hello(choice), zmq.NOBLOCK)
            if await dealer.poll(int(1000 * LISTEN_S)):
                raise PermissionError("the learner answers a client without an allowed key")

    await asyncio.gather(*map(try_in, range(CLIENTS)))


async def talk_nonsense(port: int, keys: Path, choice: random.Random) -> None:
    """A client with an allowed key: random bytes, and good headers at the wrong time or torn."""
    allowed = load_secret(keys / "stranger.key_secret"), load_public(keys / "learner.key")
    unroll = wire.UnrollSent(choice.randbytes(16), 1, 0, "none", 80, [], [])
    row = wire.RowSent(choice.randrange(100), choice.randrange(100), "zstd", [], [])
    headers = [wire.encode_header(one) for one in (unroll, row, wire.WantWeights(-1), wire.Bye())]
    headers += [_hello(choice)[:-3], b"", b"\xc1", choice.randbytes(100), b"\x91" * 10_000]
    async with _dealer(port, allowed) as dealer:
        for _ in range(5 * CLIENTS):
            parts = [choice.randbytes(choice.choice((0, 1, 100, 5000))) for _ in range(3)]
            kept = parts[: choice.randrange(4)] * choice.choice((1, 1, 40))
            await dealer.send_multipart([choice.choice(headers), *kept])
        await asyncio.sleep(LISTEN_S)
