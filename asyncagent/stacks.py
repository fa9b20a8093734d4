"""Stacked frames without their repetition: of every row, only what the row before does not show.

An Atari observation is the last k frames.  Most rows repeat k-1 of them from the row before; only
the newest frame travels then.  A row that does not (an episode's first, above all) is *whole*: its
older frames travel, too.  What is a stack is found out by comparison: any rows survive the trip.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from asyncagent.structs import ArraySpec, BoolArray

ByteArray = npt.NDArray[np.uint8]


class PackedStack(NamedTuple):
    """Rows of E stacks of k frames [..., H, W], oldest frame first."""

    newest: ByteArray
    """[R, E, H, W]: each row's last frame."""
    whole: BoolArray
    """[R, E]: the other frames are in ``older``."""
    older: ByteArray
    """[n, k-1, H, W], of the whole ones, in the order of rows, then environments."""


def is_stack(spec: ArraySpec) -> bool:
    """Whether an array looks like a stack of frames: a few bytes deep, many high and wide."""
    return (
        spec.dtype == "uint8"
        and len(spec.shape) == 3
        and 2 <= spec.shape[0] <= 8
        and min(spec.shape[1:]) >= 16
    )


def pack(rows: ByteArray, before: ByteArray | None) -> PackedStack:
    """Pack rows [R, E, k, H, W], which follow the row ``before`` [E, k, H, W] if there is one."""
    num_rows, num_envs, depth = rows.shape[:3]
    frame = rows.shape[3] * rows.shape[4]
    # A row's frames are contiguous: as long words they are compared several times as fast.
    word = np.dtype(np.uint64 if frame % 8 == 0 else np.uint8)
    words = np.ascontiguousarray(rows).reshape(num_rows, num_envs, depth * frame).view(word)
    shift = frame // word.itemsize
    whole = np.ones((num_rows, num_envs), np.bool_)
    if before is not None and num_rows:
        earlier = np.ascontiguousarray(before).reshape(num_envs, depth * frame).view(word)
        whole[0] = (words[0, :, :-shift] != earlier[:, shift:]).any(axis=-1)
    for t in range(1, num_rows):
        whole[t] = (words[t, :, :-shift] != words[t - 1, :, shift:]).any(axis=-1)
    newest = np.ascontiguousarray(rows[:, :, -1])
    return PackedStack(newest, whole, rows[:, :, :-1][whole])


def unpack(packed: PackedStack, out: ByteArray, before: ByteArray | None) -> None:
    """Write what ``pack`` was given to ``out`` [R, E, k, H, W]; ``before`` as there.

    Without ``before`` every environment's row 0 must be whole.
    """
    newest, whole, older = packed
    num_rows, _, depth = out.shape[:3]
    for age in range(min(depth, num_rows)):
        out[age:, :, depth - 1 - age] = newest[: num_rows - age]
    if before is not None:
        for t in range(min(depth - 1, num_rows)):
            out[t, :, : depth - 1 - t] = before[:, t + 1 :]
    # What a whole row writes to its successors, a later whole row overwrites: its own are younger.
    row, env = np.nonzero(whole)
    for later in reversed(range(min(depth - 1, num_rows))):
        inside = row + later < num_rows
        out[row[inside] + later, env[inside], : depth - 1 - later] = older[inside, later:]
