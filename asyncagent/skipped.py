"""Updates that are skipped, their numbers being none: counted, told, and one kept to look at.

What is kept is read again by ``asyncagent replay-batch``: tensors, numbers and strings alone, and
nothing in it is ever executed.
"""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optree
import torch
from torch import Tensor

from asyncagent.config import Config
from asyncagent.errors import NotFinite, UsageError
from asyncagent.structs import ActionSpace, Box, Discrete, MultiDiscrete, Nest, Unroll, map_nest

FILE = "skipped_batch.pt"
"""In the run's folder: one file, of the first skipped batch, or of the one that ended the run."""
FORMAT = 1

_log = logging.getLogger(__name__)


class SkippedBatch(NamedTuple):
    """A batch that was not learned from, and all it takes to compute its loss again."""

    config: Config
    actions: ActionSpace
    num_tokens: tuple[int, ...]
    """ArraySpec.num_tokens of the observation's leaves."""
    precision: str
    """Name of the dtype of convolutions and matrix products."""
    frames: int
    """Learned from when the batch was kept."""
    update: int
    """Number of the update that was skipped."""
    weights_update: int
    """Number of the last update in ``net``; on CUDA one more may be under way by then."""
    total_loss: float
    grad_norm: float
    """As they were found."""
    batch: Unroll
    """Numpy arrays [T+1, B, ...]."""
    origins: tuple[str, ...]
    """Of each of the B columns: its level and actor, or an empty string."""
    net: dict[str, Tensor]
    """Weights, on the CPU."""


def is_skipped(total_loss: Tensor, grad_norm: Tensor) -> Tensor:
    """Whether an update with that loss and that norm must not be made; a bool scalar.

    Where the norm's square overflows, so do an optimiser's accumulators.  Nothing is read back.
    """
    return ~torch.isfinite(total_loss + grad_norm.square())


class Judged(NamedTuple):
    """An update of which is known whether it was skipped."""

    update: int
    """Its number."""
    skipped: bool
    total_loss: float
    grad_norm: float
    batch: Callable[[], Unroll]
    """Its batch; holds until the next update begins."""
    origins: Callable[[], tuple[str, ...]]


class Skips:
    """Counts the updates that were skipped; belongs to the learner's thread."""

    def __init__(self, max_in_a_row: int, path: Path) -> None:
        """NotFinite once more than ``max_in_a_row`` were; ``path``: where to keep a batch."""
        self.total = 0
        """Since this session started."""
        self._in_a_row = 0
        self._max_in_a_row = max_in_a_row
        self._path = path

    def see(self, judged: Judged, record: Callable[[Judged], SkippedBatch]) -> None:
        """Count an update; of a skipped one, tell, and now and then keep what ``record`` makes.

        Raises NotFinite where the run had better end; its line says why and what to do.
        """
        if not judged.skipped:
            self._in_a_row = 0
            return
        self.total += 1
        self._in_a_row += 1
        skipped = record(judged)
        spoilt = not_finite(skipped.net)  # then no later update can be better
        ends = bool(spoilt) or self._in_a_row > self._max_in_a_row
        reason = f"total loss {judged.total_loss:g}, gradient norm {judged.grad_norm:g}; "
        reason += first_not_finite(skipped)
        kept = self._keep(skipped) if self.total == 1 or ends else ""
        if spoilt:
            raise NotFinite(
                f"update {judged.update} was skipped, as all after it would be: {reason}; the "
                f"newest checkpoint is from before{kept}"
            )
        if ends:
            raise NotFinite(
                f"{self._in_a_row} updates in a row were skipped, up to number {judged.update} "
                f"(see --max_skipped_updates): {reason}{kept}"
            )
        # Every skip of a bad run in the log would bury all else: the 1st, 2nd, 4th, 8th ...
        if self.total & (self.total - 1) == 0:
            _log.warning("update %d was skipped: %s%s", judged.update, reason, kept)

    def _keep(self, skipped: SkippedBatch) -> str:
        try:
            save_skipped(self._path, skipped)
        except OSError as error:
            return f"; its batch could not be kept in {self._path}: {error.strerror}"
        return f"; to find out why: asyncagent replay-batch {self._path}"


class Place(NamedTuple):
    """A number of a batch."""

    field: str
    """As ``arrays_of`` names it."""
    row: int | None
    """t; None in the core state, which has no rows."""
    column: int
    value: float


def arrays_of(batch: Unroll) -> Iterator[tuple[str, np.ndarray]]:
    """Every array of the batch under its name: ``reward``, ``observation['rgb']``, ..."""
    for field, nest in batch._asdict().items():
        leaves: list[np.ndarray] = optree.tree_leaves(nest)
        for path, leaf in zip(optree.tree_paths(nest), leaves, strict=True):
            yield field + "".join(f"[{key!r}]" for key in path), leaf


def places(field: str, array: np.ndarray, wanted: np.ndarray) -> Iterator[Place]:
    """Where ``wanted``, bool of the array's shape, is True, row after row."""
    for index in zip(*np.nonzero(wanted), strict=True):
        row, column = (None, index[0]) if field.startswith("core_state") else index[:2]
        row = None if row is None else int(row)
        yield Place(field, row, int(column), float(array[index]))


def first_not_finite(skipped: SkippedBatch) -> str:
    """The first number of weights or batch that is none, in words."""
    spoilt = not_finite(skipped.net)
    if spoilt:
        return f"of the weights, {spoilt[0]} is not finite"
    for field, array in arrays_of(skipped.batch):
        if array.dtype.kind != "f":
            continue
        strange = ~np.isfinite(array)
        if field == "behaviour_logits":  # where it is -inf, an action was excluded
            strange &= skipped.batch.valid[..., None] & ~np.isneginf(array)
        for place in places(field, array, strange):
            return describe(place, skipped.origins)
    return "all numbers of its batch and of the weights are finite"


def describe(place: Place, origins: tuple[str, ...]) -> str:
    """A place in words."""
    row = "" if place.row is None else f"row {place.row} of "
    origin = origins[place.column]
    whose = f" ({origin})" if origin else ""
    return f"{place.field} is {place.value:g} at {row}column {place.column}{whose}"


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a number which is none; waits for their device once."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floats:
        return []
    good = torch.stack([torch.isfinite(tensor).all() for tensor in floats.values()])
    return [name for name, fine in zip(floats, good.tolist(), strict=True) if not fine]


def refuse_if_spoilt(net: dict[str, Tensor], optimizer: dict[str, Any], update: int) -> None:
    """NotFinite, one line, if a weight or an accumulator after that update is no number."""
    tensors = {f"the weights, {name}": tensor for name, tensor in net.items()}
    for index, values in optimizer["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"the optimiser's state, {name} of parameter {index}"] = value
    spoilt = not_finite(tensors)
    if spoilt:
        raise NotFinite(
            f"of {spoilt[0]} is not finite after update {update}: the newest checkpoint is from "
            "before; resume it with a lower --learning_rate"
        )


def save_skipped(path: Path, skipped: SkippedBatch) -> None:
    """Write a skipped batch in place of what is there; OSError where that cannot be done."""
    actions = skipped.actions
    state = {
        **skipped._asdict(),
        "format": FORMAT,
        "config": skipped.config.to_json(),
        "actions": [type(actions).__name__, *vars(actions).values()],
        "batch": {name: _plain(nest) for name, nest in skipped.batch._asdict().items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    try:
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except RuntimeError as error:  # what torch makes of a disk that is full
        raise OSError(0, str(error).splitlines()[0]) from None
    finally:
        beside.unlink(missing_ok=True)


def load_skipped(path: Path) -> SkippedBatch:
    """Read what ``save_skipped`` wrote; UsageError, one line, where that is not what it is."""
    try:
        if zipfile.ZipFile(path).testzip() is not None:  # torch does not compare the sums
            raise ValueError("its contents are damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        return _checked(state, path)
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except Exception as error:
        # Whatever a damaged file makes of the reader.
        first, *_ = [*str(error).splitlines(), ""]
        raise UsageError(
            f"{path} is not a batch that asyncagent kept: {type(error).__name__}: {first}"
        ) from None


def _checked(state: Any, path: Path) -> SkippedBatch:
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"not of format {FORMAT}")
    kind, *sizes = state["actions"]
    spaces: dict[str, Any] = {one.__name__: one for one in (Discrete, MultiDiscrete, Box)}
    values = {name: state[name] for name in SkippedBatch._fields}
    values["config"] = Config.from_json(state["config"], path)
    values["actions"] = spaces[kind](*sizes)
    values["batch"] = Unroll(**{name: _arrays(nest) for name, nest in state["batch"].items()})
    skipped = SkippedBatch(**values)
    for name in ("frames", "update", "weights_update"):
        _expect(name, isinstance(values[name], int))
    for name in ("total_loss", "grad_norm"):
        _expect(name, isinstance(values[name], float))
    _expect("precision", skipped.precision in ("bfloat16", "float32"))
    _expect("net", all(isinstance(tensor, Tensor) for tensor in skipped.net.values()))
    _expect("num_tokens", all(isinstance(count, int) for count in skipped.num_tokens))
    leaves = optree.tree_leaves(skipped.batch.observation)
    _expect("num_tokens", len(skipped.num_tokens) == len(leaves))
    _check_shapes(skipped)
    return skipped


def _check_shapes(skipped: SkippedBatch) -> None:
    batch, space = skipped.batch, skipped.actions
    rows, columns = batch.reward.shape
    _expect("reward", rows >= 2 and columns >= 1)
    steps = (rows - 1, columns)
    one = space.array.shape
    flag = ((rows, columns), "bool")
    forms = {
        "reward": ((rows, columns), "float32"),
        "terminated": flag,
        "truncated": flag,
        "first": flag,
        "last_action": ((rows, columns, *one), space.array.dtype),
        "action": ((*steps, *one), space.array.dtype),
        "behaviour_logits": ((*steps, space.num_logits), "float32"),
        "policy_version": (steps, "int64"),
        "valid": (steps, "bool"),
    }
    for name, form in forms.items():
        array = getattr(batch, name)
        _expect(name, (array.shape, str(array.dtype)) == form)
    for leaf in optree.tree_leaves(batch.observation):
        _expect("observation", leaf.shape[:2] == (rows, columns))
    for leaf in optree.tree_leaves(batch.core_state):
        _expect("core_state", leaf.shape[:1] == (columns,))
    _expect("origins", len(skipped.origins) == columns)
    _expect("origins", all(isinstance(origin, str) for origin in skipped.origins))


def _expect(field: str, good: bool) -> None:
    if not good:
        raise ValueError(f"its {field} is not what it should be")


def _plain(nest: Nest) -> Any:
    """Tensors in dictionaries and tuples, the only containers that are read again."""
    if isinstance(nest, dict):
        return {key: _plain(value) for key, value in nest.items()}
    if isinstance(nest, list | tuple):
        return tuple(_plain(value) for value in nest)
    return torch.from_numpy(np.ascontiguousarray(nest))


def _arrays(nest: Any) -> Nest:
    def array(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, Tensor):
            raise ValueError(f"{type(leaf).__name__} in place of a tensor")
        return leaf.numpy()

    return map_nest(array, nest)
