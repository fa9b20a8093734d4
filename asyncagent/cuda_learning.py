"""The learner's updates on a CUDA device: the whole batch at once, each update one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from asyncagent.cuda import Graphs, Lane, Layout, Mark, Replayed, wait_for
from asyncagent.structs import Nest, Unroll, map_nest
from asyncagent.tracks import COMPUTES, COPIES, Track
from asyncagent.unroll import Columns, gather_columns


class Ended(NamedTuple):
    """An update that is computed."""

    batch: Unroll
    """What it was made of, on the host; holds until the next call."""
    verdict: Tensor
    """What ``step`` said of it, on the host."""


class BatchStep:
    """Brings batches to the device and learns from them. Belongs to one thread.

    While one batch is learned from, the next is gathered in pinned memory and crosses the bus, in
    one transfer, on a lane of its own.  Of an update, its verdict alone comes back, and nobody
    waits for it: it is there when the update after the next would be launched.
    """

    def __init__(
        self, step: Callable[[Nest], None], graphs: Graphs, verdict: Tensor,
        track: Track | None = None,
    ) -> None:  # fmt: skip
        """``step(batch)``, an update from an Unroll of tensors [T+1, B, ...], is recorded.

        ``verdict``: on the graphs' device; ``step`` writes to it.  ``track`` is told of copying and
        computing.
        """
        self.ended: Ended | None = None
        """The update launched before the newest; None where there is none."""
        self._step = step
        self._track = track or Track(3)
        self._verdict = verdict
        self._graphs = graphs
        self._lane = graphs.lane
        self._bus = Lane(self._lane.device)
        self._batch: _Batch | None = None
        self._taken: Mark = None
        self._ended: Mark = None
        self._launched = False

    def __call__(self, parts: list[Columns]) -> Unroll:
        """Launch an update, and wait for the one before it; the batch's arrays on the host.

        They hold until the next call; ``parts`` are not needed any more.  The caller uses the
        graphs' lane.
        """
        if self._batch is None:
            self._batch = _Batch(gather_columns(parts), self._lane, self._bus, self._verdict)
            tensors = self._batch.tensors
            self._update = Replayed(lambda: self._step(tensors), self._graphs)
        batch = self._batch
        # Two take turns on the host: the one before is whole until its update is known to be.
        # This one's columns are off the bus: the update that they were for has been waited for.
        here, other = batch.here
        batch.here = (other, here)
        self._track.enter(COPIES)
        copy_columns(parts, here.arrays)
        with self._bus.use():
            self._bus.after(self._taken)
            batch.landed.copy_(here.block, non_blocking=True)
            arrived = self._bus.mark()
        self._track.enter(COMPUTES)
        self._lane.after(arrived)
        batch.there.copy_(batch.landed)
        self._taken = self._lane.mark()
        self._update()
        here.verdict.copy_(self._verdict, non_blocking=True)
        before, self._ended = self._ended, self._lane.mark()
        # One update waits while one is computed: the device never idles, and no more than that
        # lie between what is learned and what is published.
        wait_for(before)
        self.ended = Ended(other.arrays, other.verdict) if self._launched else None
        self._launched = True
        return here.arrays

    def forget(self) -> None:
        """Record anew: memory that ``step`` uses has moved."""
        wait_for(self._ended)
        self._batch = None
        self._launched = False


class _Here:
    """A batch and its verdict on the host."""

    def __init__(self, layout: Layout, device: torch.device, verdict: Tensor) -> None:
        self.block = layout.zeros_pinned_for(device)
        self.arrays: Unroll = layout.arrays(self.block)
        self.verdict = torch.zeros(verdict.shape, pin_memory=device.type == "cuda")


class _Batch:
    """A batch's memory: on the host, where it lands, and where the graph reads it."""

    def __init__(self, example: Unroll, lane: Lane, bus: Lane, verdict: Tensor) -> None:
        layout = Layout(example)
        device = lane.device
        self.here = (_Here(layout, device, verdict), _Here(layout, device, verdict))
        with bus.use():  # memory belongs to the lane that it is allocated on
            self.landed = layout.zeros_on(device)
        with lane.use():
            self.there = layout.zeros_on(device)
        self.tensors: Nest = layout.tensors(self.there)


def copy_columns(parts: list[Columns], out: Unroll) -> None:
    """Write all the columns, in their order, to ``out`` [T+1, B, ...]."""
    start = 0
    for part in parts:
        stop = start + part.stop - part.start
        map_nest(
            lambda target, leaf, part=part, to=slice(start, stop): np.copyto(
                target[:, to], leaf[:, part.start : part.stop]
            ),
            out._replace(core_state=()),
            part.unroll._replace(core_state=()),
        )
        map_nest(
            lambda target, leaf, part=part, to=slice(start, stop): np.copyto(
                target[to], leaf[part.start : part.stop]
            ),
            out.core_state,
            part.unroll.core_state,
        )
        start = stop
