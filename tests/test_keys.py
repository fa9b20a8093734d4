"""Key files, the set of allowed keys, the gate in front of the learner, and endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import shutil
import socket as sockets
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import uvloop
import zmq
import zmq.asyncio
import zmq.auth
from zmq.utils.monitor import recv_monitor_message

from asyncagent.commands.keys import main
from asyncagent.errors import UsageError
from asyncagent.keys import (
    AllowedKeys,
    Gate,
    KeyPair,
    check_endpoint,
    check_listening,
    is_loopback,
    load_public,
    load_secret,
    make_keys,
    sender,
)

FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


def new_pair() -> KeyPair:
    """A pair that no file holds."""
    return KeyPair(*zmq.curve_keypair())


def publish(folder: Path, name: str, key: bytes) -> Path:
    """Write NAME.key."""
    path = folder / f"{name}.key"
    path.write_text(f'curve\n    public-key = "{key.decode()}"\n')
    return path


def one_line(error: pytest.ExceptionInfo[UsageError]) -> str:
    """What was said, in one line."""
    text = str(error.value)
    assert text and "\n" not in text
    return text


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    """An empty folder for allowed keys."""
    folder = tmp_path / "hosts"
    folder.mkdir()
    return folder


@pytest.fixture
def umask_0() -> Iterator[None]:
    """Files get all the rights that their makers ask for."""
    before = os.umask(0)
    yield
    os.umask(before)


# Files.


@pytest.mark.usefixtures("umask_0")
def test_secret_file_is_its_owners_from_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NAME.key_secret is created 0600 in a new folder 0700, without any chmod."""

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("chmod comes too late")

    for name in ("chmod", "fchmod", "lchmod"):
        monkeypatch.setattr(os, name, never, raising=False)
    public, secret = make_keys(tmp_path / "new" / "keys", "box-1.example_x")
    assert (public.name, secret.name) == ("box-1.example_x.key", "box-1.example_x.key_secret")
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (secret.parent, secret, public)]
    assert modes == [0o700, 0o600, 0o644]


def test_pair_is_read_back(tmp_path: Path) -> None:
    """Both files hold the same public key, the secret belongs to it, and zmq.auth agrees."""
    public, secret = make_keys(tmp_path, "box")
    pair = load_secret(secret)
    assert load_public(public) == pair.public == zmq.curve_public(pair.secret)
    assert zmq.auth.load_certificate(public) == (pair.public, None)
    assert zmq.auth.load_certificate(secret) == (pair.public, pair.secret)
    assert pair.secret.decode() not in repr(pair)
    assert pair.secret not in public.read_bytes()


def test_files_of_other_tools_are_read(tmp_path: Path) -> None:
    """Certificates that pyzmq writes are read, comments and metadata and all."""
    names = zmq.auth.create_certificates(tmp_path, "theirs", {"public-key-of": "box"})
    os.chmod(names[1], 0o600)
    assert load_public(names[0]) == load_secret(names[1]).public


@pytest.mark.parametrize("existing", ["box.key", "box.key_secret"])
def test_nothing_is_overwritten(tmp_path: Path, existing: str) -> None:
    """Where one of the two files exists, it stays as it is and the other is not made."""
    (tmp_path / existing).write_text("in use")
    with pytest.raises(UsageError, match="exists: take another name") as error:
        make_keys(tmp_path, "box")
    assert one_line(error).startswith(repr(str(tmp_path / existing)))
    assert [path.name for path in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_text() == "in use"


@pytest.mark.parametrize("name", ["", "a b", "../box", ".box", "-box", "b\nx", "bøx", "b" * 101])
def test_bad_names(tmp_path: Path, name: str) -> None:
    """A name that is not letters, digits, . _ - makes no file, anywhere."""
    with pytest.raises(UsageError, match="letters, digits") as error:
        make_keys(tmp_path / "keys", name)
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be(tmp_path: Path) -> None:
    """A file in the place of the folder is told in one line."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "keys"):
        with pytest.raises(UsageError, match="cannot write keys to") as error:
            make_keys(folder, "box")
        one_line(error)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_secret_open_to_others(tmp_path: Path, mode: int) -> None:
    """A secret file that others have any right to is refused, with the chmod that helps."""
    _, secret = make_keys(tmp_path, "box")
    secret.chmod(mode)
    with pytest.raises(UsageError, match=f"mode {mode:04o}.*chmod 600 ") as error:
        load_secret(secret)
    assert str(secret) in one_line(error)
    secret.chmod(0o400)
    load_secret(secret)


def test_keys_mixed_up(tmp_path: Path) -> None:
    """A public file is no secret one and the other way round; the message says which to give."""
    public, secret = make_keys(tmp_path, "box")
    with pytest.raises(UsageError, match=r"public key only.*NAME\.key_secret") as error:
        load_secret(public)
    one_line(error)
    with pytest.raises(UsageError, match=r"holds a secret key.*NAME\.key,?$") as error:
        load_public(secret)
    one_line(error)


KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
OTHER = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "curve\n",
        "\0\xff" * 50,
        f'# public-key = "{KEY}"\n',
        f'public-key = "{KEY[:-1]}"\n',
        f'public-key = "{KEY}0"\n',
        f'public-key = "{KEY[:-1]}~"\n',
        f'public-key = "{KEY[:-5]}#####"\n',
        f'public-key = "{KEY[:-1]}ø"\n',
        f'secret-key = "{KEY}"\n',
        f'public-key =\n"{KEY}"\n',
        f'public-key = "{KEY}"\npublic-key = "{KEY}"\n',
        f'public-key = "{KEY}"\nsecret-key = "{KEY[1:]}"\n',
        f'public-key = "{KEY}"\n' + " " * 70000,
    ],
)
@pytest.mark.parametrize("load", [load_public, load_secret])
def test_malformed_files(tmp_path: Path, load: Callable[[Path], object], text: str) -> None:
    """What is no certificate is malformed, whichever way it is read."""
    path = tmp_path / "box.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(UsageError, match="malformed") as error:
        load(path)
    assert str(path) in one_line(error)


def test_two_halves_of_different_pairs(tmp_path: Path) -> None:
    """A secret file must hold the public key of its secret one."""
    path = tmp_path / "box.key_secret"
    path.touch(0o600)
    path.write_text(f'public-key = "{KEY}"\nsecret-key = "{OTHER}"\n')
    with pytest.raises(UsageError, match="not a pair") as error:
        load_secret(path)
    one_line(error)


@pytest.mark.parametrize("load", [load_public, load_secret])
def test_files_that_cannot_be_read(tmp_path: Path, load: Callable[[Path], object]) -> None:
    """Missing files, folders and pipes are told in one line, and nothing waits for a pipe."""
    os.mkfifo(tmp_path / "pipe")
    for name, said in [("none", "No such file"), (".", "not a file|directory"), ("pipe", "not a")]:
        with pytest.raises(UsageError, match=said) as error:
            load(tmp_path / name)
        one_line(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_rights(tmp_path: Path) -> None:
    """A file that this user may not read is told in one line."""
    public, _ = make_keys(tmp_path, "box")
    public.chmod(0)
    with pytest.raises(UsageError, match="Permission denied") as error:
        load_public(public)
    one_line(error)


# The set of allowed keys.


def test_no_folder_at_the_start(tmp_path: Path) -> None:
    """A folder that is missing from the start is a mistake of the user's."""
    with pytest.raises(UsageError, match="there is no folder") as error:
        AllowedKeys(tmp_path / "hosts")
    one_line(error)


def test_added_replaced_renamed_removed(hosts: Path) -> None:
    """refresh sees each change of the folder, even two within one tick of the file times."""
    first, second = new_pair().public, new_pair().public
    allowed = AllowedKeys(hosts)
    assert first not in allowed and len(allowed) == 0
    path = publish(hosts, "box", first)
    assert first not in allowed, "questions read no files"
    assert allowed.refresh() == ({first: "box"}, {})
    assert first in allowed and allowed.name_of(first) == "box"
    assert allowed.refresh() == ({}, {})
    publish(hosts, "box", second)
    assert allowed.refresh() == ({second: "box"}, {first: "box"})
    assert first not in allowed and second in allowed
    path.rename(hosts / "other.key")
    assert allowed.refresh() == ({}, {})
    assert allowed.name_of(second) == "other"
    (hosts / "other.key").unlink()
    assert allowed.refresh() == ({}, {second: "other"})
    assert second not in allowed
    with pytest.raises(KeyError):
        allowed.name_of(second)


def test_key_of_two_files(hosts: Path) -> None:
    """A key that two files hold is allowed until both are gone, under the first name."""
    key = new_pair().public
    for name in ("b", "a"):
        publish(hosts, name, key)
    allowed = AllowedKeys(hosts)
    assert allowed.name_of(key) == "a"
    (hosts / "a.key").unlink()
    assert not any(allowed.refresh())
    assert allowed.name_of(key) == "b"


def test_only_public_files_count(hosts: Path) -> None:
    """Other files, secret ones too, are passed over; links are followed."""
    public, _ = make_keys(hosts.parent / "elsewhere", "box")
    shutil.copy(public, hosts / "box.key.txt")
    make_keys(hosts, "mine")
    (hosts / "mine.key").unlink()
    assert len(AllowedKeys(hosts)) == 0
    (hosts / "link.key").symlink_to(public)
    assert AllowedKeys(hosts).name_of(load_public(public)) == "link"


def test_old_files_are_read_once(hosts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is read again only if its times, size or inode changed, or it was young."""
    keys = [new_pair().public for _ in range(3)]
    for name, key in zip("abc", keys, strict=True):
        publish(hosts, name, key)
    ahead_s = 0
    read: list[str] = []

    def load(path: Path) -> bytes:
        read.append(path.name)
        return load_public(path)

    monkeypatch.setattr("asyncagent.keys.load_public", load)
    allowed = AllowedKeys(hosts, now_ns=lambda: time.time_ns() + ahead_s * 10**9)
    allowed.refresh()
    assert sorted(read) == sorted(["a.key", "b.key", "c.key"] * 2), "young files are not trusted"
    ahead_s = 60
    allowed.refresh()
    read.clear()
    allowed.refresh()
    assert read == []
    publish(hosts.parent, "new", OTHER.encode())
    os.utime(hosts.parent / "new.key", ns=(1, (hosts / "b.key").stat().st_mtime_ns))
    (hosts.parent / "new.key").rename(hosts / "b.key")
    assert allowed.refresh() == ({OTHER.encode(): "b"}, {keys[1]: "b"})
    assert read == ["b.key"]


def test_malformed_file_is_skipped_and_told_once(
    hosts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A malformed file allows nobody, harms no other, is told once, and counts once put right."""
    good, late = new_pair().public, new_pair().public
    publish(hosts, "good", good)
    (hosts / "bad.key").write_text("curve\n    public-")
    allowed = AllowedKeys(hosts)
    for _ in range(3):
        allowed.refresh()
    assert good in allowed and len(allowed) == 1
    assert len(caplog.messages) == 1 and "bad.key" in caplog.text
    publish(hosts, "bad", late)
    assert allowed.refresh() == ({late: "bad"}, {})
    (hosts / "bad.key").write_text(f'public-key = "{late.decode()}"\nsecret-key = "{OTHER}"\n')
    assert allowed.refresh() == ({}, {late: "bad"}), "a file that went bad allows nobody"
    assert len(caplog.messages) == 2 and "secret key" in caplog.messages[1]
    assert OTHER not in caplog.text


def test_strange_files_are_skipped(hosts: Path) -> None:
    """Folders, pipes and links to nothing named *.key are harmless."""
    good = new_pair().public
    publish(hosts, "good", good)
    (hosts / "folder.key").mkdir()
    os.mkfifo(hosts / "pipe.key")
    (hosts / "nothing.key").symlink_to("nowhere")
    assert len(AllowedKeys(hosts)) == 1


def test_folder_gone_allows_nobody(hosts: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While the folder is gone nobody is allowed; it is told once, each time; it may come back."""
    key = new_pair().public
    publish(hosts, "box", key)
    allowed = AllowedKeys(hosts)
    for times in (1, 2):
        hosts.rename(hosts.parent / "away")
        assert allowed.refresh() == ({}, {key: "box"})
        assert key not in allowed
        assert allowed.refresh() == ({}, {})
        assert [message.count("nobody is allowed") for message in caplog.messages] == [1] * times
        (hosts.parent / "away").rename(hosts)
        assert allowed.refresh() == ({key: "box"}, {})


@pytest.mark.parametrize("function", ["scandir", "open"])
def test_trouble_of_our_own_revokes_nobody(
    hosts: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """Without descriptors left the last keys hold, until a file can be read that says otherwise."""
    key, other = new_pair().public, new_pair().public
    path = publish(hosts, "box", key)
    allowed = AllowedKeys(hosts, now_ns=lambda: 0)  # every file is young, and read each time

    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        assert allowed.refresh() == ({}, {})
        assert key in allowed
    assert ("only those allowed before" in caplog.text) == (function == "scandir")
    path.unlink()
    publish(hosts, "box", other)
    assert allowed.refresh() == ({other: "box"}, {key: "box"})


# The gate, with real sockets.


class Learner:
    """A ROUTER behind a gate, and what befalls the handshakes there."""

    def __init__(self, context: zmq.asyncio.Context, hosts: Path) -> None:
        self.context = context
        self.pair = new_pair()
        self.allowed = AllowedKeys(hosts)
        self.gate = Gate(context, self.allowed)
        self.router = context.socket(zmq.ROUTER)
        self.pair.serve(self.router)
        self.failures = self.router.get_monitor_socket(FAILED)
        self.endpoint = f"tcp://127.0.0.1:{self.router.bind_to_random_port('tcp://127.0.0.1')}"

    def client(self, pair: KeyPair | None, server: bytes | None = None) -> zmq.asyncio.Socket:
        """A DEALER that has said its own key, and tries to connect once."""
        client = self.context.socket(zmq.DEALER)
        client.reconnect_ivl, client.linger = -1, 0
        if pair is not None:
            pair.connect(client, self.pair.public if server is None else server)
        client.connect(self.endpoint)
        client.send(b"none" if pair is None else pair.public)
        return client

    async def receive(self) -> tuple[bytes, bytes]:
        """The next message, and the key of its sender."""
        _, frame = await self.router.recv_multipart(copy=False)
        return frame.bytes, sender(frame)

    async def failure(self) -> int:
        """The next handshake that fails."""
        said = await recv_monitor_message(self.failures)
        return int(said["event"])


@contextlib.asynccontextmanager
async def learner_of(hosts: Path, started: bool = True) -> AsyncIterator[Learner]:
    """A learner that leaves nothing behind; no callback of the loop may fail."""
    wrong: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, said: wrong.append(str(said)))
    context = zmq.asyncio.Context()
    learner = Learner(context, hosts)
    try:
        if started:
            learner.gate.start()
        async with asyncio.timeout(60):
            yield learner
    finally:
        learner.gate.stop()
        learner.gate.stop()
        await asyncio.sleep(0)
        learner.router.disable_monitor()
        context.destroy(linger=0)
    assert wrong == []


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_allowed_key_talks_under_its_key(
    hosts: Path, run: Callable[[Awaitable[None]], None]
) -> None:
    """What an allowed client sends arrives, its User-Id is its public key, and answers return."""

    async def talk() -> None:
        pairs = [new_pair(), new_pair()]
        for number, pair in enumerate(pairs):
            publish(hosts, f"box{number}", pair.public)
        async with learner_of(hosts) as learner:
            clients = [learner.client(pair) for pair in pairs]
            heard = [await learner.receive() for _ in pairs]
            assert sorted(heard) == sorted((pair.public, pair.public) for pair in pairs)
            clients[0].send(b"more")
            name, frame = await learner.router.recv_multipart(copy=False)
            assert sender(frame) == pairs[0].public
            await learner.router.send_multipart([name, b"answer"])
            assert await clients[0].recv() == b"answer"
            assert learner.gate.refused == 0

    run(talk())


def test_an_authenticator_that_dies_is_missed(hosts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends the answering comes out of ``answer``: nobody could connect any more."""

    def broken(self: Gate, domain: str, key: bytes) -> bool:
        raise LookupError("no such table")

    async def attempt() -> None:
        async with learner_of(hosts) as learner:
            client = learner.client(new_pair())
            with pytest.raises(LookupError, match="no such table"):
                await learner.gate.answer()
            assert not client.closed  # and so it was alive until here

    monkeypatch.setattr(Gate, "callback", broken)
    asyncio.run(attempt())


def refuse(hosts: Path, client: Callable[[Learner], object], started: bool = True) -> Learner:
    """Let a client try; it must fail, and an allowed one that comes after it must get in."""

    async def attempt() -> Learner:
        good = new_pair()
        publish(hosts, "good", good.public)
        async with learner_of(hosts, started) as learner:
            kept = [client(learner)]
            await learner.failure()
            learner.gate.start()
            kept.append(learner.client(good))
            assert await learner.receive() == (good.public, good.public)
            assert not await learner.router.poll(0), "nothing of the refused one arrives"
        return learner

    return asyncio.run(attempt())


def test_client_without_a_key(hosts: Path) -> None:
    """A client that speaks no CURVE fails at once; the gate is not even asked."""
    assert refuse(hosts, lambda learner: learner.client(None)).gate.refused == 0


def test_client_with_a_password(hosts: Path) -> None:
    """Neither does PLAIN pass for CURVE."""

    def client(learner: Learner) -> zmq.asyncio.Socket:
        client = learner.context.socket(zmq.DEALER)
        client.reconnect_ivl, client.linger = -1, 0
        client.plain_username, client.plain_password = b"admin", b"admin"
        client.connect(learner.endpoint)
        client.send(b"plain")
        return client

    assert refuse(hosts, client).gate.refused == 0


def test_client_that_takes_the_server_for_another(hosts: Path) -> None:
    """A client, though allowed, that expects another server's key never talks to this one."""
    pair = new_pair()
    publish(hosts, "pair", pair.public)
    other = new_pair().public
    assert refuse(hosts, lambda learner: learner.client(pair, other)).gate.refused == 0


def test_client_with_another_ones_public_key(hosts: Path) -> None:
    """To know an allowed public key is not enough."""
    pair = new_pair()
    publish(hosts, "pair", pair.public)
    thief = KeyPair(pair.public, new_pair().secret)
    assert refuse(hosts, lambda learner: learner.client(thief)).gate.refused == 0


def test_unknown_key(hosts: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A key that no file allows is refused, counted, and told with the key."""
    pair = new_pair()
    assert refuse(hosts, lambda learner: learner.client(pair)).gate.refused == 1
    assert [pair.public.decode() in message for message in caplog.messages] == [True]


def test_revoked_key(hosts: Path) -> None:
    """A revoked key's new connections are refused; the old one is known by its user id."""

    async def revoke() -> None:
        pair = new_pair()
        path = publish(hosts, "box", pair.public)
        async with learner_of(hosts) as learner:
            old = learner.client(pair)
            assert await learner.receive() == (pair.public, pair.public)
            path.unlink()
            assert learner.allowed.refresh().removed == {pair.public: "box"}
            new = learner.client(pair)
            assert await learner.failure() == zmq.EVENT_HANDSHAKE_FAILED_AUTH
            assert learner.gate.refused == 1
            old.send(b"still here")
            text, key = await learner.receive()
            assert text == b"still here" and key == pair.public and key not in learner.allowed
            publish(hosts, "box", pair.public)
            learner.allowed.refresh()
            again = learner.client(pair)
            assert await learner.receive() == (pair.public, pair.public)
            assert len({old, new, again}) == 3  # and alive until here

    asyncio.run(revoke())


def test_nobody_passes_without_a_gate(hosts: Path) -> None:
    """Before the gate starts even allowed keys are refused, rather than all keys let in."""
    pair = new_pair()
    publish(hosts, "pair", pair.public)
    refuse(hosts, lambda learner: learner.client(pair), started=False)


def test_sender_without_a_gate() -> None:
    """A frame whose sender showed no key has none."""
    assert sender(zmq.Frame(b"text")) == b""


def test_strangers_fill_neither_log_nor_memory(
    hosts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every refusal counts; a key is told once, and ten lines a minute are the most."""
    now = 0.0
    context = zmq.asyncio.Context()
    gate = Gate(context, AllowedKeys(hosts), clock=lambda: now)
    keys = [f"{number:040}".encode() for number in range(1000)]
    for _ in range(3):
        assert not gate.callback("*", keys[0])
    assert len(caplog.messages) == 1
    for key in keys:
        assert not gate.callback("*", key)
    assert gate.refused == 1003 and len(caplog.messages) == 10
    now = 59.9
    gate.callback("*", keys[500])
    assert len(caplog.messages) == 10
    now = 60.0
    gate.callback("*", keys[500])
    gate.callback("*", keys[0])
    assert len(caplog.messages) == 11, "a key that was told is not told again"
    for minute in range(1000):
        now = 120.0 + 60 * minute
        gate.callback("*", keys[minute])
    assert len(gate._told) == 100
    context.term()


def test_authenticator_is_quiet() -> None:
    """What pyzmq notes of every handshake stays out of a log that shows everything."""
    assert not logging.getLogger("asyncagent.keys.zap").isEnabledFor(logging.INFO)


# Endpoints.


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("tcp://127.0.0.1:5555", True),
        ("tcp://127.1.2.3:*", True),
        ("tcp://localhost:5555", True),
        ("tcp://[::1]:5555", True),
        ("ipc:///tmp/learner", True),
        ("inproc://learner", True),
        ("tcp://0.0.0.0:5555", False),
        ("tcp://*:5555", False),
        ("tcp://[::]:5555", False),
        ("tcp://10.0.0.1:5555", False),
        ("tcp://eth0:5555", False),
        ("tcp://localhost.example.org:5555", False),
        ("tcp://127.0.0.1.example.org:5555", False),
        ("tcp://10.0.0.1:127.0.0.1:5555", False),
        ("udp://127.0.0.1:5555", False),
        ("", False),
    ],
)
def test_is_loopback(endpoint: str, expected: bool) -> None:
    """Only what other machines cannot reach counts as loopback; names are not believed."""
    assert is_loopback(endpoint) is expected


BOTH = [
    "tcp://127.0.0.1:1", "tcp://learner:65535", "tcp://gpu-1.example.org:5555",
    "tcp://my_box:5555", "tcp://[::1]:5555", "tcp://[fe80::1%eth0]:5555",
    "ipc:///tmp/learner", "ipc://@learner",
]  # fmt: skip
ONLY_LISTENING = ["tcp://*:5555", "tcp://127.0.0.1:*", "tcp://*:*", "tcp://127.0.0.1:0", "ipc://*"]
NEITHER = [
    "", "5555", "learner:5555", "tcp://", "tcp://:5555", "tcp://learner", "tcp://learner:",
    "tcp://learner:port", "tcp://learner:65536", "tcp://learner:-1", "tcp://learner:١",
    "tcp://lear ner:5555", " tcp://learner:5555", "tcp://learner:5555\n", "tcp://learner:5555 ",
    "tcp://256.0.0.1:5555", "tcp://10.0.1:5555", "tcp://::1:5555", "tcp://[::1:5555",
    "tcp://[learner]:5555", "tcp://-x:5555", "tcp://a;b:5555", "tcp://user@learner:5555",
    "TCP://learner:5555", "http://learner:5555", "udp://learner:5555", "inproc://learner",
    "ipc://", "ipc:///tmp/a b", "ipc:///" + "x" * 107, "tcp://learner:5555/path",
]  # fmt: skip


@pytest.mark.parametrize("listening", [True, False])
def test_good_endpoints(listening: bool) -> None:
    """What ZeroMQ can listen on, or connect to, passes; ``*`` is for listening only."""
    for endpoint in BOTH + ONLY_LISTENING * listening:
        check_endpoint(endpoint, "flag", listening)


@pytest.mark.parametrize("listening", [True, False])
def test_bad_endpoints(listening: bool) -> None:
    """Anything else is told in one line that names the flag, the value and what is right."""
    for endpoint in NEITHER + ONLY_LISTENING * (not listening):
        with pytest.raises(UsageError, match=r"^flag=.* must ") as error:
            check_endpoint(endpoint, "flag", listening)
        assert repr(endpoint) in one_line(error)


def test_listening_to_others_without_keys() -> None:
    """Without keys only loopback is listened on, unless --insecure says that this is meant."""
    with pytest.raises(UsageError, match=r"--secret_key.*--insecure: anyone who reaches") as error:
        check_listening("tcp://0.0.0.0:5555", has_keys=False, insecure=False)
    one_line(error)
    check_listening("tcp://0.0.0.0:5555", has_keys=True, insecure=False)
    check_listening("tcp://0.0.0.0:5555", has_keys=False, insecure=True)
    check_listening("tcp://127.0.0.1:5555", has_keys=False, insecure=False)


# The command.


def test_command_makes_a_pair_and_says_what_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncagent keys writes a pair named after the machine to keys/, and names the flags."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sockets, "gethostname", lambda: "box")
    assert main([]) == 0
    said = capsys.readouterr().out
    assert load_secret("keys/box.key_secret").public == load_public("keys/box.key")
    for flag in ("--secret_key=keys/box.key_secret", "--allowed_keys=", "--learner_key="):
        assert flag in said
    assert load_secret("keys/box.key_secret").secret.decode() not in said
    with pytest.raises(UsageError, match="exists"):
        main([])
    assert main(["--out=other", "--name=gpu-7"]) == 0
    assert re.search(r"^public key: other/gpu-7\.key$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("arguments", [["--out="], ["--name=a b"], ["--nam=x"], ["x"]])
def test_command_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """Its mistakes are told in one line, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        main(arguments)
    one_line(error)
    assert not list(tmp_path.iterdir())
