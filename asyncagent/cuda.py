"""CUDA graphs: a sequence of kernels that is recorded once and then launched as a whole.

What a graph reads and writes stays in its place, so inputs and outputs lie in blocks of bytes that
are made once (``Layout``), and cross the bus as a whole, from and to pinned memory.  On a device
that is not CUDA, a ``Lane`` does nothing and everything here computes at once.

Threads.  Every thread works on lanes of its own.  While one records, no other may synchronise the
whole device, which beginning to record does: hence ``_RECORDING``.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import numpy as np
import optree
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from asyncagent.structs import Nest

Mark: TypeAlias = Any
"""A point in a lane's work: a torch.cuda.Event; None where work is done at once."""

Record: TypeAlias = "Callable[[Callable[[], None], Lane], Callable[[], None]]"
"""(function, lane) -> what repeats the function's device work; it is not called meanwhile."""

_ALIGNMENT = 256  # bytes, as the allocator's own
_WARM_UPS = 2

_RECORDING = threading.Lock()
_log = logging.getLogger(__name__)


class Lane:
    """Device work that happens in order: a CUDA stream, or nothing but the order of calls."""

    def __init__(self, device: torch.device) -> None:
        """Begins after what the calling thread has launched on the device so far."""
        self.device = device
        self.stream: Any = None
        self.pool: Any = None
        """Memory that the lane's graphs share: they never run at once, and keep nothing in it."""
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.stream.wait_stream(torch.cuda.current_stream(device))
            self.pool = torch.cuda.graph_pool_handle()

    def use(self) -> AbstractContextManager[Any]:
        """While open, what the calling thread launches goes to this lane."""
        return torch.cuda.stream(self.stream)

    def mark(self) -> Mark:
        """The end of what has been launched on this lane until now."""
        return mark(self.stream)

    def after(self, other: Mark) -> None:
        """What is launched from now on begins once ``other`` is reached; nobody waits here."""
        if other is not None:
            self.stream.wait_event(other)


def mark(stream: Any) -> Mark:
    """The end of what has been launched on ``stream`` until now."""
    if stream is None:
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def is_reached(mark: Mark) -> bool:
    """Whether the work up to ``mark`` is done."""
    return mark is None or bool(mark.query())


def wait_for(mark: Mark) -> None:
    """Block the calling thread, and it alone, until the work up to ``mark`` is done."""
    if mark is not None:
        mark.synchronize()


class Layout:
    """Where the arrays of a nest lie in one block of bytes."""

    def __init__(self, example: Nest) -> None:
        """``example`` has the numpy arrays' shapes and dtypes; the largest will stand last."""
        leaves, self._treespec = optree.tree_flatten(example)
        self._forms: list[tuple[tuple[int, ...], np.dtype[Any]]] = [
            (leaf.shape, leaf.dtype) for leaf in leaves
        ]
        self._offsets = [0] * len(leaves)
        end: int = 0
        self._last = 0
        for index in sorted(range(len(leaves)), key=lambda index: int(leaves[index].nbytes)):
            self._offsets[index] = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = self._offsets[index] + leaves[index].nbytes
            self._last = index
        self.num_bytes = end

    def bytes_of(self, rows: int) -> int:
        """Bytes from the block's beginning to the end of row ``rows - 1`` of the last array."""
        shape, dtype = self._forms[self._last]
        return self._offsets[self._last] + rows * dtype.itemsize * math.prod(shape[1:])

    def zeros_on(self, device: torch.device) -> Tensor:
        """A block of zeros on ``device``."""
        return torch.zeros(self.num_bytes, dtype=torch.uint8, device=device)

    def zeros_pinned_for(self, device: torch.device) -> Tensor:
        """A block of zeros on the host, in pinned memory if ``device`` is another."""
        return torch.zeros(self.num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def arrays(self, block: Tensor) -> Nest:
        """The nest's numpy arrays, in a block on the host."""
        array = block.numpy()
        return self._views(lambda start, stop, dtype: array[start:stop].view(dtype))

    def tensors(self, block: Tensor) -> Nest:
        """The nest's tensors, in a block on any device."""
        return self._views(lambda start, stop, dtype: block[start:stop].view(_torch_dtype(dtype)))

    def _views(self, view: Callable[[int, int, np.dtype[Any]], Any]) -> Nest:
        leaves = [
            view(start, start + dtype.itemsize * math.prod(shape), dtype).reshape(shape)
            for (shape, dtype), start in zip(self._forms, self._offsets, strict=True)
        ]
        return self._treespec.unflatten(leaves)


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def padded_rows(rows: int, least: int = 8) -> int:
    """The next of ``least`` (a power of two) and its 1.5-, 2-, 3-, 4-, 6-... fold.

    At most a third of so many rows is padding, once there are more than ``least``.
    """
    power = max(least, 1 << (rows - 1).bit_length())
    between = power * 3 // 4
    return between if power > least and rows <= between else power


def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Overwrite every target with its source: a launch or two for each pair of dtypes."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        group = groups[target.dtype, source.dtype, source.device]
        group[0].append(target)
        group[1].append(source)
    for group in groups.values():
        torch._foreach_copy_(*group)


def record_graph(function: Callable[[], None], lane: Lane) -> Callable[[], None]:
    """Record the CUDA work of ``function``; what is returned launches it on the current stream."""
    graph = torch.cuda.CUDAGraph()
    with (
        _RECORDING,
        # By default, any allocation on another thread would spoil it.
        torch.cuda.graph(
            graph, pool=lane.pool, stream=lane.stream, capture_error_mode="thread_local"
        ),
    ):
        function()
    return graph.replay


class Graphs:
    """Records functions of one lane; once one cannot be recorded, none is, and a log line says so.

    Belongs to one thread.
    """

    def __init__(self, name: str, lane: Lane, record: Record = record_graph) -> None:
        """``name``: what the functions do, for the log."""
        self.lane = lane
        self.gave_up = False
        self._name = name
        self._record = record

    def give_up(self, reason: str) -> None:
        """Call functions as they are from now on."""
        self.gave_up = True
        _log.warning("%s runs without CUDA graphs: %s", self._name, reason)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """``function`` recorded, or the function itself."""
        try:
            return function if self.gave_up else self._record(function, self.lane)
        except RuntimeError as error:
            first, *_ = [*str(error).splitlines(), ""]
            self.give_up(first)
            return function


class Replayed:
    """A function without arguments whose device work is always the same: called, then replayed.

    The first calls are made as they are: libraries set themselves up, and what must not be
    recorded is found.
    """

    def __init__(self, function: Callable[[], None], graphs: Graphs) -> None:
        """Reads and writes memory that stays; any other effect of ``function`` happens at most
        in the first calls."""
        self._function = function
        self._graphs = graphs
        self._calls = 0
        self._repeat: Callable[[], None] | None = None

    def __call__(self) -> None:
        """Launch the function's work on the lane, which the caller uses."""
        if self._repeat is not None:
            self._repeat()
        elif self._graphs.gave_up:
            self._function()
        elif self._calls < _WARM_UPS:
            self._calls += 1
            with _Watch() as watch:
                self._function()
            if watch.found:
                self._graphs.give_up(f"{watch.found} waits for the device")
        else:
            self._repeat = self._graphs.record(self._function)
            self._repeat()


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds the first operator that waits for the device: a recording would break off there.

    Such are those whose result, or the shape of it, depends on data, and copies between devices.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.found and _waits(func, (args, kwargs), result):
            self.found = str(func)
        return result


_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_aten = torch.ops.aten
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_COPYING = {_aten._to_copy, _aten.copy_, _aten.copy}


def _waits(func: Any, arguments: Any, result: Any) -> bool:
    packet = func.overloadpacket
    tensors = _tensors(arguments)
    if packet in _INDEXING:
        # Integers gather or scatter; where a mask is True has to be counted first.
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])
    if _DATA_DEPENDENT & set(func.tags):
        return True
    # A single number on the host travels with the kernel, unless it is what is copied.
    copies = packet in _COPYING
    everything = tensors + _tensors(result)
    return len({one.device.type for one in everything if one.dim() or copies}) > 1


def _tensors(nest: Any) -> list[Tensor]:
    return [leaf for leaf in optree.tree_leaves(nest) if isinstance(leaf, Tensor)]
