"""The wire format: what is sent arrives as it was; what cannot be is a WireError of one line."""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections.abc import Sequence
from typing import Any, get_args

import lz4.block  # type: ignore[import-untyped]
import msgspec
import numpy as np
import optree
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncagent import formats, wire
from asyncagent.errors import UsageError, WireError
from asyncagent.formats import LARGEST, RowFormat, UnrollFormat
from asyncagent.structs import (
    ArraySpec,
    Box,
    Discrete,
    EnvSpec,
    Episode,
    Loss,
    Nest,
    Unroll,
    map_nest,
)
from asyncagent.unroll import empty_unroll
from asyncagent.wire import (
    MAX_HEADER,
    Bye,
    Compression,
    Hello,
    Ping,
    RowSent,
    UnrollSent,
    WantWeights,
)
from tests.wire_samples import SPECS, blank, rows_of, same, state_of, unroll_of

T, E = 5, 3
INCARNATION = bytes(range(16))
COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)


def received(parts: Sequence[Any]) -> list[memoryview]:
    """As they come out of a socket: bytes at odd addresses."""
    return [
        memoryview(b"x" + bytes(memoryview(part).cast("B") if memoryview(part).nbytes else b""))[1:]
        for part in parts
    ]


def sample(name: str = "mixed", lstm: bool = True, seed: int = 0) -> tuple[UnrollFormat, Unroll]:
    spec, state = SPECS[name], state_of(E, lstm)
    unroll = unroll_of(spec, T, E, state, np.random.default_rng(seed), version=7)
    return UnrollFormat(spec, T, E, state), unroll


# Unrolls.


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("lstm", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_unrolls_arrive_as_they_were(name: str, lstm: bool, compression: Compression) -> None:
    """Every field of every kind of environment and action space, in every compression."""
    for seed in range(3):
        format_, unroll = sample(name, lstm, seed)
        parts = received(format_.encode(unroll, compression))
        assert max(map(len, parts)) <= format_.max_part_bytes
        out = blank(unroll)
        format_.decode(parts, out, 7, compression)
        assert same(out, unroll)


def test_plain_arrays_are_sent_themselves() -> None:
    """Without compression an observation that is no stack is not copied to be sent."""
    format_, unroll = sample()
    parts = [np.frombuffer(part, np.uint8) for part in format_.encode(unroll)]
    for name in ("frame", "measurements", "sentence", "switch"):
        sharing = [part for part in parts if np.shares_memory(part, unroll.observation[name])]
        assert [part.nbytes for part in sharing] == [unroll.observation[name].nbytes]


def test_views_are_sent_as_what_they_show() -> None:
    """An unroll of strided views, say of some columns of a larger one, arrives as its copy."""
    spec = SPECS["mixed"]
    large = unroll_of(spec, T, 2 * E, state_of(2 * E, True), np.random.default_rng(0))
    rows = map_nest(lambda leaf: leaf[:, ::2], large._replace(core_state=()))
    view = rows._replace(core_state=map_nest(lambda leaf: leaf[::2], large.core_state))
    format_ = UnrollFormat(spec, T, E, state_of(E, True))
    for compression in COMPRESSIONS:
        out = empty_unroll(T, E, spec, state_of(E, True))
        format_.decode(received(format_.encode(view, compression)), out, 0, compression)
        assert same(out, view)


def test_decoding_writes_to_the_given_unroll_only() -> None:
    """The unroll's own arrays are written to, those beside them are not, and no part is kept."""
    format_, unroll = sample()
    beside = map_nest(
        lambda leaf: np.full((leaf.shape[0] + 2, *leaf.shape[1:]), 1, leaf.dtype), unroll
    )
    out = map_nest(lambda leaf: leaf[1:-1], beside)
    parts = [bytearray(part) for part in received(format_.encode(unroll))]
    format_.decode(parts, out, 7)
    for part in parts:
        part[:] = bytes(len(part))
    assert same(out, unroll)
    for leaf in optree.tree_leaves(beside):
        assert (leaf[[0, -1]] == 1).all()


def test_bytes_of_an_unroll() -> None:
    """Of stacks of four a quarter travels, and what opens an episode; fields are padded to 8."""
    spec, length, envs = SPECS["pixels"], 20, 8
    unroll = unroll_of(spec, length, envs, (), np.random.default_rng(0))
    for t in range(1, length + 1):
        unroll.observation[t, :, :-1] = unroll.observation[t - 1, :, 1:]
    parts = UnrollFormat(spec, length, envs, ()).encode(unroll)
    small, newest, older = (memoryview(part).nbytes for part in parts)
    assert newest == unroll.observation.nbytes // 4
    assert older == envs * 3 * 16 * 16
    rows, steps = (length + 1) * envs, length * envs
    assert small <= rows * (4 + 3 + 8 + 1) + steps * (8 + 5 * 4 + 8 + 1) + 10 * 8


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_no_part_is_larger_than_announced(compression: Compression) -> None:
    """Noise, whole rows throughout and constants: no part exceeds max_part_bytes."""
    for name, spec in SPECS.items():
        format_, unroll = sample(name)
        rng = np.random.default_rng(0)
        raw = [rng.bytes(leaf.nbytes) for leaf in optree.tree_leaves(unroll.observation)]
        for leaf, noise in zip(optree.tree_leaves(unroll.observation), raw, strict=True):
            leaf.reshape(-1).view(np.uint8)[:] = np.frombuffer(noise, np.uint8)
        parts = format_.encode(unroll, compression)
        assert max(memoryview(part).nbytes for part in parts) <= format_.max_part_bytes
        row = rows_of(spec, 1, E, rng)[0]
        rows = RowFormat(spec, E)
        parts = rows.encode(row, None, compression)
        assert max(memoryview(part).nbytes for part in parts) <= rows.max_part_bytes


def test_one_environment_one_step() -> None:
    """The smallest unroll there is, with an observation of no numbers at all beside another."""
    spec = EnvSpec(
        {"none": ArraySpec((0,), "float32"), "one": ArraySpec((), "float32")}, Discrete(1), 1
    )
    unroll = unroll_of(spec, 1, 1, (), np.random.default_rng(0))
    for compression in COMPRESSIONS:
        format_ = UnrollFormat(spec, 1, 1, ())
        out = blank(unroll)
        format_.decode(received(format_.encode(unroll, compression)), out, 0, compression)
        assert same(out, unroll)


def test_no_observation() -> None:
    """An observation without arrays has a format, too."""
    format_ = UnrollFormat(EnvSpec((), Discrete(2), 1), 1, 1, ())
    unroll = unroll_of(EnvSpec((), Discrete(2), 1), 1, 1, (), np.random.default_rng(0))
    assert len(format_.encode(unroll)) == 1


def test_too_many_arrays() -> None:
    """An observation that no message could carry is refused before anything is sent."""
    leaves = {f"{i}": ArraySpec((), "float32") for i in range(62)}
    with pytest.raises(UsageError, match=r"^an observation of 62 arrays does not fit a message"):
        UnrollFormat(EnvSpec(leaves, Discrete(2), 1), 1, 1, ())
    del leaves["0"]
    UnrollFormat(EnvSpec(leaves, Discrete(2), 1), 1, 1, ())


# Rows.


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", SPECS)
def test_rows_arrive_as_they_were(name: str, compression: Compression) -> None:
    """Rows in turn, each told from the row before it; episodes and losses are the header's."""
    spec = SPECS[name]
    format_ = RowFormat(spec, E)
    before_there: Nest = None
    before_here: Nest = None
    for row in rows_of(spec, 6, E, np.random.default_rng(1)):
        parts = received(format_.encode(row, before_there, compression))
        out = blank(row.observation)
        found = format_.decode(parts, out, before_here, compression)
        assert found.observation is out
        assert same(found, row)
        assert not any(np.shares_memory(found.reward, np.frombuffer(p, np.uint8)) for p in parts)
        before_there, before_here = row.observation, out


def test_a_row_that_follows_travels_as_its_newest_frame() -> None:
    """A true stack's row is one frame; its first row is all of them."""
    spec = SPECS["pixels"]
    one, other = rows_of(spec, 2, E, np.random.default_rng(1))
    other.observation[:, :-1] = one.observation[:, 1:]
    format_ = RowFormat(spec, E)
    sizes = [
        [memoryview(part).nbytes for part in format_.encode(row, before, "none")[1:]]
        for row, before in ((one, None), (other, one.observation))
    ]
    assert sizes == [[E * 256, E * 3 * 256], [E * 256, 0]]


# What is refused.


def small_part(format_: UnrollFormat, unroll: Unroll, **fields: Any) -> list[Any]:
    """Parts of ``unroll`` with other values, written past the encoder's own checks."""
    changed = map_nest(np.copy, unroll)
    for name, (place, value) in fields.items():
        getattr(changed, name)[place] = value
    return format_.encode(changed)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("mixed", "reward", math.nan, "reward is not finite, or beyond 1e+10"),
        ("mixed", "reward", math.inf, "reward is not finite, or beyond 1e+10"),
        ("mixed", "reward", -2e10, "reward is not finite, or beyond 1e+10"),
        ("mixed", "behaviour_logits", -math.inf, "behaviour_logits is not finite, or beyond 1e+10"),
        ("mixed", "behaviour_logits", 3e38, "behaviour_logits is not finite, or beyond 1e+10"),
        ("mixed", "policy_version", 8, "policy_version outside [0, 7]"),
        ("mixed", "policy_version", -1, "policy_version outside [0, 7]"),
        ("mixed", "policy_version", -(2**63), "policy_version outside [0, 7]"),
        ("mixed", "action", (3, 0, 0), "action is outside of the action space MultiDiscrete(sizes=(3, 2, 4))"),  # noqa: E501
        ("mixed", "last_action", (0, 0, -1), "last_action is outside of the action space MultiDiscrete(sizes=(3, 2, 4))"),  # noqa: E501
        ("pixels", "action", 5, "action is outside of the action space Discrete(num_actions=5)"),
        ("pixels", "last_action", -(2**63), "last_action is outside of the action space Discrete(num_actions=5)"),  # noqa: E501
        ("vector", "action", math.nan, "action is not finite, or beyond 1e+10"),
        ("vector", "last_action", -math.inf, "last_action is not finite, or beyond 1e+10"),
        ("vector", "action", 1e30, "action is not finite, or beyond 1e+10"),
    ],
)  # fmt: skip
def test_impossible_values(name: str, field: str, value: Any, message: str) -> None:
    """One impossible number among good ones: refused in one line, before anything is written."""
    format_, unroll = sample(name)
    parts = small_part(format_, unroll, **{field: ((2, 1), value)})
    out = blank(unroll)
    with pytest.raises(WireError) as error:
        format_.decode(parts, out, 7)
    assert str(error.value) == message
    assert same(out, blank(unroll))


def test_a_core_state_that_is_no_number() -> None:
    """The recurrent state is checked like the rest, and nothing is written before."""
    format_, unroll = sample()
    unroll.core_state[1][0][2, 1] = math.nan
    out = blank(unroll)
    with pytest.raises(WireError, match=r"^core_state is not finite, or beyond 1e\+10$"):
        format_.decode(format_.encode(unroll), out, 7)
    assert same(out, blank(unroll))


def test_an_end_of_both_kinds() -> None:
    """No step both terminates and truncates an episode, in unrolls and in rows."""
    format_, unroll = sample()
    unroll.terminated[3, 1] = unroll.truncated[3, 1] = True
    with pytest.raises(WireError, match=r"^an episode both terminated and truncated$"):
        format_.decode(format_.encode(unroll), blank(unroll), 7)
    row = rows_of(SPECS["vector"], 1, E, np.random.default_rng(0))[0]
    row.terminated[0] = row.truncated[0] = True
    rows = RowFormat(SPECS["vector"], E)
    with pytest.raises(WireError, match=r"^an episode both terminated and truncated$"):
        rows.decode(rows.encode(row, None, "none"), blank(row.observation), None, "none")


def test_a_rows_reward_that_is_no_number() -> None:
    """A row's reward is checked like an unroll's."""
    row = rows_of(SPECS["vector"], 1, E, np.random.default_rng(0))[0]
    row.reward[0] = math.nan
    rows = RowFormat(SPECS["vector"], E)
    with pytest.raises(WireError, match=r"^reward is not finite, or beyond 1e\+10$"):
        rows.decode(rows.encode(row, None, "none"), blank(row.observation), None, "none")


@pytest.mark.parametrize(
    ("leaf", "value", "message"),
    [
        ("measurements", math.nan, "observation is not finite, or beyond 1e+10"),
        ("measurements", -3e38, "observation is not finite, or beyond 1e+10"),
        ("sentence", 10, "a sentence has tokens outside [0, 9]"),
        ("sentence", -1, "a sentence has tokens outside [0, 9]"),
    ],
)
def test_impossible_observations(leaf: str, value: Any, message: str) -> None:
    """Measurements are numbers and sentences are of known words."""
    format_, unroll = sample()
    unroll.observation[leaf][T, 0, 0] = value
    with pytest.raises(WireError) as error:
        format_.decode(format_.encode(unroll), blank(unroll), 7)
    assert str(error.value) == message


def test_flags_are_flags() -> None:
    """A byte that is neither 0 nor 1 where a flag belongs would be both later on."""
    format_, unroll = sample()
    together = bytearray(format_.encode(unroll)[0])
    rows = (T + 1) * E
    start = (4 * rows + 7) & ~7  # the rewards come first, then terminated
    assert bytes(together[start : start + rows]) == unroll.terminated.tobytes()
    together[start] = 2
    with pytest.raises(WireError, match=r"^terminated has values that are no flags$"):
        format_.decode([together, *format_.encode(unroll)[1:]], blank(unroll), 7)
    parts = [bytearray(part) for part in received(format_.encode(unroll))]
    parts[-1][0] = 255
    with pytest.raises(WireError, match=r"^a flag is neither 0 nor 1$"):
        format_.decode(parts, blank(unroll), 7)


def test_a_first_row_is_whole() -> None:
    """Nothing comes before an unroll's first row: it cannot be told from the one before."""
    format_, unroll = sample("pixels")
    parts = [bytearray(part) for part in received(format_.encode(unroll))]
    start = len(parts[0]) - (((T + 1) * E + 7) & ~7)
    assert parts[0][start : start + E] == b"\1\1\1"
    parts[0][start] = 0
    parts[2] = parts[2][: -3 * 256]  # as many older frames as flags say
    with pytest.raises(WireError, match=r"^a first row is not whole$"):
        format_.decode(parts, blank(unroll), 7)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_other_sizes(compression: Compression) -> None:
    """Parts that are missing, added, cut off or longer are refused, whichever they are."""
    format_, unroll = sample()
    parts = received(format_.encode(unroll, compression))
    with pytest.raises(WireError, match=rf"^{len(parts) - 1} parts instead of {len(parts)}$"):
        format_.decode(parts[:-1], blank(unroll), 7, compression)
    with pytest.raises(WireError, match=rf"^{len(parts) + 1} parts instead of {len(parts)}$"):
        format_.decode([*parts, parts[0]], blank(unroll), 7, compression)
    with pytest.raises(WireError, match=rf"^0 parts instead of {len(parts)}$"):
        format_.decode([], blank(unroll), 7, compression)
    with pytest.raises(WireError, match=r"^small arrays of \d+ bytes, not \d+$"):
        format_.decode([bytes(parts[0])[:-1], *parts[1:]], blank(unroll), 7, compression)
    for place in range(1, len(parts)):
        for wrong in (b"", bytes(parts[place])[:-1], bytes(parts[place]) + b"\0"):
            if wrong == bytes(parts[place]):
                continue
            broken = [*parts[:place], wrong, *parts[place + 1 :]]
            with pytest.raises(WireError) as error:
                format_.decode(broken, blank(unroll), 7, compression)
            assert "\n" not in str(error.value)


def test_more_older_frames_than_flags() -> None:
    """The number of older frames is that of the flags, or the message is refused."""
    format_, unroll = sample("pixels")
    parts = received(format_.encode(unroll))
    message = r"^an array of \d+ bytes instead of \d+ for uint8 \(\d+, 3, 16, 16\)$"
    for older in (bytes(parts[2]) + bytes(3 * 256), bytes(parts[2])[: -3 * 256]):
        with pytest.raises(WireError, match=message):
            format_.decode([*parts[:2], older], blank(unroll), 7)


def peak_of(function: Any, *args: Any) -> int:
    """Bytes at most that Python allocated meanwhile."""
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            function(*args)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_bombs(compression: Compression) -> None:
    """A part that would expand to far more than was agreed on is refused, not expanded."""
    format_, unroll = sample("vector")
    parts = received(format_.encode(unroll, compression))
    bomb = (
        lz4.block.compress(bytes(50_000_000), store_size=False)
        if compression == "lz4"
        else zstandard.ZstdCompressor(level=1).compress(bytes(50_000_000))
    )
    assert len(bomb) < 300_000
    peak = peak_of(format_.decode, [parts[0], bomb], blank(unroll), 7, compression)
    assert peak < 1_000_000


def test_a_zstd_frame_may_not_ask_for_a_window() -> None:
    """A frame that claims the right size but a huge window, or says no size, is refused."""
    format_, unroll = sample("vector")
    size = unroll.observation.nbytes
    parts = received(format_.encode(unroll, "zstd"))
    magic = b"\x28\xb5\x2f\xfd"
    window = bytes([0xC0, (27 - 10) << 3]) + struct.pack("<Q", size)
    assert zstandard.get_frame_parameters(magic + window).window_size == 1 << 27
    wide = magic + window
    sizeless = zstandard.ZstdCompressor(write_content_size=False).compress(unroll.observation.data)
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    with pytest.raises(WireError, match=r"too much memory"):
        format_.decode([parts[0], wide], blank(unroll), 7, "zstd")
    for part in (sizeless, skipped, b"", b"\0" * 100):
        with pytest.raises(
            WireError, match=r"^a compressed array (cannot be expanded: |is not of)"
        ):
            format_.decode([parts[0], part], blank(unroll), 7, "zstd")


def test_large_arrays_survive_zstd() -> None:
    """What we compress never needs a larger window than we allow."""
    spec = EnvSpec(ArraySpec((400, 400, 3), "uint8"), Discrete(2), 1)
    unroll = unroll_of(spec, 4, 2, (), np.random.default_rng(0))
    format_, out = UnrollFormat(spec, 4, 2, ()), blank(unroll)
    assert unroll.observation.nbytes > 1 << 22
    format_.decode(received(format_.encode(unroll, "zstd")), out, 0, "zstd")
    assert same(out, unroll)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_any_garbage_is_a_wire_error_or_an_unroll(data: st.DataObject) -> None:
    """Changed bytes lead to a WireError of one line or to an unroll that breaks no rule."""
    name = data.draw(st.sampled_from(sorted(SPECS)))
    compression: Compression = data.draw(st.sampled_from(COMPRESSIONS))
    format_, unroll = sample(name)
    parts = [bytearray(part) for part in received(format_.encode(unroll, compression))]
    for _ in range(data.draw(st.integers(1, 4))):
        part = data.draw(st.sampled_from(parts))
        if part:
            part[data.draw(st.integers(0, len(part) - 1))] = data.draw(st.integers(0, 255))
    out = blank(unroll)
    try:
        format_.decode(parts, out, 7, compression)
    except WireError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
    else:
        for leaf in optree.tree_leaves(out):
            if leaf.dtype.kind == "f":
                assert (np.abs(leaf) <= LARGEST).all()
            if leaf.dtype == np.bool_:
                assert leaf.view(np.uint8).max() <= 1
        formats.check_actions("action", out.action, SPECS[name].actions)
    out = blank(unroll)
    format_.decode(received(format_.encode(unroll, compression)), out, 7, compression)
    assert same(out, unroll)


# Actions.


@pytest.mark.parametrize("name", SPECS)
def test_actions_arrive_as_they_were(name: str) -> None:
    """An action of every space there and back; what is none of the space's is refused."""
    space = SPECS[name].actions
    action = unroll_of(SPECS[name], 1, E, (), np.random.default_rng(0)).action[0]
    part = received([formats.encode_action(action, space)])[0]
    assert same(formats.decode_action(part, E, space), action)
    with pytest.raises(WireError, match=r"^an array of \d+ bytes instead of \d+ for "):
        formats.decode_action(part[:-1], E, space)
    wrong = np.full_like(action, math.nan if isinstance(space, Box) else 99)
    with pytest.raises(WireError, match=r"^action is "):
        formats.decode_action(formats.encode_action(wrong, space), E, space)


# Headers.

GOOD: list[wire.FromHost] = [
    Hello(wire.PROTOCOL, INCARNATION, "host-1.example", "host", 64, 0, 8),
    Ping(1.5, 0.25, 3, 0.5, 1.0),
    WantWeights(-1),
    UnrollSent(INCARNATION, 1, 2, "lz4", 800, [("catch", 1.0, 9, 2, False)], [("a", 1, 2, "b")]),
    RowSent(1, 2, "none", [], []),
    Bye(),
]  # fmt: skip


@pytest.mark.parametrize("header", GOOD, ids=lambda header: type(header).__name__)
def test_headers_arrive_as_they_were(header: wire.FromHost) -> None:
    """Headers of hosts, there and back."""
    assert wire.read_from_host(memoryview(wire.encode_header(header))) == header


@pytest.mark.parametrize(
    "header",
    [
        wire.Welcome(1, INCARNATION, "{}", "{}", 5, [wire.Group(1, "catch", 4, 8)], 1, 2, 3, 4),
        wire.Refused("no", True),
        wire.Unknown(),
        wire.Pong(1.0, 2, 3),
        wire.Accepted(1, 2),
        wire.WeightsSent(1, "bfloat16"),
        wire.Act(1, 2),
    ],
    ids=lambda header: type(header).__name__,
)
def test_headers_of_the_learner_arrive_as_they_were(header: wire.FromLearner) -> None:
    """Headers of learners, there and back; a host's reader refuses those of hosts."""
    raw = wire.encode_header(header)
    assert wire.read_from_learner(raw) == header
    with pytest.raises(WireError, match=r"^no header: "):
        wire.read_from_host(raw)
    with pytest.raises(WireError, match=r"^no header: "):
        wire.read_from_learner(wire.encode_header(Bye()))


def raw_of(header: wire.FromHost, place: int, value: Any) -> bytes:
    fields = [type(header).__name__, *(getattr(header, name) for name in header.__struct_fields__)]
    fields[place] = value
    return msgspec.msgpack.encode(fields)


HELLO, PING, WANT, SENT, ROW, BYE = GOOD


@pytest.mark.parametrize(
    ("header", "place", "value"),
    [
        *((HELLO, 2, value) for value in (b"", bytes(15), bytes(17), "x" * 16, None)),
        *(
            (HELLO, 3, value)
            for value in ("", "x" * 65, "a\n", "a\x1b[2J", "a/b", "a b", "[red]", "\u202e", "-x",
                          "a#2", b"ab", "é")
        ),
        *((HELLO, 4, value) for value in ("learner\n", "", 1, "both")),
        *((HELLO, 5, value) for value in (0, -1, 4097, 2**63, 1.5, math.nan, True)),
        *((HELLO, 6, value) for value in (-1, 4097)),
        *((PING, 2, value) for value in (math.nan, math.inf, -0.1, 1e10, "1")),
        *((PING, 3, value) for value in (-1, 2**53)),
        *((PING, place, value) for place in (4, 5) for value in (math.nan, -0.1, 1.1)),
        *((WANT, 1, value) for value in (-2, 2**53, math.nan)),
        *((SENT, 2, value) for value in (0, -1, 2**53)),
        *((SENT, 3, value) for value in (-1, 2**53)),
        *((SENT, 4, value) for value in ("gzip", None, "")),
        *((SENT, 5, value) for value in (-1, 2**53, 1e300, math.nan)),
        *(
            (SENT, 6, [("catch", *value)])
            for value in ((math.nan, 1, 0, False), (math.inf, 1, 0, False), (1e31, 1, 0, False),
                          (1.0, -1, 0, False), (1.0, 2**53, 0, False), (1.0, 1, -1, False),
                          (1.0, 1, 4096, False), (1.0, 1, 0, 2), (1.0, 1, 0))
        ),
        (SENT, 6, [("x", 1.0, 1, 0, False)] * 1025),
        (SENT, 7, [("x", 1, 0, "y")] * 257),
        *((SENT, 7, [value]) for value in (("x", 1, -1, ""), ("x", 1, 0, "y" * 501), ("x", 1e20, 0, ""))),  # noqa: E501
        *((ROW, 2, value) for value in (-1, 2**53)),
        *((BYE, 0, value) for value in ("Bye\n\x1b[2J", "Welcome", 0, None, "")),
    ],
)  # fmt: skip
def test_headers_that_could_hurt(header: wire.FromHost, place: int, value: Any) -> None:
    """A field outside of its bounds: a WireError of one printable line that is not long."""
    with pytest.raises(WireError, match=r"^no header: ") as error:
        wire.read_from_host(raw_of(header, place, value))
    assert str(error.value).isprintable() and len(str(error.value)) < 250


def test_headers_that_are_too_long() -> None:
    """A long header is refused unread."""
    with pytest.raises(WireError, match=r"^a header of 65537 bytes is longer than 65536$"):
        wire.read_from_host(bytes(MAX_HEADER + 1))


@pytest.mark.parametrize("raw", [b"\x91" * 60_000, b"\x92\xa3Bye" + b"\x91" * 60_000,
                                 b"\x81" * 60_000, b"\xdd\xff\xff\xff\xff",
                                 b"\x9a\xa5Hello\x01\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
                                 b"\x91\xa3By\xff", b"\xc1", b""])  # fmt: skip
def test_headers_that_are_none(raw: bytes) -> None:
    """Deep nesting, counts beyond the end and letters that are none cost a line, no memory."""
    assert peak_of(wire.read_from_host, raw) < 100_000
    with pytest.raises(WireError):
        wire.read_from_learner(raw)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_header_is_one_or_a_wire_error(data: st.DataObject) -> None:
    """Bytes at random, and real headers with bytes changed, cut off or put in."""
    raw = bytearray(wire.encode_header(data.draw(st.sampled_from(GOOD))))
    raw[data.draw(st.integers(0, len(raw))) :] = data.draw(st.binary(max_size=20))
    for read in (wire.read_from_host, wire.read_from_learner):
        try:
            read(bytes(raw))
        except WireError as error:
            assert str(error).isprintable()


def test_what_happened_arrives() -> None:
    """Games and losses there and back; reasons on one line without control characters."""
    episodes = [Episode("catch", 1.5, 9, 2, True), Episode("catch", -2.0, 1, 0)]
    losses = [Loss("catch", 2**40, 1, "gone:\n\x1b[31mred" + "y" * 200)]
    header = UnrollSent(
        INCARNATION, 1, 0, "none", 0, wire.episodes_to_wire(episodes), wire.losses_to_wire(losses)
    )
    found = wire.read_from_host(wire.encode_header(header))
    assert isinstance(found, UnrollSent)
    told, lost = wire.happened(found)
    assert list(told) == episodes
    assert lost[0][:3] == losses[0][:3]
    assert lost[0].reason.startswith("gone:??[31mred") and len(lost[0].reason) == 120


@pytest.mark.parametrize("name", ["catch", "é" * 300])
def test_very_much_that_happened_fits_a_header(name: str) -> None:
    """However many games ended and whatever their names, the header is never refused."""
    episodes = [Episode(name, float(i), 10**6 + i, i % 256, False) for i in range(3000)]
    losses = [Loss(name, 2**62, i % 256, "é" * 200) for i in range(3000)]
    told, lost = wire.episodes_to_wire(episodes), wire.losses_to_wire(losses)
    raw = wire.encode_header(UnrollSent(INCARNATION, 2**52, 2**52, "none", 2**52, told, lost))
    found = wire.read_from_host(raw)
    assert isinstance(found, UnrollSent)
    assert wire.happened(found)[0][-1] == episodes[-1]  # the last ones are kept, in order
    assert [episode[2] for episode in told] == [10**6 + i for i in range(3000 - len(told), 3000)]
    assert len(told) == 1024 or name != "catch"
    assert lost and told


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e31])
def test_games_without_a_number_stay_at_home(bad: float) -> None:
    """A return that would get the whole header refused is left out; the other games travel."""
    good = Episode("catch", 1.0, 1, 0)
    assert wire.episodes_to_wire([good, good._replace(episode_return=bad)]) == [tuple(good)]


def test_what_happened_is_of_the_group() -> None:
    """Games and losses of other levels or environments than the group's are refused."""

    def header(level: str, env: int, lost_level: str, lost_env: int) -> RowSent:
        return RowSent(0, 0, "none", [(level, 1.0, 1, env, False)], [(lost_level, 1, lost_env, "")])

    wire.check_happened(header("catch", 3, "catch", 0), "catch", 4)
    for wrong in (header("x", 3, "catch", 0), header("catch", 4, "catch", 0)):
        with pytest.raises(WireError, match=r"^a game of another group's$"):
            wire.check_happened(wrong, "catch", 4)
    for wrong in (header("catch", 3, "x", 0), header("catch", 3, "catch", 4)):
        with pytest.raises(WireError, match=r"^a lost environment of another group's$"):
            wire.check_happened(wrong, "catch", 4)
