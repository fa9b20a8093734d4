"""How a batch is cut for a CPU: micro-batches that fit its cache, shared out among threads."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from asyncagent.placement import last_level_cache_bytes

CACHES = 2
"""The largest output of any layer may fill the cache so often, all threads' together: smaller
micro-batches cost more in calls than they save in traffic."""


def micro_batch_sizes(batch_size: int, num_threads: int, most: int) -> list[int]:
    """Columns of each micro-batch, in the order in which threads should take them.

    Large ones first, and ever smaller ones, down to a quarter of ``most``: the threads, which
    share their cores with environments and inference, come to an end at about the same time.
    """
    sizes = []
    least = max(1, most // 4)
    left = batch_size
    while left:
        size = min(left, max(least, min(most, math.ceil(left / num_threads))))
        sizes.append(size)
        left -= size
    return sizes


def most_columns(num_threads: int, rows: int, row_bytes: int) -> int:
    """Columns that fit the cache.

    Args:
      rows: of a column, T+1.
      row_bytes: of the largest output of any layer.
    """
    return max(1, CACHES * last_level_cache_bytes() // (num_threads * rows * row_bytes))


class LargestOutput:
    """While open, keeps the number of bytes of the largest output of any layer with weights."""

    def __init__(self, net: nn.Module) -> None:
        self.num_bytes = 1
        self._net = net
        self._hooks: list[Any] = []

    def __enter__(self) -> LargestOutput:
        self._hooks = [
            layer.register_forward_hook(self._look)
            for layer in self._net.modules()
            if list(layer.parameters(recurse=False))
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self.num_bytes = max(self.num_bytes, output.numel() * output.element_size())
