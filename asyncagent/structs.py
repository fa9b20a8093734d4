"""What travels between environments, policy, actors and learner.

Shapes: ``E`` environments of one group, ``T`` agent steps of one unroll, ``A`` actions.
A *nest* is any tree of arrays that ``optree`` walks (an array, tuple, dict, named tuple).

Time, written once for the whole program.  Row ``t`` of an unroll belongs to the observation
``x_t``: ``reward[t]``, ``terminated[t]``, ``truncated[t]`` and ``last_action[t]`` describe the
step that *led to* ``x_t``; ``action[t]`` and ``behaviour_logits[t]`` are what was chosen *at*
``x_t``.  An episode's *end row* holds its final observation, last reward and end flag; the action
chosen there goes nowhere.  The row after it opens the next episode: ``first`` True, reward 0,
last_action 0.  Row ``T`` carries no action: it is row 0 of the next unroll.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import optree

Nest: TypeAlias = Any
"""A tree of arrays (or of specs) that optree walks."""

BoolArray: TypeAlias = npt.NDArray[np.bool_]
FloatArray: TypeAlias = npt.NDArray[np.float32]
IntArray: TypeAlias = npt.NDArray[np.int64]


def map_nest(function: Callable[..., Any], nest: Nest, *others: Nest) -> Nest:
    """``function(leaf, ...)`` of every leaf, in a nest of the same structure."""
    return optree.tree_map(function, nest, *others)


@dataclass(frozen=True)
class ArraySpec:
    """Shape (without any leading E or T) and dtype name of one array."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class EnvSpec:
    """What a policy must know of an environment."""

    observation: Nest
    """Nest of ArraySpec, in the engine's own layout (Atari: uint8 [4, 84, 84])."""
    num_actions: int
    """Size A of the discrete action space."""
    action_repeats: int
    """Frames the engine advances per agent step."""


class Episode(NamedTuple):
    """One finished *game*, whatever ended the training episodes inside it."""

    level_name: str
    episode_return: float
    """Undiscounted, unclipped sum of rewards over the whole game."""
    steps: int
    """Agent steps taken; frames are steps * action_repeats."""
    env_index: int
    """Which environment of its group, in [0, E)."""


class EnvStep(NamedTuple):
    """One row of every environment of a group."""

    observation: Nest
    """[E, ...] in the engine's layout; the group does not write to it again."""
    reward: FloatArray
    """float32 [E], unclipped, of the step that led to this observation; 0 where ``first``."""
    terminated: BoolArray
    """bool [E]: this is the end row of an episode that ended by the rules."""
    truncated: BoolArray
    """bool [E]: this is the end row of an episode that a time limit cut off."""
    first: BoolArray
    """bool [E]: this observation opens an episode."""
    episodes: tuple[Episode, ...] = ()
    """The games that ended with this row."""


class PolicyStep(NamedTuple):
    """The policy's answer for every environment of a group."""

    action: IntArray
    """int64 [E]."""
    logits: FloatArray
    """float32 [E, A]: of the forward pass that chose ``action``."""
    core_state: Nest
    """Recurrent state after this row, float32 [E, ...] per leaf; () without recurrence."""
    policy_version: IntArray
    """int64 [E]: number of updates in the weights that acted."""


class Unroll(NamedTuple):
    """Consecutive rows of E environments; time-major. The last row is the next unroll's first."""

    observation: Nest
    """[T+1, E, ...]."""
    reward: FloatArray
    """float32 [T+1, E], unclipped; reward[t] led to x_t."""
    terminated: BoolArray
    """bool [T+1, E]."""
    truncated: BoolArray
    """bool [T+1, E]."""
    first: BoolArray
    """bool [T+1, E]: x_t opens an episode; the core state is zeroed before consuming row t."""
    last_action: IntArray
    """int64 [T+1, E]: the action that led to x_t; 0 where first."""
    action: IntArray
    """int64 [T, E]: chosen at x_t."""
    behaviour_logits: FloatArray
    """float32 [T, E, A]: of the forward pass that chose action[t]."""
    policy_version: IntArray
    """int64 [T, E]."""
    valid: BoolArray
    """bool [T, E]: False where action[t] went nowhere (end rows, lost rows)."""
    core_state: Nest
    """float32 [E, ...] per leaf: the recurrent state before row 0, before any zeroing."""
