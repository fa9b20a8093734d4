"""Who may connect: CURVE key pairs, the set of allowed keys, and the gate that asks it.

Keys are z85 text as bytes, 40 of them, as ZeroMQ has them in sockets, files and user ids. Files
are ZPL certificates, as those of ``zmq.auth`` and CZMQ. ZeroMQ asks for a peer's key once, at the
handshake: whoever serves connections also checks ``sender(frame) in allowed`` for every message,
or a revoked peer goes on for as long as it stays connected.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import re
import stat
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils import z85

from asyncagent.errors import UsageError

_log = logging.getLogger(__name__)
_quiet_log = logging.getLogger(f"{__name__}.zap")
_quiet_log.setLevel(logging.WARNING)

_MAX_FILE_BYTES = 65536
_YOUNG_NS = 2_000_000_000
"""A file written so shortly before it was read may change again within one tick of its times."""
_DOMAIN = b"*"
"""Any domain, enforced, makes ZeroMQ refuse everybody while no gate answers; else it admits all."""
_MAX_LINES_PER_MINUTE = 10
_REMEMBERED = 100
_NO_KEY = b""
_OUR_OWN_TROUBLE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}
"""Says nothing of the keys: what was last read of them still holds."""
_KEY_LINE = re.compile(
    r"""^[ \t]*(public|secret)-key[ \t]*=[ \t]*["']?([^"'\s]*)["']?[ \t\r]*$""", re.M
)


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair, each half 40 bytes of z85; the secret one is not shown."""

    public: bytes
    secret: bytes = field(repr=False)

    def serve(self, socket: zmq.Socket[Any]) -> None:
        """Make ``socket``, before it binds, speak only to clients that a started Gate lets in."""
        socket.curve_server = True
        socket.curve_secretkey = self.secret
        socket.zap_domain, socket.zap_enforce_domain = _DOMAIN, True

    def connect(self, socket: zmq.Socket[Any], server: bytes) -> None:
        """Make ``socket``, before it connects, speak only to the owner of the key ``server``."""
        socket.curve_publickey, socket.curve_secretkey = self.public, self.secret
        socket.curve_serverkey = server


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Write a new pair: NAME.key, to be given away, and NAME.key_secret, for its owner only.

    Returns both paths. UsageError for a bad name, a folder that cannot be written to, and where
    one of the files exists: a key that somebody uses is never overwritten.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UsageError(
            f"name={name!r} must be 1 to 100 of letters, digits, '.', '_' and '-', "
            "of which the first is a letter or a digit"
        )
    _need_curve()
    public, secret = zmq.curve_keypair()
    mine = f'public-key = "{public.decode()}"\n    secret-key = "{secret.decode()}"'
    texts = {
        folder / f"{name}.key_secret": (f"# Secret: stays with its owner.\ncurve\n    {mine}\n"),
        folder / f"{name}.key": f"# Public: for the peers.\ncurve\n    {mine.splitlines()[0]}\n",
    }
    written: list[Path] = []
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, mode in zip(texts, (0o600, 0o644), strict=True):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with os.fdopen(os.open(path, flags, mode), "w") as file:
                written.append(path)
                file.write(texts[path])
    except OSError as error:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink()
        if isinstance(error, FileExistsError) and folder.is_dir():
            raise UsageError(
                f"{str(error.filename)!r} exists: take another name or folder"
            ) from None
        raise UsageError(f"cannot write keys to {str(folder)!r}: {error.strerror}") from None
    return folder / f"{name}.key", folder / f"{name}.key_secret"


def load_secret(path: str | Path) -> KeyPair:
    """The pair of a NAME.key_secret file.

    UsageError, one line, if it is missing, unreadable, malformed, public, or if others than its
    owner may read or write it.
    """
    _need_curve()
    keys = _read_keys(Path(path), secret=True)
    if "secret" not in keys:
        raise UsageError(
            f"{str(path)!r} holds a public key only: give the secret one, NAME.key_secret"
        )
    pair = KeyPair(keys["public"], keys["secret"])
    if zmq.curve_public(pair.secret) != pair.public:
        raise UsageError(f"{str(path)!r} is malformed: its two keys are not a pair")
    return pair


def load_public(path: str | Path) -> bytes:
    """The key of a NAME.key file.

    UsageError, one line, if it is missing, unreadable, malformed, or secret.
    """
    keys = _read_keys(Path(path), secret=False)
    if "secret" in keys:
        raise UsageError(f"{str(path)!r} holds a secret key: give the public one, NAME.key")
    return keys["public"]


def _need_curve() -> None:
    if not zmq.has("curve"):
        raise UsageError("this ZeroMQ was built without CURVE: install pyzmq's own wheel")


def _read_keys(path: Path, *, secret: bool) -> dict[str, bytes]:
    """``public`` and, where the file has one, ``secret``; ``secret``: it should have."""
    kind = "secret" if secret else "public"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise UsageError(f"{str(path)!r} is not a file: give that of a {kind} key")
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"cannot read the {kind} key {str(path)!r}: {error.strerror}; "
            "asyncagent keys makes a pair"
        ) from error
    found = _KEY_LINE.findall(data.decode("ascii", "replace"))
    keys = {which: text.encode() for which, text in found if _is_key(text)}
    if len(data) > _MAX_FILE_BYTES or len(keys) != len(found) or "public" not in keys:
        raise UsageError(f"{str(path)!r} is malformed: it is no {kind} key of asyncagent keys")
    if secret and "secret" in keys and mode & 0o077:
        raise UsageError(
            f"{str(path)!r} is open to others (mode {stat.S_IMODE(mode):04o}): "
            f"chmod 600 {str(path)!r}"
        )
    return keys


def _is_key(text: str) -> bool:
    try:
        return len(text) == 40 and len(z85.decode(text)) == 32
    except Exception:  # what z85 raises for a wrong character or group is nowhere stated
        return False


class Changes(NamedTuple):
    """What a refresh found, key -> name; a key whose file was only renamed is in neither."""

    added: Mapping[bytes, str]
    removed: Mapping[bytes, str]


class _Entry(NamedTuple):
    """What one *.key file held when it was last read."""

    stamp: tuple[int, ...]
    young: bool
    key: bytes | None
    problem: str


class AllowedKeys:
    """The public keys of a folder's *.key files; nobody's while it cannot be read.

    ``refresh`` is what reads; it may run on another thread than the questions, if only on one.
    """

    def __init__(self, folder: Path, now_ns: Callable[[], int] = time.time_ns) -> None:
        """UsageError if there is no such folder; ``now_ns``: as the times of files, for tests."""
        if not folder.is_dir():
            raise UsageError(f"there is no folder {str(folder)!r} with the hosts' *.key files")
        self._folder = folder
        self._now_ns = now_ns
        self._entries: dict[str, _Entry] = {}
        self._names: dict[bytes, str] = {}
        self._problem = ""
        self.refresh()

    def __contains__(self, key: object) -> bool:
        return key in self._names

    def __len__(self) -> int:
        return len(self._names)

    def name_of(self, key: bytes) -> str:
        """The name of the file, less ``.key``, that allows ``key``; KeyError if none does."""
        return self._names[key]

    def refresh(self) -> Changes:
        """Look at the folder, read what is new in it, and say whose right came or went.

        One listing and a ``stat`` per file, if nothing changed. Malformed files allow nobody and
        are reported once, as is a folder that cannot be listed.
        """
        before = self._names
        self._entries = entries = self._look()
        names = {
            entry.key: name.removesuffix(".key")
            for name, entry in sorted(entries.items(), reverse=True)
            if entry.key is not None
        }
        self._names = names  # in one assignment, for those who ask from another thread
        return Changes(
            {key: name for key, name in names.items() if key not in before},
            {key: name for key, name in before.items() if key not in names},
        )

    def _look(self) -> dict[str, _Entry]:
        now, entries, problem = self._now_ns(), {}, ""
        try:
            with os.scandir(self._folder) as listing:
                for file in listing:
                    if file.name.endswith(".key"):
                        with contextlib.suppress(FileNotFoundError):  # gone since the listing
                            entries[file.name] = self._entry(file.name, file.stat(), now)
        except OSError as error:
            problem = f"{error.strerror}"
            entries = self._entries if error.errno in _OUR_OWN_TROUBLE else {}
        if problem and problem != self._problem:
            who = "only those allowed before are" if entries else "nobody is"
            _log.warning("%s allowed to connect: %s: %s", who, self._folder, problem)
        self._problem = problem
        return entries

    def _entry(self, name: str, status: os.stat_result, now: int) -> _Entry:
        changed_ns = max(status.st_mtime_ns, status.st_ctime_ns)
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        last = self._entries.get(name)
        if last is not None and last.stamp == stamp and not last.young:
            return last
        key, problem = None, ""
        try:
            key = load_public(self._folder / name)
        except UsageError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in _OUR_OWN_TROUBLE and last is not None:
                return last._replace(young=True)
            problem = str(error)
        if problem and (last is None or problem != last.problem):
            _log.warning("skipped an allowed key: %s", problem)
        return _Entry(stamp, now < changed_ns + _YOUNG_NS, key, problem)


class Gate:
    """Answers a context's sockets, ZeroMQ's ZAP, whether a client's key is allowed.

    A client's key becomes the ``User-Id`` of all its messages. Clients without a key, or that
    take the server for another, fail before ZeroMQ asks: ``watch`` counts them.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        allowed: AllowedKeys,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``clock``: seconds, for how often a refusal is logged."""
        self.refused = 0
        """Handshakes since the start that the key, or what else was shown, did not open."""
        self._context = context
        self._allowed = allowed
        self._clock = clock
        self._told: deque[bytes] = deque(maxlen=_REMEMBERED)
        self._lines: deque[float] = deque(maxlen=_MAX_LINES_PER_MINUTE)
        self._authenticator: AsyncioAuthenticator | None = None

    def start(self) -> None:
        """Begin to answer, on the running event loop; before any socket of the context binds."""
        if self._authenticator is None:
            authenticator = AsyncioAuthenticator(self._context, log=_quiet_log)
            authenticator.configure_curve_callback(_DOMAIN.decode(), self)
            before = asyncio.all_tasks()
            authenticator.start()
            (self._answering,) = asyncio.all_tasks() - before
            self._authenticator = authenticator

    def stop(self) -> None:
        """Answer no more, so that no new connection is let in; twice is harmless."""
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None

    async def answer(self) -> None:
        """Raise, as nobody else would, what ends the answering."""
        await asyncio.wait({self._answering})
        await self._answering

    async def watch(self, failures: zmq.asyncio.Socket) -> None:
        """Count, for ever, what ``failures_of`` a socket tells."""
        while True:
            await failures.recv_multipart()
            self.refused += 1
            self._tell(_NO_KEY, "it showed no key, or takes this learner for another")

    def callback(self, domain: str, key: bytes) -> bool:
        """ZAP's question: may the client that has proved to own ``key`` connect?"""
        if key in self._allowed:
            return True
        self.refused += 1
        self._tell(key, f"its key, {key.decode()}, is not allowed")
        return False

    def _tell(self, key: bytes, why: str) -> None:
        """Once per key, of the last ones; never so often that a stranger fills the log."""
        now = self._clock()
        often = len(self._lines) == _MAX_LINES_PER_MINUTE and now < self._lines[0] + 60
        if key in self._told or often:
            return
        self._told.append(key)
        self._lines.append(now)
        _log.warning("refused an actor host: %s", why)


def failures_of(socket: zmq.asyncio.Socket) -> zmq.asyncio.Socket:
    """Where ``socket``, before it binds, is made to tell of handshakes that never come to a key."""
    return socket.get_monitor_socket(
        zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    )


def sender(frame: zmq.Frame) -> bytes:
    """The public key of the client that sent a received frame; b"" if it showed none.

    To be believed only on a socket that ``KeyPair.serve`` has prepared: elsewhere a client may
    call itself what it likes.
    """
    try:
        return str(frame.get("User-Id")).encode()
    except zmq.ZMQError:
        return b""


def is_loopback(endpoint: str) -> bool:
    """Whether only processes of this machine can reach ``endpoint``."""
    transport, _, address = endpoint.partition("://")
    host = address.rpartition(":")[0]
    if transport != "tcp" or host == "localhost":
        return transport in ("tcp", "ipc", "inproc")
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def check_endpoint(endpoint: str, flag: str, listening: bool) -> None:
    """UsageError, one line, for what is no tcp://HOST:PORT and no ipc://PATH.

    ``flag`` is named in it; ``listening``: ``*`` for all interfaces, and for a free port, will do.
    """
    transport, _, address = endpoint.partition("://")
    if re.search(r"[\s\0]", endpoint):
        raise UsageError(f"{flag}={endpoint!r} must have no spaces in it")
    if transport == "ipc":
        if 0 < len(os.fsencode(address)) <= 107 and (listening or address != "*"):
            return
        raise UsageError(f"{flag}={endpoint!r} must name a path of 1 to 107 bytes after ipc://")
    host, colon, port = address.rpartition(":")
    free = listening and port in ("*", "0")
    if transport != "tcp" or not colon or not (_is_host(host) or (listening and host == "*")):
        example = "tcp://0.0.0.0:5555" if listening else "tcp://learner:5555"
        raise UsageError(
            f"{flag}={endpoint!r} must be tcp://HOST:PORT, as {example} "
            "(an IPv6 address in brackets), or ipc://PATH"
        )
    if not free and not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise UsageError(f"{flag}={endpoint!r}: port {port!r} must be a number from 1 to 65535")


def _is_host(host: str) -> bool:
    try:
        if host.startswith("["):
            return host.endswith("]") and ipaddress.IPv6Address(host[1:-1]) is not None
        if re.fullmatch(r"[0-9.]*", host):
            return ipaddress.IPv4Address(host) is not None
    except ValueError:
        return False
    return re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?", host) is not None


def check_listening(endpoint: str, has_keys: bool, insecure: bool) -> None:
    """UsageError if other machines could reach ``endpoint`` and nothing keeps strangers out."""
    if not (has_keys or insecure or is_loopback(endpoint)):
        raise UsageError(
            f"listen={endpoint!r} is open to other machines: give --secret_key and "
            "--allowed_keys (asyncagent keys makes keys), or --insecure: anyone who reaches the "
            "port can then send this learner data and read its weights"
        )
