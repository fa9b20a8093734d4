"""What gymnasium's spaces are here: an action space and how to act in it, arrays and how to read.

Importing this imports gymnasium.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from asyncagent.envs import instructions
from asyncagent.errors import UsageError
from asyncagent.structs import (
    ActionArray,
    ActionSpace,
    ArraySpec,
    Box,
    Discrete,
    FloatArray,
    IntArray,
    MultiDiscrete,
    Nest,
)

_ACTIONS = "Discrete, MultiDiscrete, MultiBinary, Tuple or Dict of these, or Box of floats"
_OBSERVATIONS = "Box, Discrete, MultiDiscrete, MultiBinary, Text, Tuple or Dict of these"


class Actions(NamedTuple):
    """An action space of gymnasium's, in our terms."""

    space: ActionSpace
    to_env: Callable[[ActionArray], Any]
    """An action as ``space.array`` says, to what the environment's ``step`` takes; a fresh one."""


class Observations(NamedTuple):
    """An observation space of gymnasium's, in our terms."""

    spec: Nest
    """One ArraySpec, or a dict of them where the space is a Dict or a Tuple."""
    from_env: Callable[[Any], Nest]
    """What the environment shows, to arrays of the dtypes in ``spec``; ValueError if that fails.

    Shapes are as the environment gives them.  An array may be the environment's own, to which it
    may write in its next step."""


def actions(space: spaces.Space[Any]) -> Actions:
    """How a policy acts in ``space``; UsageError where it cannot.

    A Discrete stays one; choices in any arrangement are flattened to one MultiDiscrete; a Box of
    floats becomes ``structs.Box``: -1 and 1 stand for finite bounds, and all is clipped.
    """
    if isinstance(space, spaces.Box):
        return _real(space)
    sizes, to_env = _choices(space)
    if not sizes:
        raise _unsupported("action", space, "", "spaces with a choice in them")
    if isinstance(space, spaces.Discrete):
        return Actions(Discrete(*sizes), lambda action: to_env(action[np.newaxis]))
    return Actions(MultiDiscrete(sizes), to_env)


def _real(space: spaces.Box) -> Actions:
    if space.dtype.kind != "f":
        raise _unsupported("action", space, "", _ACTIONS)
    shape, dtype = space.shape, space.dtype
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    finite = np.isfinite(low) & np.isfinite(high)
    scale = np.where(finite, high, 1) / 2 - np.where(finite, low, -1) / 2
    offset = np.where(finite, high, 0) / 2 + np.where(finite, low, 0) / 2

    def to_env(action: ActionArray) -> npt.NDArray[Any]:
        # Clipped after the rounding to the environment's own precision, which may go beyond.
        own = (action.reshape(shape) * scale + offset).astype(dtype)
        clipped: npt.NDArray[Any] = np.clip(own, space.low, space.high)
        return clipped

    return Actions(Box(low.size, bounded=bool(finite.all())), to_env)


def _choices(space: spaces.Space[Any]) -> tuple[tuple[int, ...], Callable[[IntArray], Any]]:
    """The sizes of the choices in ``space``, and what gives as many numbers the space's form."""
    if isinstance(space, spaces.Discrete):
        kind, start = space.dtype.type, int(space.start)
        return (int(space.n),), lambda numbers: kind(start + numbers[0])
    if isinstance(space, spaces.MultiDiscrete):
        shape, dtype, first = space.shape, space.dtype, space.start
        sizes = tuple(int(size) for size in space.nvec.flat)
        return sizes, lambda numbers: (numbers.reshape(shape) + first).astype(dtype)
    if isinstance(space, spaces.MultiBinary):
        shape, dtype = space.shape, space.dtype
        return (2,) * math.prod(shape), lambda numbers: numbers.reshape(shape).astype(dtype)
    if not isinstance(space, spaces.Tuple | spaces.Dict):
        raise _unsupported("action", space, "", _ACTIONS)
    inside = dict(space.spaces) if isinstance(space, spaces.Dict) else dict(enumerate(space.spaces))
    parts = {key: _choices(part) for key, part in inside.items()}
    ends = np.cumsum([len(sizes) for sizes, _ in parts.values()])[:-1]

    def to_env(numbers: IntArray) -> Any:
        pieces = zip(parts.items(), np.split(numbers, ends), strict=True)
        values = {key: make(piece) for (key, (_, make)), piece in pieces}
        return values if isinstance(space, spaces.Dict) else tuple(values.values())

    return tuple(size for sizes, _ in parts.values() for size in sizes), to_env


def observations(space: spaces.Space[Any]) -> Observations:
    """How observations in ``space`` become arrays; UsageError where they cannot.

    Pictures (uint8 Box, 0 to 255, [H, W, C] or [C, H, W]; [H, W] gets C = 1 in front) stay as they
    are.  Any other Box becomes float32 of its shape, Discrete a one-hot float32 vector,
    MultiDiscrete its choices' one-hot vectors one after the other, MultiBinary float32,
    Text a sentence (see ``instructions``).  Dict and Tuple become a flat dict; the keys of those
    inside are joined by "/".
    """
    leaves = dict(_leaves(space, ""))
    if not leaves:
        raise _unsupported("observation", space, "", "spaces with an array in them")
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        leaf = leaves[""]
        return Observations(leaf.spec, lambda seen: _read(leaf, "", seen))
    return Observations(
        {key: leaf.spec for key, leaf in leaves.items()},
        lambda seen: {key: _read(leaf, key, seen) for key, leaf in leaves.items()},
    )


class _Leaf(NamedTuple):
    spec: ArraySpec
    convert: Callable[[Any], npt.NDArray[Any]]
    path: tuple[Any, ...] = ()
    """Keys and indices that lead to it."""


def _leaves(space: spaces.Space[Any], key: str) -> Iterator[tuple[str, _Leaf]]:
    if isinstance(space, spaces.Dict | spaces.Tuple):
        inside = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        seen = set()
        for step, part in inside:
            for name, leaf in _leaves(part, f"{key}/{step}" if key else str(step)):
                if name in seen:
                    raise UsageError(f"two parts of the observation are called {name!r}")
                seen.add(name)
                yield name, leaf._replace(path=(step, *leaf.path))
    elif isinstance(space, spaces.Box):
        yield key, _box(space, key)
    elif isinstance(space, spaces.Discrete):
        yield key, _one_hots(space.n, space.start)
    elif isinstance(space, spaces.MultiDiscrete):
        yield key, _one_hots(space.nvec, space.start)
    elif isinstance(space, spaces.MultiBinary):
        yield key, _Leaf(ArraySpec(space.shape, "float32"), _floats)
    elif isinstance(space, spaces.Text):
        yield key, _Leaf(instructions.SPEC, instructions.tokenise)
    else:
        raise _unsupported("observation", space, key, _OBSERVATIONS)


def _box(space: spaces.Box, key: str) -> _Leaf:
    rank, shape = len(space.shape), space.shape
    if space.dtype != np.uint8 or rank < 2 or (space.low != 0).any() or (space.high != 255).any():
        # Every array has an axis to flatten into features.
        return _Leaf(ArraySpec(shape or (1,), "float32"), _floats if shape else _number)
    if rank > 3:
        raise _unsupported("observation", space, key, "pictures as [H, W, C], [C, H, W] or [H, W]")
    if rank == 2:
        return _Leaf(ArraySpec((1, *shape), "uint8"), lambda seen: _bytes(seen)[np.newaxis])
    return _Leaf(ArraySpec(shape, "uint8"), _bytes)


def _bytes(seen: Any) -> npt.NDArray[Any]:
    array = np.asarray(seen)
    if array.dtype != np.uint8:
        raise ValueError(f"must be uint8, not {array.dtype}")
    return array


def _floats(seen: Any) -> FloatArray:
    array = np.asarray(seen, np.float32)
    if not np.isfinite(array).all():
        raise ValueError("must be finite")
    return array


def _number(seen: Any) -> FloatArray:
    return _floats(seen)[np.newaxis]


def _one_hots(num_choices: Any, start: Any) -> _Leaf:
    sizes, starts = (np.asarray(array, np.int64).reshape(-1) for array in (num_choices, start))
    ends = np.cumsum(sizes)
    begins, total = ends - sizes, int(ends[-1])

    def convert(seen: Any) -> FloatArray:
        numbers = np.asarray(seen).reshape(-1)
        if numbers.shape != sizes.shape or numbers.dtype.kind not in "biu":
            raise ValueError(f"must be integers, {len(sizes)} in all, not {seen}")
        choice = numbers.astype(np.int64) - starts
        if ((choice < 0) | (choice >= sizes)).any():
            raise ValueError(f"must be at least {starts} and below {starts + sizes}, not {seen}")
        one_hots = np.zeros(total, np.float32)
        one_hots[begins + choice] = 1
        return one_hots

    return _Leaf(ArraySpec((total,), "float32"), convert)


def _read(leaf: _Leaf, key: str, seen: Any) -> npt.NDArray[Any]:
    try:
        for step in leaf.path:
            seen = seen[step]
        return leaf.convert(seen)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        name = f"observation {key!r}" if key else "observation"
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from error


def _unsupported(what: str, space: spaces.Space[Any], key: str, supported: str) -> UsageError:
    where = f" {key!r}" if key else ""
    brief = textwrap.shorten(str(space), 120, placeholder=" ...")
    return UsageError(f"{what} space{where} {brief} is not supported: only {supported}")
