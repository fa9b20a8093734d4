"""What bench_remote measures with: recorded unrolls, processes that send them, ends that take.

As a program (``python -m remote_traffic push|host ENDPOINT FOLDER KEYS ACTORS``) it is the sender:
an actor host's real conversation with unrolls that were encoded beforehand, or a bare PUSH socket
that sends the same parts.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import numpy as np
import uvloop
import zmq

from asyncagent.actor import act
from asyncagent.bench.children import environment
from asyncagent.config import Config
from asyncagent.conversation import Conversation
from asyncagent.envs import env_spec, make_group
from asyncagent.errors import EndOfUnrolls
from asyncagent.formats import UnrollFormat
from asyncagent.keys import load_public, load_secret, make_keys
from asyncagent.placement import keep_freed_memory
from asyncagent.remote import Learning, RemoteBridge, Weights, make_listener
from asyncagent.structs import EnvStep, Nest, PolicyStep, Unroll, map_nest
from asyncagent.tasks import cancel
from asyncagent.wire import (
    PROTOCOL,
    Accepted,
    Buffer,
    FromLearner,
    Hello,
    Pong,
    UnrollSent,
    Welcome,
)

SCRIPTS = Path(__file__).resolve().parent
LEASH = "asyncagent.bench.leash"
WATCHDOG_S = 60.0
"""Longest to wait for anything."""
GROUPS = 4
"""Of the sending host: as many unrolls may be on their way."""
BARE_HWM = 8
"""Messages that each end of the bare pipe holds."""
WARM_UP_UNROLLS = 16


class Recorded(NamedTuple):
    """Unrolls of one group of Breakout, played at random."""

    config: Config
    format: UnrollFormat
    unrolls: list[Unroll]


@functools.cache
def record(config: Config, num_envs: int, count: int, skip: int = 8) -> Recorded:
    """``count`` unrolls of ``num_envs`` environments, after ``skip`` more: real frames."""
    spec = env_spec(config)
    group = make_group(
        config, level_name=config.level_name, num_envs=num_envs, first_env_index=0, seed=1
    )
    random = np.random.default_rng(1)
    kept: list[Unroll] = []
    seen = itertools.count()

    async def infer(observation: Nest, *rest: Nest) -> PolicyStep:
        action = random.integers(0, spec.actions.num_logits, num_envs)
        logits = random.standard_normal((num_envs, spec.actions.num_logits)).astype(np.float32)
        return PolicyStep(action, logits, (), np.zeros(num_envs, np.int64))

    async def put(unroll: Unroll, give_back: Callable[[Unroll], None]) -> None:
        if next(seen) >= skip:
            kept.append(cast(Unroll, map_nest(np.copy, unroll)))
        give_back(unroll)
        if len(kept) == count:
            raise EndOfUnrolls

    async def play() -> None:
        with contextlib.suppress(EndOfUnrolls):
            await act(group, infer, put, config.unroll_length, (), _ignore)
        await group.close()

    asyncio.run(play())
    return Recorded(config, UnrollFormat(spec, config.unroll_length, num_envs, ()), kept)


def narrow(recorded: Recorded, num_envs: int) -> Recorded:
    """The first so many of the environments."""
    spec, length = env_spec(recorded.config), recorded.config.unroll_length
    unrolls = [
        cast(Unroll, map_nest(lambda leaf: leaf[:, :num_envs].copy(), unroll))
        for unroll in recorded.unrolls
    ]
    return Recorded(recorded.config, UnrollFormat(spec, length, num_envs, ()), unrolls)


def _ignore(row: EnvStep) -> None:
    pass


def num_bytes(parts: Sequence[Buffer]) -> int:
    """Of a message without its header."""
    return sum(memoryview(part).nbytes for part in parts)


def write_parts(recorded: Recorded, folder: Path) -> float:
    """Encode the unrolls into files for a sender; the mean of their bytes."""
    sizes = []
    for index, unroll in enumerate(recorded.unrolls):
        parts = recorded.format.encode(unroll)
        sizes.append(num_bytes(parts))
        for place, part in enumerate(parts):
            (folder / f"{index:03d}.{place:02d}").write_bytes(part)
    return sum(sizes) / len(sizes)


def read_parts(folder: Path) -> list[list[bytes]]:
    """What ``write_parts`` wrote."""
    names = sorted(path.name for path in folder.glob("*.*"))
    unrolls = itertools.groupby(names, lambda name: name.partition(".")[0])
    return [[(folder / name).read_bytes() for name in parts] for _, parts in unrolls]


def make_key_folder(folder: Path) -> Path:
    """Keys of a learner and of a host, and the folder of those allowed."""
    make_keys(folder, "learner")
    public, _ = make_keys(folder, "host")
    (folder / "allowed").mkdir()
    (folder / "allowed" / public.name).write_bytes(public.read_bytes())
    return folder


class Received(NamedTuple):
    """What came in."""

    unrolls_per_s: float
    cpu_s: float
    """CPU seconds per unroll, of both processes together: what else the machine does hardly
    changes them."""


class _Window:
    """Counts unrolls between the end of the warm-up and the end of the measurement."""

    def __init__(self, seconds: float) -> None:
        self.sender: subprocess.Popen[bytes] | None = None
        self.result: Received | None = None
        self._seconds = seconds
        self._count = 0
        self._began_s = self._began_cpu_s = 0.0

    def count(self) -> None:
        """One more has come."""
        self._count += 1
        if self._count == WARM_UP_UNROLLS:
            self._began_s, self._began_cpu_s = time.perf_counter(), self._cpu_s()
        elapsed_s = time.perf_counter() - self._began_s
        if self._count > WARM_UP_UNROLLS and elapsed_s >= self._seconds and self.result is None:
            unrolls = self._count - WARM_UP_UNROLLS
            cpu_s = self._cpu_s() - self._began_cpu_s
            self.result = Received(unrolls / elapsed_s, cpu_s / unrolls)

    def _cpu_s(self) -> float:
        assert self.sender is not None
        fields = Path(f"/proc/{self.sender.pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def receive_bare(folder: Path, keys: Path | None, seconds: float) -> Received:
    """From a PUSH socket in a process of its own, as a PULL socket without any more to it."""
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.linger, socket.rcvhwm, socket.rcvtimeo = 0, BARE_HWM, int(WATCHDOG_S * 1000)
        if keys is not None:
            pair = load_secret(keys / "learner.key_secret")
            socket.curve_server, socket.curve_secretkey = True, pair.secret
        socket.bind("tcp://127.0.0.1:*")
        window = _Window(seconds)
        endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        with _sender("push", endpoint, folder, keys) as window.sender:
            while window.result is None:
                socket.recv_multipart(copy=False)
                window.count()
        return window.result


def receive_as_learner(
    recorded: Recorded, folder: Path, keys: Path | None, seconds: float, decoding: bool = True
) -> Received:
    """From an actor host in a process of its own, by a RemoteBridge whose learner takes at once.

    Args:
      decoding: without it, unrolls are accepted as they come, unread.
    """
    flags: dict[str, Any] = {"listen": "tcp://127.0.0.1:*", "num_actors": 0, "num_groups": 0}
    if keys is not None:
        secret, allowed = str(keys / "learner.key_secret"), str(keys / "allowed")
        flags |= {"secret_key": secret, "allowed_keys": allowed}
    config = dataclasses.replace(recorded.config, **flags)
    num_envs = recorded.unrolls[0].reward.shape[1]
    with contextlib.ExitStack() as stack:
        if not decoding:
            stack.enter_context(mock.patch.object(UnrollFormat, "decode", _leave))
        return uvloop.run(_receive_as_learner(config, folder, keys, seconds, num_envs))


def _leave(format_: UnrollFormat, parts: Any, out: Unroll, *rest: Any) -> None:
    out.policy_version.fill(0)


async def _receive_as_learner(
    config: Config, folder: Path, keys: Path | None, seconds: float, num_envs: int
) -> Received:
    window = _Window(seconds)
    done = asyncio.Event()

    async def put(level_name: str, unroll: Unroll, give_back: Callable[[Unroll], None]) -> None:
        give_back(unroll)
        window.count()
        if window.result is not None:
            done.set()

    spec = env_spec(config)
    bridge = RemoteBridge(config, spec, make_listener(config), free_learning(put), seed=1)
    try:
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(bridge.serve())
            actors = GROUPS * num_envs
            with _sender("host", bridge.endpoint, folder, keys, actors) as window.sender:
                async with asyncio.timeout(seconds + WATCHDOG_S):
                    await done.wait()
            await cancel(serving)
    finally:
        bridge.close()
    assert window.result is not None
    return window.result


def free_learning(put: Callable[..., Any], weights: bytes = b"") -> Learning:
    """A learner of no weights and no work beside ``put``."""

    async def no_rows(*args: Any) -> None:
        raise NotImplementedError

    return Learning(
        initial_state=lambda num_envs: (),
        version=lambda: 0,
        num_weights=len(weights) // 4,
        encode_weights=lambda: Weights(0, weights),
        put=put,
        act=no_rows,
        tell=lambda *told: None,
    )


@contextlib.contextmanager
def _sender(
    kind: str, endpoint: str, folder: Path, keys: Path | None, num_actors: int = 0
) -> Iterator[subprocess.Popen[bytes]]:
    arguments = [kind, endpoint, str(folder), str(keys or ""), str(num_actors)]
    with running(LEASH, "remote_traffic", *arguments) as process:
        yield process


@contextlib.contextmanager
def running(module: str, *arguments: str, **options: Any) -> Iterator[Any]:
    """``python -m module`` in a process that ends with the block.

    Args:
      module: ``LEASH`` to run what follows in a process that ends with us, too.
      options: of Popen.
    """
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS.parent), str(SCRIPTS)])
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=subprocess.PIPE,
        env=variables,
        process_group=0,
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


class _Feed:
    """What an actor host says, without environments: recorded unrolls, for ever."""

    def __init__(
        self, endpoint: str, unrolls: list[list[bytes]], keys: Path | None, num_actors: int
    ) -> None:
        own = None
        if keys is not None:
            own = (load_secret(keys / "host.key_secret"), load_public(keys / "learner.key"))
        self._hello = Hello(PROTOCOL, os.urandom(16), "feed", "host", num_actors, GROUPS, 1)
        self.conversation = Conversation(
            endpoint, own, 0.0, lambda: self._hello, self._on_message, is_bulky=True
        )
        self._unrolls = itertools.cycle(unrolls)
        self._welcome: Welcome | None = None
        self._seq = 0

    async def _on_message(self, header: FromLearner, parts: list[Any]) -> None:
        match header:
            case Welcome():
                self._welcome = header
                self._fill(header, header.received)
            case Accepted() | Pong() if self._welcome is not None:
                self._fill(self._welcome, header.accepted)

    def _fill(self, welcome: Welcome, accepted: int) -> None:
        while self._seq - accepted < welcome.credits:
            self._seq += 1
            slot = welcome.groups[self._seq % len(welcome.groups)].slot
            header = UnrollSent(self._hello.incarnation, self._seq, slot, "none", 0, [], [])
            self.conversation.send(header, *next(self._unrolls))


def _push(endpoint: str, unrolls: list[list[bytes]], keys: Path | None) -> None:
    socket: zmq.Socket[bytes] = zmq.Context().socket(zmq.PUSH)
    socket.sndhwm = BARE_HWM
    if keys is not None:
        pair = load_secret(keys / "host.key_secret")
        socket.curve_publickey, socket.curve_secretkey = pair.public, pair.secret
        socket.curve_serverkey = load_public(keys / "learner.key")
    socket.connect(endpoint)
    for parts in itertools.cycle(unrolls):
        socket.send_multipart([b"header", *parts], copy=False)


def main(kind: str, endpoint: str, folder: str, key_folder: str, num_actors: str) -> None:
    """Send until we are ended."""
    keep_freed_memory()  # as actor hosts do
    unrolls, keys = read_parts(Path(folder)), Path(key_folder) if key_folder else None
    if kind == "push":
        _push(endpoint, unrolls, keys)
        return
    uvloop.run(_Feed(endpoint, unrolls, keys, int(num_actors)).conversation.run())


if __name__ == "__main__":
    main(*sys.argv[1:])
