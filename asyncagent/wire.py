"""What a learner and its actor hosts say to each other: the headers of their messages.

A message is one small typed header (MessagePack), then parts, which ``formats`` has.  Nothing of it
is believed before it has been compared with what was agreed on.  No pickle; no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta

from asyncagent.errors import WireError
from asyncagent.structs import Episode, Loss

PROTOCOL = 2
"""Hosts of another number are refused."""
MAX_HEADER = 1 << 16
"""Bytes of a header at most, the Welcome's apart."""
MAX_PARTS = 64
"""Frames of a message at most, the header and the sender's address included."""
HOST_NAME = r"\A[A-Za-z0-9_][A-Za-z0-9_.:@+-]{0,63}\Z"
"""Names of hosts stand in logs, on terminals and in TensorBoard's tags."""

Compression: TypeAlias = Literal["none", "lz4", "zstd"]
Inference: TypeAlias = Literal["host", "learner"]
Buffer: TypeAlias = Any
"""bytes, memoryview or a contiguous array."""

_Name = Annotated[str, Meta(pattern=HOST_NAME)]
_Id = Annotated[bytes, Meta(min_length=16, max_length=16)]
_Count = Annotated[int, Meta(ge=0, lt=2**53)]
_Size = Annotated[int, Meta(ge=1, le=4096)]
_Text = Annotated[str, Meta(max_length=500)]
_Seconds = Annotated[float, Meta(ge=0, le=1e9)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Return = Annotated[float, Meta(ge=-1e30, le=1e30)]
"""Any that float32 holds; not nan."""
_Env = Annotated[int, Meta(ge=0, lt=4096)]
_Episodes = Annotated[list[tuple[str, _Return, _Count, _Env, bool]], Meta(max_length=1024)]
_Losses = Annotated[list[tuple[str, int, _Env, _Text]], Meta(max_length=256)]


class _Header(msgspec.Struct, array_like=True, tag=True, forbid_unknown_fields=True):
    """Field by field in order, after the name of the message."""


# From the host.


class Hello(_Header):
    """I want to act for you; said again whenever the host is not sure that it is known."""

    protocol: int
    incarnation: _Id
    """Of this process; random."""
    name: _Name
    inference: Inference
    num_actors: _Size
    num_groups: Annotated[int, Meta(ge=0, le=4096)]
    """0: the learner chooses."""
    num_cores: _Size


class Ping(_Header):
    """Every few seconds: I am here."""

    sent_s: float
    """The host's own clock; comes back with the answer."""
    round_trip_s: _Seconds
    """The last one measured; 0 before the first."""
    reconnects: _Count
    steps: _Share = 0.0
    """Of the time since the last Ping: the environments step; mean over groups, as the next."""
    waits: _Share = 0.0
    """Of that time: waiting for the learner's answer, its weights, or for it to take unrolls."""


class WantWeights(_Header):
    """Send weights newer than these."""

    version: Annotated[int, Meta(ge=-1, lt=2**53)]


class UnrollSent(_Header):
    """One unroll of one group, with what happened meanwhile."""

    incarnation: _Id
    seq: Annotated[int, Meta(ge=1, lt=2**53)]
    """1, 2, ... of this incarnation and session."""
    slot: _Count
    compression: Compression
    acted_frames: _Count
    episodes: _Episodes
    losses: _Losses


class RowSent(_Header):
    """One row of one group: the answer is an Act."""

    slot: _Count
    number: _Count
    """0, 1, ... of this group."""
    compression: Compression
    episodes: _Episodes
    losses: _Losses


class Bye(_Header):
    """I leave."""


# From the learner.


class Group(msgspec.Struct, array_like=True, frozen=True):
    """One group of environments that a host is to run."""

    slot: int
    """Number of the group in the whole run."""
    level_name: str
    num_envs: int
    first_env_index: int


class Welcome(_Header):
    """All that a host needs; also the answer to a repeated Hello."""

    protocol: int
    session: _Id
    config: str
    """The run's configuration, JSON, without the learner's own files."""
    spec: str
    """The environment's, JSON."""
    num_weights: int
    """Numbers in a WeightsSent; 0 where the learner infers."""
    groups: list[Group]
    seed: int
    """Of the environments."""
    received: int
    """The last unroll that need not be sent again."""
    credits: int
    """Unrolls that may be on their way without having been accepted."""
    version: int
    """Updates until now."""


class Refused(_Header):
    """The host's request cannot be met."""

    reason: _Text
    for_good: bool
    """Asking again will not help."""


class Unknown(_Header):
    """I do not know you (any more): say Hello."""


class Pong(_Header):
    """The answer to a Ping."""

    sent_s: float
    accepted: int
    version: int


class Accepted(_Header):
    """All unrolls up to this one were taken."""

    accepted: int
    version: int


class WeightsSent(_Header):
    """One part: all weights, one after the other."""

    version: int
    precision: Literal["float32", "bfloat16"]


class Act(_Header):
    """One part: the action [E, ...] for row ``number`` of a group."""

    slot: int
    number: int


class Ended(_Header):
    """The run is complete: there is nothing left to act for."""


FromHost: TypeAlias = Hello | Ping | WantWeights | UnrollSent | RowSent | Bye
FromLearner: TypeAlias = Welcome | Refused | Unknown | Pong | Accepted | WeightsSent | Act | Ended

_encoder = msgspec.msgpack.Encoder()
_from_host = msgspec.msgpack.Decoder(FromHost)
_from_learner = msgspec.msgpack.Decoder(FromLearner)


def encode_header(header: FromHost | FromLearner) -> bytes:
    """The first part of a message."""
    return _encoder.encode(header)


def read_from_host(header: Buffer) -> FromHost:
    """The header; WireError for anything else."""
    if len(header) > MAX_HEADER:
        raise WireError(f"a header of {len(header)} bytes is longer than {MAX_HEADER}")
    try:
        found: FromHost = _from_host.decode(header)
        return found
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WireError(f"no header: {_printable(str(error)[:200])}") from None


def read_from_learner(header: Buffer) -> FromLearner:
    """The header; WireError for anything else."""
    try:
        found: FromLearner = _from_learner.decode(header)
        return found
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WireError(f"no header: {_printable(str(error)[:200])}") from None


def episodes_to_wire(episodes: Sequence[Episode]) -> list[tuple[str, float, int, int, bool]]:
    """As headers carry them: of more than fit, the last; not those whose return is no number."""
    told = [tuple(episode) for episode in episodes if abs(episode.episode_return) <= 1e30]
    return _last_that_fit(told, 1024, MAX_HEADER // 2)


def losses_to_wire(losses: Sequence[Loss]) -> list[tuple[str, int, int, str]]:
    """As headers carry them: of more than fit, the last; reasons are cut off."""
    told = [(*loss[:3], loss.reason[:120]) for loss in losses[-256:]]
    return _last_that_fit(told, 256, MAX_HEADER // 4)


def _last_that_fit(values: list[Any], most: int, num_bytes: int) -> list[Any]:
    """So many of the last values that MessagePack needs ``num_bytes`` at most for them."""
    kept = values[-most:]
    sizes = np.cumsum([len(_encoder.encode(value)) for value in reversed(kept)])
    count = int(np.searchsorted(sizes, num_bytes, side="right"))
    return kept[len(kept) - count :]


def happened(header: UnrollSent | RowSent) -> tuple[tuple[Episode, ...], tuple[Loss, ...]]:
    """The games that ended and the environments that were lost; reasons are one line each."""
    return (
        tuple(Episode(*episode) for episode in header.episodes),
        tuple(Loss(*loss[:3], _printable(loss[3])) for loss in header.losses),
    )


def check_happened(header: UnrollSent | RowSent, level_name: str, num_envs: int) -> None:
    """WireError unless all that happened did so in a group of that level and size."""
    for level, _, _, env_index, _ in header.episodes:
        if level != level_name or env_index >= num_envs:
            raise WireError("a game of another group's")
    for level, _, env_index, _ in header.losses:
        if level != level_name or env_index >= num_envs:
            raise WireError("a lost environment of another group's")


def _printable(text: str) -> str:
    """On one line of a log, and nothing that a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
