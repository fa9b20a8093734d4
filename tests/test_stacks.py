"""Packed stacks: nothing is lost on the way, and only what is new travels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncagent.stacks import ByteArray, PackedStack, is_stack, pack, unpack
from asyncagent.structs import ArraySpec


def stacked(
    rng: np.random.Generator, rows: int, envs: int, depth: int, frame: tuple[int, int],
    breaks: float,
) -> ByteArray:  # fmt: skip
    """Rows of true stacks, of which a share of ``breaks`` begin anew with other frames."""
    made = rng.integers(0, 3, (rows, envs, depth, *frame), dtype=np.uint8)
    for t in range(1, rows):
        for env in range(envs):
            if rng.random() >= breaks:
                made[t, env, :-1] = made[t - 1, env, 1:]
    return made


def oracle(packed: PackedStack, out: ByteArray, before: ByteArray | None) -> None:
    """``unpack`` row by row, as its docstring says it."""
    older = iter(packed.older)
    for t in range(out.shape[0]):
        for env in range(out.shape[1]):
            out[t, env, -1] = packed.newest[t, env]
            if packed.whole[t, env]:
                out[t, env, :-1] = next(older)
            elif t:
                out[t, env, :-1] = out[t - 1, env, 1:]
            else:
                assert before is not None
                out[t, env, :-1] = before[env, 1:]


SHAPES = st.tuples(
    st.integers(1, 7), st.integers(1, 3), st.integers(2, 8),
    st.sampled_from([(1, 1), (2, 4), (3, 5)]),
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(SHAPES, st.sampled_from([0.0, 0.2, 1.0]), st.booleans(), st.integers(0, 2**32 - 1))
def test_any_rows_survive(
    shape: tuple[int, int, int, tuple[int, int]], breaks: float, has_before: bool, seed: int
) -> None:
    """Stacks, half stacks and noise come back byte for byte, with and without a row before."""
    rng = np.random.default_rng(seed)
    num_rows, num_envs, depth, frame = shape
    rows = stacked(rng, num_rows + 1, num_envs, depth, frame, breaks)
    before, rows = (rows[0], rows[1:]) if has_before else (None, rows[:-1])
    packed = pack(rows, before)
    out = np.full_like(rows, 99)
    unpack(packed, out, before)
    np.testing.assert_array_equal(out, rows)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(SHAPES, st.booleans(), st.integers(0, 2**32 - 1))
def test_flags_are_obeyed(
    shape: tuple[int, int, int, tuple[int, int]], has_before: bool, seed: int
) -> None:
    """Whatever flags say, also those that ``pack`` never writes, unpacking goes row by row."""
    rng = np.random.default_rng(seed)
    num_rows, num_envs, depth, frame = shape
    whole = rng.random((num_rows, num_envs)) < 0.4
    before = rng.integers(0, 256, (num_envs, depth, *frame), np.uint8) if has_before else None
    if before is None:
        whole[0] = True
    newest = rng.integers(0, 256, (num_rows, num_envs, *frame), np.uint8)
    older = rng.integers(0, 256, (int(whole.sum()), depth - 1, *frame), np.uint8)
    packed = PackedStack(newest, whole, older)
    expected, out = np.zeros((2, num_rows, num_envs, depth, *frame), np.uint8)
    oracle(packed, expected, before)
    unpack(packed, out, before)
    np.testing.assert_array_equal(out, expected)


def test_worked_example() -> None:
    """Two environments, stacks of three 1x1 frames: what travels, written down by hand."""
    rows = np.array(
        [
            [[0, 0, 1], [5, 6, 7]],
            [[0, 1, 2], [6, 7, 8]],
            [[7, 7, 7], [7, 8, 9]],  # environment 0 begins anew
            [[7, 7, 3], [7, 8, 9]],  # environment 1 repeats its row: no shift
        ],
        np.uint8,
    )[..., None, None]
    packed = pack(rows, None)
    assert packed.newest[..., 0, 0].tolist() == [[1, 7], [2, 8], [7, 9], [3, 9]]
    assert packed.whole.tolist() == [[True, True], [False, False], [True, False], [False, True]]
    assert packed.older[..., 0, 0].tolist() == [[0, 0], [5, 6], [7, 7], [7, 8]]
    following = pack(
        np.array([[[[7, 3, 4]], [[1, 1, 1]]]], np.uint8).reshape(1, 2, 3, 1, 1), rows[-1]
    )
    assert following.whole.tolist() == [[False, True]]
    assert following.older[..., 0, 0].tolist() == [[1, 1]]


def test_bytes_of_a_true_stack() -> None:
    """Of k frames one travels; only openings travel whole."""
    rng = np.random.default_rng(0)
    rows = stacked(rng, 20, 3, 4, (16, 16), 0.0)
    packed = pack(rows, None)
    assert packed.newest.nbytes == rows.nbytes // 4
    assert packed.older.nbytes == 3 * 3 * 16 * 16  # one opening of each environment
    following = pack(stacked(rng, 1, 3, 4, (16, 16), 0.0), rows[-1])
    assert following.older.nbytes == 3 * 3 * 16 * 16
    assert pack(rows[1:], rows[0]).older.nbytes == 0


def test_a_frame_that_differs_in_its_last_byte_is_no_repetition() -> None:
    """Comparison is of all bytes, whether they are compared as words or one by one."""
    for frame in ((16, 16), (15, 17)):
        rows = stacked(np.random.default_rng(1), 2, 1, 4, frame, 0.0)
        rows[1, 0, 0, -1, -1] ^= 1
        assert pack(rows, None).whole.all()
        assert pack(rows[1:], rows[0]).whole.all()


def test_strided_rows() -> None:
    """Views that are not contiguous, or not aligned, are packed as their copies are."""
    rows = stacked(np.random.default_rng(2), 10, 4, 4, (2, 4), 0.3)
    raw = np.empty(rows.nbytes + 1, np.uint8)
    odd = raw[1:].reshape(rows.shape)
    odd[:] = rows
    views = [rows[::2], rows[:, ::3], rows[:, :, ::-1], rows.swapaxes(0, 1), odd]
    for view in views:
        for before in (None, rows[0, : view.shape[1]][:, : view.shape[2]]):
            if before is not None and before.shape != view.shape[1:]:
                continue
            expected = pack(view.copy(), before)
            for found, wanted in zip(pack(view, before), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)


def test_no_rows() -> None:
    """Nothing travels, and nothing comes back, of no rows and of no environments."""
    before = np.zeros((2, 4, 16, 16), np.uint8)
    for rows, row in ((np.zeros((0, 2, 4, 16, 16), np.uint8), before),
                      (np.zeros((3, 0, 4, 16, 16), np.uint8), before[:0])):  # fmt: skip
        for earlier in (None, row):
            packed = pack(rows, earlier)
            assert packed.newest.size == packed.older.size == 0
            unpack(packed, rows, earlier)


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((4, 84, 84), "uint8", True),
        ((2, 16, 16), "uint8", True),
        ((8, 72, 96), "uint8", True),
        ((1, 84, 84), "uint8", False),
        ((9, 84, 84), "uint8", False),
        ((72, 96, 3), "uint8", False),
        ((4, 15, 84), "uint8", False),
        ((4, 84, 84), "float32", False),
        ((84, 84), "uint8", False),
        ((0, 84, 84), "uint8", False),
    ],
)
def test_what_looks_like_a_stack(shape: tuple[int, ...], dtype: str, expected: bool) -> None:
    """A few bytes deep, many high and wide."""
    assert is_stack(ArraySpec(shape, dtype)) is expected
