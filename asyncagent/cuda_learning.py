"""The learner's updates on a CUDA device: the whole batch at once, each update one graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from asyncagent.cuda import Graphs, Lane, Layout, Mark, Replayed, wait_for
from asyncagent.structs import Nest, Unroll, map_nest
from asyncagent.unroll import Columns, gather_columns


class BatchStep:
    """Brings batches to the device and learns from them. Belongs to one thread.

    While one batch is learned from, the next is gathered in pinned memory and crosses the bus, in
    one transfer, on a lane of its own.  Nothing is read back.
    """

    def __init__(self, step: Callable[[Nest], None], graphs: Graphs) -> None:
        """``step(batch)``, an update from an Unroll of tensors [T+1, B, ...], is recorded."""
        self._step = step
        self._graphs = graphs
        self._lane = graphs.lane
        self._bus = Lane(self._lane.device)
        self._batch: _Batch | None = None
        self._arrived: Mark = None
        self._taken: Mark = None
        self._ended: Mark = None

    def __call__(self, parts: list[Columns]) -> Unroll:
        """Launch an update, and wait for the one before it; the batch's arrays on the host.

        They hold until the next call; ``parts`` are not needed any more.  The caller uses the
        graphs' lane.
        """
        if self._batch is None:
            self._batch = _Batch(gather_columns(parts), self._lane, self._bus)
            tensors = self._batch.tensors
            self._update = Replayed(lambda: self._step(tensors), self._graphs)
        batch = self._batch
        wait_for(self._arrived)  # else the columns would overwrite what is on its way
        copy_columns(parts, batch.arrays)
        with self._bus.use():
            self._bus.after(self._taken)
            batch.landed.copy_(batch.here, non_blocking=True)
            self._arrived = self._bus.mark()
        self._lane.after(self._arrived)
        batch.there.copy_(batch.landed)
        self._taken = self._lane.mark()
        self._update()
        before, self._ended = self._ended, self._lane.mark()
        # One update waits while one is computed: the device never idles, and no more than that
        # lie between what is learned and what is published.
        wait_for(before)
        return batch.arrays

    def forget(self) -> None:
        """Record anew: memory that ``step`` uses has moved."""
        wait_for(self._ended)
        self._batch = None


class _Batch:
    """A batch's memory: on the host, where it lands, and where the graph reads it."""

    def __init__(self, example: Unroll, lane: Lane, bus: Lane) -> None:
        layout = Layout(example)
        device = lane.device
        self.here = layout.zeros_pinned_for(device)
        with bus.use():  # memory belongs to the lane that it is allocated on
            self.landed = layout.zeros_on(device)
        with lane.use():
            self.there = layout.zeros_on(device)
        self.arrays: Unroll = layout.arrays(self.here)
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
