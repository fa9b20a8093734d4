"""Arrays as raw buffers: what the parts of a message between learner and actor host hold.

Both sides know every size from the environment's spec.  Nothing is allocated for a message, and
nothing of it is believed, before it has been compared with that.  No torch; nothing waits here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import lz4.block  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import optree
import zstandard

from asyncagent.errors import UsageError, WireError
from asyncagent.stacks import PackedStack, is_stack, pack, unpack
from asyncagent.structs import (
    ActionArray,
    ActionSpace,
    ArraySpec,
    BoolArray,
    Box,
    Discrete,
    EnvSpec,
    EnvStep,
    Nest,
    Unroll,
)
from asyncagent.wire import MAX_PARTS, Buffer, Compression

LARGEST = 1e10
"""Numbers beyond are nobody's rewards, logits or measurements: in float32 a loss, which sums
squares, would not be finite any more."""

_WINDOW = 1 << 20
"""Bytes; level 1 of zstd, in which we compress, needs half of that."""


class _Small(NamedTuple):
    """A small array and where it lies in the part that holds all of them."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int
    stop: int


class _Arrays:
    """Arrays [rows, E, ...]: small ones together in one part, then the observation's leaves."""

    def __init__(
        self, small: Sequence[tuple[str, tuple[int, ...], str]], spec: EnvSpec,
        rows: int, num_envs: int,
    ) -> None:  # fmt: skip
        self._rows = rows
        self._num_envs = num_envs
        leaves: list[ArraySpec] = optree.tree_leaves(spec.observation)
        self.leaves = leaves
        flags = [
            (f"whole {place}", (rows, num_envs), "bool")
            for place, leaf in enumerate(leaves)
            if is_stack(leaf)
        ]
        self._small: list[_Small] = []
        start = 0
        for name, shape, dtype in (*small, *flags):
            kind = np.dtype(dtype)
            stop = start + math.prod(shape) * kind.itemsize
            self._small.append(_Small(name, shape, kind, start, stop))
            start = (stop + 7) & ~7  # every array begins at a multiple of eight
        self._small_bytes = start
        self.num_parts = 1 + sum(1 + is_stack(leaf) for leaf in leaves)
        if self.num_parts + 2 > MAX_PARTS:
            raise UsageError(
                f"an observation of {len(leaves)} arrays does not fit a message of at most "
                f"{MAX_PARTS} parts"
            )
        self.max_part_bytes = max(
            [self._small_bytes, *(rows * num_envs * _row_bytes(leaf) for leaf in leaves)]
        )

    def encode(
        self, small: Sequence[npt.NDArray[Any]], observation: Nest, before: Nest,
        compression: Compression,
    ) -> list[Buffer]:  # fmt: skip
        """Parts of a message. Those of arrays that are no stacks are the arrays themselves."""
        parts: list[Buffer] = []
        flags = []
        befores = [None] * len(self.leaves) if before is None else optree.tree_leaves(before)
        values = optree.tree_leaves(observation)
        for leaf, value, earlier in zip(self.leaves, values, befores, strict=True):
            rows: npt.NDArray[Any] = value
            if is_stack(leaf):
                packed = pack(rows, earlier)
                flags.append(packed.whole)
                parts += [
                    _compress(packed.newest, compression),
                    _compress(packed.older, compression),
                ]
            else:
                parts.append(_compress(np.ascontiguousarray(rows), compression))
        together = np.zeros(self._small_bytes, np.uint8)
        for place, array in zip(self._small, (*small, *flags), strict=True):
            target = together[place.start : place.stop].view(place.dtype).reshape(place.shape)
            np.copyto(target, array)
        return [together.data, *parts]

    def decode_small(self, parts: Sequence[Buffer]) -> dict[str, npt.NDArray[Any]]:
        """The small arrays, views of the first part; flags are checked to be flags."""
        if len(parts) != self.num_parts:
            raise WireError(f"{len(parts)} parts instead of {self.num_parts}")
        together = np.frombuffer(parts[0], np.uint8)
        if together.nbytes != self._small_bytes:
            raise WireError(f"small arrays of {together.nbytes} bytes, not {self._small_bytes}")
        arrays = {}
        for place in self._small:
            raw = together[place.start : place.stop]
            if place.dtype == np.bool_ and raw.max(initial=0) > 1:
                raise WireError(f"{place.name} has values that are no flags")
            arrays[place.name] = raw.view(place.dtype).reshape(place.shape)
        return arrays

    def decode_observation(
        self, parts: Sequence[Buffer], small: dict[str, npt.NDArray[Any]], out: Nest, before: Nest,
        compression: Compression,
    ) -> None:  # fmt: skip
        """Write the observation's leaves [rows, E, ...] to ``out``."""
        befores = [None] * len(self.leaves) if before is None else optree.tree_leaves(before)
        rest = iter(parts[1:])
        targets = optree.tree_leaves(out)
        for place, (leaf, target, earlier) in enumerate(
            zip(self.leaves, targets, befores, strict=True)
        ):
            rows: npt.NDArray[Any] = target
            if is_stack(leaf):
                whole: BoolArray = small[f"whole {place}"]
                if earlier is None and not whole[0].all():
                    raise WireError("a first row is not whole")
                newest = _expand(next(rest), (*whole.shape, *leaf.shape[1:]), "uint8", compression)
                shape = (int(whole.sum()), leaf.shape[0] - 1, *leaf.shape[1:])
                older = _expand(next(rest), shape, "uint8", compression)
                unpack(PackedStack(newest, whole, older), rows, earlier)
            else:
                values = _expand(next(rest), rows.shape, leaf.dtype, compression)
                _check_values(values, leaf)
                np.copyto(rows, values)


class UnrollFormat:
    """Unrolls of T steps of E environments, to parts and back; both sides make the same one."""

    def __init__(self, spec: EnvSpec, unroll_length: int, num_envs: int, core_state: Nest) -> None:
        """``core_state``: any of the net's states, nest of float32 [n, ...]."""
        rows, steps = (unroll_length + 1, num_envs), (unroll_length, num_envs)
        one = spec.actions.array
        self._spec = spec
        self._states = [leaf.shape[1:] for leaf in optree.tree_leaves(core_state)]
        small: list[tuple[str, tuple[int, ...], str]] = [
            ("reward", rows, "float32"),
            ("terminated", rows, "bool"),
            ("truncated", rows, "bool"),
            ("first", rows, "bool"),
            ("last_action", (*rows, *one.shape), one.dtype),
            ("action", (*steps, *one.shape), one.dtype),
            ("behaviour_logits", (*steps, spec.actions.num_logits), "float32"),
            ("policy_version", steps, "int64"),
            ("valid", steps, "bool"),
        ]
        self._fields = [name for name, _, _ in small]
        small += [
            (f"core state {place}", (num_envs, *shape), "float32")
            for place, shape in enumerate(self._states)
        ]
        self._arrays = _Arrays(small, spec, *rows)

    @property
    def max_part_bytes(self) -> int:
        """No part is larger, whatever an unroll holds."""
        return _most_compressed(self._arrays.max_part_bytes)

    def encode(self, unroll: Unroll, compression: Compression = "none") -> list[Buffer]:
        """Parts; they may be views of ``unroll``, which nobody may write to until they are sent."""
        small = [getattr(unroll, name) for name in self._fields]
        small += optree.tree_leaves(unroll.core_state)
        return self._arrays.encode(small, unroll.observation, None, compression)

    def decode(
        self, parts: Sequence[Buffer], out: Unroll, version: int,
        compression: Compression = "none",
    ) -> None:  # fmt: skip
        """Write the unroll to ``out``, whole or not usable at all.

        Args:
          version: the newest policy version there can be.

        Raises WireError, one line, if a size or a value is impossible.
        """
        small = self._arrays.decode_small(parts)
        space = self._spec.actions
        _check_numbers("reward", small["reward"])
        _check_numbers("behaviour_logits", small["behaviour_logits"])
        check_actions("action", small["action"], space)
        check_actions("last_action", small["last_action"], space)
        versions = small["policy_version"]
        if versions.min(initial=0) < 0 or versions.max(initial=0) > version:
            raise WireError(f"policy_version outside [0, {version}]")
        _check_ends(small["terminated"], small["truncated"])
        states = [small[f"core state {place}"] for place in range(len(self._states))]
        for state in states:
            _check_numbers("core_state", state)
        for name in self._fields:
            np.copyto(getattr(out, name), small[name])
        for leaf, state in zip(optree.tree_leaves(out.core_state), states, strict=True):
            np.copyto(leaf, state)
        self._arrays.decode_observation(parts, small, out.observation, None, compression)


class RowFormat:
    """Rows of E environments, to parts and back; stacks are told from the row before."""

    def __init__(self, spec: EnvSpec, num_envs: int) -> None:
        small = [
            (name, (num_envs,), "bool") for name in ("terminated", "truncated", "first", "lost")
        ]
        small.insert(0, ("reward", (num_envs,), "float32"))
        self._arrays = _Arrays(small, spec, 1, num_envs)

    @property
    def max_part_bytes(self) -> int:
        """No part is larger, whatever a row holds."""
        return _most_compressed(self._arrays.max_part_bytes)

    def encode(self, row: EnvStep, before: Nest, compression: Compression) -> list[Buffer]:
        """Parts; ``before`` is the observation of the row before, None for a group's first."""
        small = [row.reward, row.terminated, row.truncated, row.first, row.lost]
        return self._arrays.encode(small, _with_row(row.observation), before, compression)

    def decode(
        self, parts: Sequence[Buffer], out: Nest, before: Nest, compression: Compression
    ) -> EnvStep:
        """The row, its observation written to ``out``; WireError as ``UnrollFormat.decode``."""
        small = self._arrays.decode_small(parts)
        _check_numbers("reward", small["reward"])
        _check_ends(small["terminated"], small["truncated"])
        self._arrays.decode_observation(parts, small, _with_row(out), before, compression)
        return EnvStep(
            out,
            reward=small["reward"].copy(),
            terminated=small["terminated"].copy(),
            truncated=small["truncated"].copy(),
            first=small["first"].copy(),
            lost=small["lost"].copy(),
        )


def encode_action(action: ActionArray, space: ActionSpace) -> Buffer:
    """The part of an Act."""
    return np.ascontiguousarray(action, space.array.dtype).data


def decode_action(part: Buffer, num_envs: int, space: ActionSpace) -> ActionArray:
    """The action [E, ...] of an Act; WireError if it is none."""
    action = _expand(part, (num_envs, *space.array.shape), space.array.dtype, "none")
    check_actions("action", action, space)
    return action


def check_actions(name: str, actions: ActionArray, space: ActionSpace) -> None:
    """WireError unless all actions [..., *] are the space's."""
    if isinstance(space, Box):
        _check_numbers(name, actions)
        return
    most = np.array(space.num_actions if isinstance(space, Discrete) else space.sizes)
    if not ((actions >= 0) & (actions < most)).all():
        raise WireError(f"{name} is outside of the action space {space}")


def _with_row(observation: Nest) -> Nest:
    return optree.tree_map(lambda leaf: leaf[None], observation)


def _row_bytes(leaf: ArraySpec) -> int:
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def _most_compressed(size: int) -> int:
    """What does not compress becomes a little larger."""
    return size + size // 128 + 4096


def _compress(array: npt.NDArray[Any], compression: Compression) -> Buffer:
    if compression == "lz4":
        return lz4.block.compress(array, store_size=False)
    if compression == "zstd":
        return zstandard.ZstdCompressor(level=1, write_content_size=True).compress(array.data)
    return array.data if array.size else b""


def _expand(
    part: Buffer, shape: tuple[int, ...], dtype: str, compression: Compression
) -> npt.NDArray[Any]:
    """The array of exactly that shape which the part holds; never larger, whatever it says."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    try:
        if compression == "lz4":
            part = lz4.block.decompress(part, uncompressed_size=size)
        elif compression == "zstd":
            if zstandard.frame_content_size(part) != size:
                raise WireError(f"a compressed array is not of {size} bytes")
            # A frame that is cut off would get a window, of up to 128 MiB, before that is noticed.
            expander = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
            part = expander.decompress(part, max_output_size=size, allow_extra_data=False)
    except (lz4.block.LZ4BlockError, zstandard.ZstdError, ValueError) as error:
        raise WireError(f"a compressed array cannot be expanded: {str(error)[:100]}") from None
    values = np.frombuffer(part, np.uint8)
    if values.nbytes != size:
        raise WireError(f"an array of {values.nbytes} bytes instead of {size} for {dtype} {shape}")
    if kind == np.bool_ and values.max(initial=0) > 1:
        raise WireError("a flag is neither 0 nor 1")
    return values.view(kind).reshape(shape)


def _check_values(values: npt.NDArray[Any], leaf: ArraySpec) -> None:
    if values.dtype.kind == "f":
        _check_numbers("observation", values)
    if leaf.num_tokens and not ((values >= 0) & (values <= leaf.num_tokens)).all():
        raise WireError(f"a sentence has tokens outside [0, {leaf.num_tokens}]")


def _check_numbers(name: str, values: npt.NDArray[Any]) -> None:
    # So that nan, too, is outside.
    if not (values.min(initial=0) >= -LARGEST and values.max(initial=0) <= LARGEST):
        raise WireError(f"{name} is not finite, or beyond {LARGEST:.0e}")


def _check_ends(terminated: BoolArray, truncated: BoolArray) -> None:
    if (terminated & truncated).any():
        raise WireError("an episode both terminated and truncated")
