"""Batches: when to take one, which requests can share it, whose rows are whose; a tally of all.

Nothing here waits, and only ``Batch.answer`` and ``Batch.fail`` touch a future; ``batcher`` adds
the event loop, the thread and the queue.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import optree

from asyncagent.errors import AlreadyAnswered, BadBatch
from asyncagent.tracks import COMPUTES, COPIES, Track

Nest: TypeAlias = Any
"""Any tree that ``optree`` walks; here every leaf is an array or tensor of shape [rows, ...]."""

Future: TypeAlias = "asyncio.Future[Any]"


class Request(NamedTuple):
    """What one caller asked, and where it waits."""

    future: Future
    rows: int
    made_s: float
    """When it was asked, seconds of the event loop's clock."""
    leaves: Sequence[Any]
    """Arrays or tensors [rows, ...], in the order of ``Form.leaves``."""


@dataclass(frozen=True, slots=True)
class FlushRule:
    """When a batch is taken: plain arithmetic, time is an argument."""

    minimum_batch_size: int
    """Rows that are worth a batch, >= 1."""
    timeout_s: float
    """Longest time the oldest request waits for others, >= 0 seconds."""

    def deadline_s(self, oldest_s: float) -> float:
        """When a request made at ``oldest_s`` has waited long enough; same clock, seconds."""
        return oldest_s + self.timeout_s

    def due(
        self,
        *,
        rows: int,
        oldest_s: float,
        now_s: float,
        requests: int = 0,
        callers: int = 0,
        computing: bool = False,
    ) -> bool:
        """Whether to take a batch now.

        Args:
          rows: rows waiting.
          oldest_s: when the oldest waiting request was made, seconds.
          now_s: the time now, same clock.
          requests: requests waiting.
          callers: registered callers, each of which makes one request at a time; 0 if none are.
          computing: a batch is being computed: nothing is due until it ends.
        """
        if computing or rows == 0:
            return False
        everyone_waits = 0 < callers <= requests
        return (
            rows >= self.minimum_batch_size or everyone_waits or now_s >= self.deadline_s(oldest_s)
        )


class Batch:
    """Whole requests that are computed together and answered exactly once.

    ``compute`` runs on any thread; ``answer`` and ``fail`` on the event loop's.
    """

    def __init__(self, requests: Sequence[Request], form: Form) -> None:
        futures, sizes, _, leaves = zip(*requests, strict=True)
        self._futures, self._sizes, self._leaves = futures, sizes, leaves
        self._form = form
        self._answered = False
        self.rows = sum(sizes)
        self.requests = len(sizes)

    def compute(self, fn: Callable[..., Nest], track: Track | None = None) -> Sequence[Nest]:
        """``fn`` of all rows; returns each request's share. BadBatch if ``fn`` miscounts.

        ``track`` is told of copying and computing.
        """
        track = track or Track(3)
        track.enter(COPIES)
        args = self._form.concatenate(self._leaves)
        track.enter(COMPUTES)
        outputs = fn(*args)
        track.enter(COPIES)
        return _split(outputs, self._sizes)

    def answer(self, results: Sequence[Nest]) -> None:
        """Give every waiter its rows; the departed are skipped. AlreadyAnswered if repeated."""
        self._close()
        for future, result in zip(self._futures, results, strict=True):
            if not future.done():
                future.set_result(result)

    def fail(self, error: Exception) -> None:
        """Raise ``error`` in every waiter, as ``answer`` would give it its rows."""
        self._close()
        for future in self._futures:
            if not future.done():
                future.set_exception(error)

    def _close(self) -> None:
        if self._answered:
            raise AlreadyAnswered(f"a batch of {self.requests} requests was answered before")
        self._answered = True


@dataclass(frozen=True, slots=True)
class LeafForm:
    """One leaf of a request, but for its number of rows."""

    kind: type[Any]
    """np.ndarray or torch.Tensor."""
    dtype: Any
    row_shape: tuple[int, ...]
    device: Any
    """None for arrays."""

    def __str__(self) -> str:
        shape = ", ".join(["n", *map(str, self.row_shape)])
        where = "" if self.device is None else f" on {self.device}"
        return f"{self.kind.__name__} {self.dtype} [{shape}]{where}"


@dataclass(frozen=True, slots=True)
class Form:
    """What all requests of a batch have in common: everything but the number of rows."""

    treespec: optree.PyTreeSpec | None
    """Structure of the tuple of arguments; None if each argument is itself an array."""
    leaves: tuple[LeafForm, ...]

    @classmethod
    def of(cls, args: tuple[Nest, ...]) -> tuple[Form, int, Sequence[Any]]:
        """Form, rows and leaves of a request; BadBatch says what is wrong with it."""
        leaves, treespec = _flatten(args)
        rows = _count_rows(leaves)
        forms = tuple(
            LeafForm(
                np.ndarray if isinstance(leaf, np.ndarray) else sys.modules["torch"].Tensor,
                leaf.dtype,
                tuple(leaf.shape[1:]),
                None if isinstance(leaf, np.ndarray) else leaf.device,
            )
            for leaf in leaves
        )
        flat = len(leaves) == len(args) and all(map(_is_array, args))
        return cls(None if flat else treespec, forms), rows, leaves

    def match(self, args: tuple[Nest, ...]) -> tuple[int, Sequence[Any]] | None:
        """Rows and leaves of a request of this form; None if it may be of another. Fast."""
        leaves: Sequence[Any] = args
        if self.treespec is not None:
            leaves, treespec = _flatten(args)
            if treespec != self.treespec:
                return None
        elif len(args) != len(self.leaves):
            return None
        rows = -1
        for leaf, form in zip(leaves, self.leaves, strict=True):
            if type(leaf) is not form.kind or leaf.dtype != form.dtype:
                return None
            shape = leaf.shape
            if not shape or shape[1:] != form.row_shape:
                return None
            if rows != shape[0]:
                if rows >= 0:
                    return None
                rows = shape[0]
            if form.device is not None and leaf.device != form.device:
                return None
        return rows, leaves

    def concatenate(self, requests: Sequence[Sequence[Any]]) -> tuple[Nest, ...]:
        """The arguments of the batched function, from the leaves of every request."""
        columns = requests[0]
        if len(requests) > 1:
            columns = [_concatenate(column) for column in zip(*requests, strict=True)]
        if self.treespec is None:
            return tuple(columns)
        args: Nest = self.treespec.unflatten(columns)
        return tuple(args)

    def __str__(self) -> str:
        leaves = ", ".join(map(str, self.leaves))
        return f"({leaves})" if self.treespec is None else f"{self.treespec} with ({leaves})"


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a batcher has done since it was made. Differences of two records: ``since``."""

    batches: int
    """Batches whose computation has ended, well or not."""
    requests: int
    """Requests in those batches."""
    rows: int
    """Rows in those batches."""
    batch_size_histogram: tuple[int, ...]
    """Element k counts the batches of 2**k to 2**(k+1) - 1 rows."""
    computing_s: float
    """Seconds spent concatenating, in the function and splitting."""
    idle_s: float
    """Seconds, since the first request, without a batch to compute."""
    pending_requests: int
    """Requests that wait to be taken, now."""
    pending_rows: int
    """Rows of those requests, now."""

    @property
    def mean_batch_size(self) -> float:
        """Rows per batch; 0 before the first."""
        return self.rows / self.batches if self.batches else 0.0

    def since(self, earlier: Statistics) -> Statistics:
        """What happened after ``earlier`` was taken; what is pending stays as it is now."""
        histogram = zip(self.batch_size_histogram, earlier.batch_size_histogram, strict=True)
        return Statistics(
            batches=self.batches - earlier.batches,
            requests=self.requests - earlier.requests,
            rows=self.rows - earlier.rows,
            batch_size_histogram=tuple(now - before for now, before in histogram),
            computing_s=self.computing_s - earlier.computing_s,
            idle_s=self.idle_s - earlier.idle_s,
            pending_requests=self.pending_requests,
            pending_rows=self.pending_rows,
        )


class Tally:
    """Counts batches, and the seconds with and without one."""

    def __init__(self, maximum_batch_size: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._histogram = [0] * maximum_batch_size.bit_length()
        self._batches = self._requests = self._rows = 0
        self._computing_s = self._idle_s = 0.0
        self._idle_since_s: float | None = None

    def open(self) -> None:
        """From the first request on, time without a batch is idle time."""
        if self._idle_since_s is None:
            self._idle_since_s = self._clock()

    def batch_began(self) -> None:
        """A batch is being computed."""
        if self._idle_since_s is not None:
            self._idle_s += self._clock() - self._idle_since_s
            self._idle_since_s = None

    def batch_ended(self, batch: Batch, seconds: float) -> None:
        """``batch`` took so many seconds, and none is being computed."""
        self._batches += 1
        self._requests += batch.requests
        self._rows += batch.rows
        self._histogram[batch.rows.bit_length() - 1] += 1
        self._computing_s += seconds
        self._idle_since_s = self._clock()

    def statistics(self, pending_requests: int, pending_rows: int) -> Statistics:
        """What has been done until now."""
        idle_s = self._idle_s
        if self._idle_since_s is not None:
            idle_s += self._clock() - self._idle_since_s
        return Statistics(
            batches=self._batches,
            requests=self._requests,
            rows=self._rows,
            batch_size_histogram=tuple(self._histogram),
            computing_s=self._computing_s,
            idle_s=idle_s,
            pending_requests=pending_requests,
            pending_rows=pending_rows,
        )


def _flatten(nest: Nest) -> tuple[Sequence[Any], optree.PyTreeSpec]:
    return optree.tree_flatten(nest)


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray):
        return True
    torch = sys.modules.get("torch")  # whoever holds a tensor has imported torch
    return torch is not None and isinstance(leaf, torch.Tensor)


def _count_rows(leaves: Sequence[Any]) -> int:
    """The number of rows that all leaves have; BadBatch if there is none such."""
    if not leaves:
        raise BadBatch("a nest without arrays")
    for leaf in leaves:
        if not _is_array(leaf):
            raise BadBatch(f"a leaf is a {type(leaf).__name__}, not an array or tensor")
        if leaf.ndim == 0:
            raise BadBatch("a leaf is a scalar: it has no rows")
    counts = {int(leaf.shape[0]) for leaf in leaves}
    if len(counts) > 1:
        raise BadBatch(f"the leaves of a nest differ in their number of rows: {sorted(counts)}")
    return counts.pop()


def _concatenate(column: Sequence[Any]) -> Any:
    if isinstance(column[0], np.ndarray):
        return np.concatenate(column)
    return sys.modules["torch"].cat(column)


def _split(outputs: Nest, sizes: Sequence[int]) -> Sequence[Nest]:
    """Views of each request's rows; BadBatch if the leaves do not have sum(sizes) rows."""
    leaves, treespec = _flatten(outputs)
    rows = _count_rows(leaves)
    if rows != sum(sizes):
        raise BadBatch(f"the batched function answered {sum(sizes)} rows with {rows}")
    if len(sizes) == 1:
        return [outputs]
    columns = [_split_leaf(leaf, sizes) for leaf in leaves]
    if treespec.is_leaf():
        return columns[0]
    return [treespec.unflatten(row) for row in zip(*columns, strict=True)]


def _split_leaf(leaf: Any, sizes: Sequence[int]) -> Sequence[Any]:
    if not isinstance(leaf, np.ndarray):
        parts: Sequence[Any] = leaf.split(sizes)
        return parts
    if sizes.count(sizes[0]) == len(sizes):
        # Equal shares: walking over a view of shape [shares, rows, ...] halves the time.
        return list(leaf.reshape(len(sizes), sizes[0], *leaf.shape[1:]))
    ends = list(itertools.accumulate(sizes))
    return [leaf[end - size : end] for end, size in zip(ends, sizes, strict=True)]
