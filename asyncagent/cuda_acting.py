"""The policy's batches on a CUDA device: padded to a few sizes, each of them one graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from asyncagent.cuda import Graphs, Layout, Replayed, padded_rows, wait_for
from asyncagent.structs import ActionSpace, Nest, map_nest
from asyncagent.tracks import COMPUTES, COPIES, Track

Forward = Callable[..., tuple[Tensor, Nest]]
"""(observation, reward, last_action, first, core_state), tensors [N, ...] -> logits float32
[N, A] and core state [N, ...]; on the device."""


class PaddedBatches:
    """Answers batches of any number of rows. Belongs to one thread.

    Rows go to the device in one transfer out of pinned memory, and the answers come back in one.
    """

    def __init__(
        self, forward: Forward, choose: Callable[[Tensor], Tensor], actions: ActionSpace,
        graphs: Graphs, track: Track | None = None,
    ) -> None:  # fmt: skip
        """``forward`` is recorded, ``choose(logits) -> action`` is not: it draws at random.

        ``track`` is told of copying and computing.
        """
        self._track = track or Track(3)
        self._forward = forward
        self._choose = choose
        self._actions = actions
        self._graphs = graphs
        self._batches: dict[int, _Batch] = {}

    def __call__(self, inputs: Nest, num_rows: int) -> tuple[np.ndarray, np.ndarray, Nest]:
        """(action, logits, core state) [N, ...] of the arrays ``inputs`` [N, ...], as ``Forward``.

        The arrays are new: nobody writes to them again.
        """
        size = padded_rows(num_rows)
        batch = self._batches.get(size)
        if batch is None:
            batch = _Batch(size, inputs, self._forward, self._actions, self._graphs)
            self._batches[size] = batch
        return batch.answer(inputs, num_rows, self._choose, self._track)


class _Batch:
    """Everything that batches of one padded size need."""

    def __init__(
        self, size: int, example: Nest, forward: Forward, actions: ActionSpace, graphs: Graphs
    ) -> None:
        def rows(leaf: np.ndarray) -> np.ndarray:
            return np.empty((size, *leaf.shape[1:]), leaf.dtype)

        one = actions.array
        answer = (
            np.empty((size, *one.shape), one.dtype),
            np.empty((size, actions.num_logits), np.float32),
            map_nest(rows, example[-1]),
        )
        self._forward = forward
        self._graphs = graphs
        self._inputs_layout = Layout(map_nest(rows, example))
        answer_layout = Layout(answer)
        device = graphs.lane.device
        # Padding rows are zeros first, then what earlier batches left there: rows that are as
        # good as any, and no other row depends on them.
        self._inputs_here = self._inputs_layout.zeros_pinned_for(device)
        self._inputs_there = self._inputs_layout.zeros_on(device)
        self._answer_here = answer_layout.zeros_pinned_for(device)
        self._answer_there = answer_layout.zeros_on(device)
        self._arrays = self._inputs_layout.arrays(self._inputs_here)
        self._inputs = self._inputs_layout.tensors(self._inputs_there)
        self._action, *self._outputs = answer_layout.tensors(self._answer_there)
        self._answer = answer_layout.arrays(self._answer_here)
        self._compute_all = Replayed(lambda: self._compute(size), graphs)

    def answer(
        self, inputs: Nest, num_rows: int, choose: Callable[[Tensor], Tensor], track: Track
    ) -> tuple[np.ndarray, np.ndarray, Nest]:
        track.enter(COPIES)
        map_nest(lambda target, leaf: np.copyto(target[:num_rows], leaf), self._arrays, inputs)
        used = self._inputs_layout.bytes_of(num_rows)
        self._inputs_there[:used].copy_(self._inputs_here[:used], non_blocking=True)
        track.enter(COMPUTES)
        if self._graphs.gave_up:
            self._compute(num_rows)
        else:
            self._compute_all()
        logits: Tensor = self._outputs[0][:num_rows]
        self._action[:num_rows].copy_(choose(logits))
        self._answer_here.copy_(self._answer_there, non_blocking=True)
        wait_for(self._graphs.lane.mark())
        track.enter(COPIES)
        # Copies: what comes next overwrites these arrays, while actors keep theirs.
        action, logits_here, core_state = map_nest(lambda a: a[:num_rows].copy(), self._answer)
        return action, logits_here, core_state

    def _compute(self, rows: int) -> None:
        outputs = self._forward(*map_nest(lambda leaf: leaf[:rows], self._inputs))
        map_nest(lambda target, leaf: target[:rows].copy_(leaf), self._outputs, list(outputs))
