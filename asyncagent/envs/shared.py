"""What a worker process and the group over it have in common: a block of memory, a few bytes.

The memory holds marks (what the worker is doing), a message, and arrays that are laid out by the
spec alone, so that both sides find the same ones in it.  Over a pipe the group asks with one byte
for a row in a slot; over another the worker answers with one byte: ``ROW``, ``EVENTS`` or
``MESSAGE``.  The message is JSON: at first the group's ``Hello``; later, from the worker,
``{"losses": [[env_index, reason], ...]}`` with a row, or, in place of one, ``{"spec": ...}`` or
``{"usage_error": text}``.
"""

from __future__ import annotations

import dataclasses
import json
from mmap import mmap
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from asyncagent.envs.base import EnvRecipe
from asyncagent.errors import UsageError
from asyncagent.structs import (
    ActionArray,
    ActionSpace,
    ArraySpec,
    BoolArray,
    Box,
    Discrete,
    EnvSpec,
    FloatArray,
    IntArray,
    MultiDiscrete,
    Nest,
    map_nest,
)

NUM_SLOTS = 2
"""Rows that have a place in the memory. Row k is overwritten when row k + 2 is asked for."""

ROW = b"."
"""The worker's answer: the row is there, and none of its flags is True."""
EVENTS = b"!"
"""The row is there; where an episode ended, ``game_return`` and ``game_steps`` are, too."""
MESSAGE = b"+"
"""There is a message; if it tells of losses, there also is a row."""

ONLY_LOST = 128
"""Added to the slot in a request: try again what is lost in the row there."""

MAX_REASON = 200
"""Characters of what a loss says."""

_ALIGNMENT = 64
_MESSAGE_AT = 64
_ARRAYS_AT = 65536
MAX_MESSAGE = _ARRAYS_AT - _MESSAGE_AT
"""Bytes."""


class Mark:
    """Places in the marks."""

    DOING = 0
    ENV = 1
    """Which environment the worker is at."""
    CALLS = 2
    """Times it made, reset or closed an environment."""
    MESSAGE_BYTES = 3
    COUNT = 4


class Doing:
    """What a worker says it is doing, in the mark of that name."""

    NOTHING = 0
    MAKING = 1
    RESETTING = 2
    STEPPING = 3
    CLOSING = 4


class SharedRow(NamedTuple):
    """One row of E environments; see ``EnvStep``."""

    observation: Nest
    """[E, ...] per leaf."""
    reward: FloatArray
    game_return: npt.NDArray[np.float64]
    """float64 [E]: what the finished game came to, in the end row of an episode."""
    game_steps: IntArray
    """int64 [E]: and how many steps it took."""
    flags: BoolArray
    """bool [4, E]: terminated, truncated, first, lost."""


class SharedArrays(NamedTuple):
    """Everything in the memory but marks and message."""

    actions: ActionArray
    """[E, ...]: written by the group before it asks for a row."""
    rows: tuple[SharedRow, ...]
    """NUM_SLOTS rows: written by the worker between a request and its answer."""


def _layout(spec: EnvSpec, num_envs: int) -> SharedArrays:
    """The arrays' shapes and dtypes, in the order in which they lie."""

    def rows_of(one: ArraySpec) -> ArraySpec:
        return ArraySpec((num_envs, *one.shape), one.dtype)

    dtypes = ("float32", "float64", "int64")
    fields: list[Any] = [ArraySpec((num_envs,), dtype) for dtype in dtypes]
    fields.append(ArraySpec((4, num_envs), "bool"))
    row = SharedRow(map_nest(rows_of, spec.observation), *fields)
    actions: Any = rows_of(spec.actions.array)
    return SharedArrays(actions, (row,) * NUM_SLOTS)


def memory_size(spec: EnvSpec | None, num_envs: int) -> int:
    """Bytes of the memory; without a spec it has no arrays."""
    size = _ARRAYS_AT

    def add(leaf: ArraySpec) -> None:
        nonlocal size
        size += _aligned_bytes(leaf)

    if spec is not None:
        map_nest(add, _layout(spec, num_envs))
    return size


def marks_in(memory: mmap) -> npt.NDArray[np.uint64]:
    """uint64 [Mark.COUNT]."""
    return np.ndarray(Mark.COUNT, np.uint64, memory)


def arrays_in(memory: mmap, spec: EnvSpec, num_envs: int) -> SharedArrays:
    """Views of the memory, which stays mapped as long as one of them lives."""
    offset = _ARRAYS_AT

    def place(leaf: ArraySpec) -> npt.NDArray[Any]:
        nonlocal offset
        array: npt.NDArray[Any] = np.ndarray(leaf.shape, leaf.dtype, memory, offset)
        offset += _aligned_bytes(leaf)
        return array

    arrays: SharedArrays = map_nest(place, _layout(spec, num_envs))
    return arrays


def _aligned_bytes(leaf: ArraySpec) -> int:
    num_bytes = int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def encode_message(words: dict[str, Any]) -> bytes:
    """UsageError unless it is JSON and has room in the memory."""
    try:
        message = json.dumps(words).encode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"must be JSON: {error}") from error
    if len(message) > MAX_MESSAGE:
        raise UsageError(f"{len(message):,} bytes of JSON must be <= {MAX_MESSAGE:,}")
    return message


def write_message(memory: mmap, message: bytes) -> None:
    """Leave a message for the other side."""
    memory[_MESSAGE_AT : _MESSAGE_AT + len(message)] = message
    marks_in(memory)[Mark.MESSAGE_BYTES] = len(message)


def read_message(memory: mmap) -> dict[str, Any]:
    """What the other side wrote; ValueError if that is no message."""
    num_bytes = min(int(marks_in(memory)[Mark.MESSAGE_BYTES]), MAX_MESSAGE)
    words = json.loads(memory[_MESSAGE_AT : _MESSAGE_AT + num_bytes])
    if not isinstance(words, dict):
        raise ValueError(f"no message: {words!r}")
    return words


class Hello(NamedTuple):
    """The message that a worker finds when it starts."""

    recipe: EnvRecipe
    seeds: tuple[int, ...]
    """One per environment."""
    spec: EnvSpec | None
    """What the environments must be like; None to be told."""
    niceness: int = 0
    """Added to the worker's nice value, in [0, 19]."""
    core: int | None = None
    """The one core that the worker and its children may use; None: any."""

    def encode(self) -> bytes:
        """The message; UsageError if the recipe's options are not JSON, or too long."""
        words = {
            "maker": self.recipe.maker,
            "options": dict(self.recipe.options),
            "seeds": self.seeds,
            "spec": None if self.spec is None else spec_to_json(self.spec),
            "niceness": self.niceness,
            "core": self.core,
        }
        try:
            return encode_message(words)
        except UsageError as error:
            raise UsageError(f"options of {self.recipe.maker}: {error}") from error

    @classmethod
    def read(cls, memory: mmap) -> Hello:
        """What the group left in the memory."""
        words = read_message(memory)
        recipe = EnvRecipe(words["maker"], words["options"])
        spec = None if words["spec"] is None else spec_from_json(words["spec"])
        return cls(recipe, tuple(words["seeds"]), spec, words["niceness"], words["core"])


def next_seed(seed: int) -> int:
    """Seed of the environment that replaces the one made with ``seed``; in [0, 2**31)."""
    return int(np.random.SeedSequence((seed, 1)).generate_state(1)[0]) >> 1


_SPACES: dict[str, type[Discrete] | type[MultiDiscrete] | type[Box]] = {
    space.__name__: space for space in (Discrete, MultiDiscrete, Box)
}


def spec_to_json(spec: EnvSpec) -> dict[str, Any]:
    """The spec as an object that JSON can carry.

    Raises UsageError unless observations are one ArraySpec or a flat dict of them.
    """
    if not isinstance(spec, EnvSpec) or type(spec.actions).__name__ not in _SPACES:
        raise UsageError(f"spec must be an EnvSpec with one of {', '.join(_SPACES)}, not {spec!r}")
    return {
        "observation": _observation_to_json(spec.observation),
        "actions": [type(spec.actions).__name__, dataclasses.asdict(spec.actions)],
        "action_repeats": spec.action_repeats,
    }


def spec_from_json(words: dict[str, Any]) -> EnvSpec:
    """What ``spec_to_json`` made."""
    observation = words["observation"]
    leaves = {name: _array_from_json(leaf) for name, leaf in observation["leaves"].items()}
    name, fields = words["actions"]
    fields = {key: tuple(value) if key == "sizes" else value for key, value in fields.items()}
    actions: ActionSpace = _SPACES[name](**fields)
    return EnvSpec(leaves if observation["dict"] else leaves[""], actions, words["action_repeats"])


def _observation_to_json(observation: Nest) -> dict[str, Any]:
    leaves = observation if isinstance(observation, dict) else {"": observation}
    for name, leaf in leaves.items():
        if not isinstance(name, str) or not isinstance(leaf, ArraySpec):
            raise UsageError(
                "a spec's observation must be an ArraySpec or a dict of them by name, "
                f"not {observation!r}"
            )
        if np.dtype(leaf.dtype).name != leaf.dtype or np.dtype(leaf.dtype).hasobject:
            raise UsageError(f"dtype={leaf.dtype!r} of a spec must be a name such as 'float32'")
    return {
        "dict": isinstance(observation, dict),
        "leaves": {name: dataclasses.asdict(leaf) for name, leaf in leaves.items()},
    }


def _array_from_json(leaf: dict[str, Any]) -> ArraySpec:
    return ArraySpec(tuple(leaf["shape"]), leaf["dtype"], leaf["num_tokens"])
