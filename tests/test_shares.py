"""How batches are cut: sizes that add up, and the bytes they are decided by."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from asyncagent.shares import LargestOutput, micro_batch_sizes, most_columns


@given(st.integers(1, 300), st.integers(1, 32), st.integers(1, 400))
def test_sizes_add_up_and_fall(batch_size: int, num_threads: int, most: int) -> None:
    """Every column once, none too many at a time, and only the last may be very small."""
    sizes = micro_batch_sizes(batch_size, num_threads, most)
    assert sum(sizes) == batch_size
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) <= max(1, most)
    assert all(size >= most // 4 for size in sizes[:-1])


@pytest.mark.parametrize(
    ("batch_size", "num_threads", "most", "sizes"),
    [
        (32, 1, 100, [32]),
        (32, 2, 100, [25, 7]),
        (32, 2, 16, [16, 8, 4, 4]),
        (32, 2, 6, [6, 6, 6, 6, 4, 2, 1, 1]),
        (3, 8, 1, [1, 1, 1]),
    ],
)
def test_sizes(batch_size: int, num_threads: int, most: int, sizes: list[int]) -> None:
    """Half of what is left for each of two threads, down to a quarter of the most."""
    assert micro_batch_sizes(batch_size, num_threads, most) == sizes


def test_more_threads_take_smaller_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads share the cache; a row too large for it is still learned from."""
    monkeypatch.setattr("asyncagent.shares.last_level_cache_bytes", lambda: 1 << 20)
    assert most_columns(num_threads=1, rows=16, row_bytes=1 << 10) == 128
    assert most_columns(num_threads=2, rows=16, row_bytes=1 << 10) == 64
    assert most_columns(num_threads=2, rows=16, row_bytes=1 << 30) == 1


def test_the_largest_output_is_of_a_layer_with_weights() -> None:
    """A layer that only converts its input is left out, and so is what comes after leaving."""
    net = nn.Sequential(nn.Upsample(scale_factor=8.0), nn.MaxPool1d(8), nn.Linear(4, 6))
    x = torch.zeros(2, 3, 4)
    with LargestOutput(net) as largest:
        net(x)
    net(torch.zeros(20, 3, 4))
    assert largest.num_bytes == 2 * 3 * 6 * 4
