"""What travels between environments, policy, actors and learner.

Shapes: ``E`` environments of one group, ``T`` agent steps of one unroll, ``A`` numbers by which
a policy describes the distribution of one action (of a discrete action: one logit per choice).
A *nest* is any tree of arrays that ``optree`` walks (an array, tuple, dict, named tuple).

Time, written once for the whole program.  Row ``t`` of an unroll belongs to the observation
``x_t``: ``reward[t]``, ``terminated[t]``, ``truncated[t]`` and ``last_action[t]`` describe the
step that *led to* ``x_t``; ``action[t]`` and ``behaviour_logits[t]`` are what was chosen *at*
``x_t``.  An episode's *end row* holds its final observation, last reward and end flag; the action
chosen there goes nowhere.  The row after it opens the next episode: ``first`` True, reward 0,
last_action 0.  Row ``T`` carries no action: it is row 0 of the next unroll.  Where an environment
is lost, its rows say so until its replacement opens an episode.
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
ActionArray: TypeAlias = npt.NDArray[Any]
"""Actions, int64 or float32 as the ``ActionSpace`` says."""


def map_nest(function: Callable[..., Any], nest: Nest, *others: Nest) -> Nest:
    """``function(leaf, ...)`` of every leaf, in a nest of the same structure."""
    return optree.tree_map(function, nest, *others)


@dataclass(frozen=True)
class ArraySpec:
    """Shape (without any leading E or T) and dtype name of one array."""

    shape: tuple[int, ...]
    dtype: str
    num_tokens: int = 0
    """Above 0, the array is a sentence: token numbers 1 ... num_tokens, then zeros."""


@dataclass(frozen=True)
class Discrete:
    """One choice out of ``num_actions``; an action is an int64 scalar."""

    num_actions: int

    @property
    def array(self) -> ArraySpec:
        """Of one action."""
        return ArraySpec((), "int64")

    @property
    def num_logits(self) -> int:
        """A: a logit per choice."""
        return self.num_actions


@dataclass(frozen=True)
class MultiDiscrete:
    """Several choices at once, independent of each other; an action is int64 [len(sizes)]."""

    sizes: tuple[int, ...]
    """Number of alternatives of each choice."""

    @property
    def array(self) -> ArraySpec:
        """Of one action."""
        return ArraySpec((len(self.sizes),), "int64")

    @property
    def num_logits(self) -> int:
        """A: the logits of each choice, one choice after the other."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Box:
    """``num_dims`` real numbers; an action is float32 [num_dims], a sample of a diagonal Gaussian.

    Actions are in the policy's units: where an environment's bounds are finite, -1 and 1 stand for
    them and what lies beyond is clipped by the environment; elsewhere the unit is its own.
    """

    num_dims: int
    bounded: bool = True
    """Every dimension has finite bounds."""

    @property
    def array(self) -> ArraySpec:
        """Of one action."""
        return ArraySpec((self.num_dims,), "float32")

    @property
    def num_logits(self) -> int:
        """A: every dimension's mean, then every dimension's log of the standard deviation."""
        return 2 * self.num_dims


ActionSpace: TypeAlias = Discrete | MultiDiscrete | Box


@dataclass(frozen=True)
class EnvSpec:
    """What a policy must know of an environment."""

    observation: Nest
    """Nest of ArraySpec, in the engine's own layout (Atari: uint8 [4, 84, 84])."""
    actions: ActionSpace
    action_repeats: int
    """Frames the engine advances per agent step."""


class Episode(NamedTuple):
    """One finished *game*, whatever ended the training episodes inside it."""

    level_name: str
    episode_return: float
    """Undiscounted, unclipped and unshaped sum of rewards over the whole game."""
    steps: int
    """Agent steps taken; frames are steps * action_repeats."""
    env_index: int
    """Which environment of its group, in [0, E)."""
    truncated: bool = False
    """A time limit ended it."""


class Loss(NamedTuple):
    """An environment that crashed, hung or raised, and is being replaced."""

    level_name: str
    seed: int
    """Which the environment was made with."""
    env_index: int
    """Which environment of its group, in [0, E)."""
    reason: str
    """What happened, in one line."""


class EnvStep(NamedTuple):
    """One row of every environment of a group."""

    observation: Nest
    """[E, ...] in the engine's layout; stays as it is until the step after the next is asked for:
    who keeps it longer copies it."""
    reward: FloatArray
    """float32 [E], unclipped, of the step that led to this observation; 0 where ``first``."""
    terminated: BoolArray
    """bool [E]: this is the end row of an episode that ended by the rules."""
    truncated: BoolArray
    """bool [E]: this is the end row of an episode that a time limit cut off."""
    first: BoolArray
    """bool [E]: this observation opens an episode."""
    lost: BoolArray
    """bool [E]: there is no such environment at the moment: the action sent to it went nowhere and
    what this row says of it means nothing. The next row that is not lost is ``first``."""
    episodes: tuple[Episode, ...] = ()
    """The games that ended with this row."""
    losses: tuple[Loss, ...] = ()
    """The environments that were lost with this row."""


class PolicyStep(NamedTuple):
    """The policy's answer for every environment of a group."""

    action: ActionArray
    """[E, ...] as the action space says."""
    logits: FloatArray
    """float32 [E, A]: the distribution that ``action`` was drawn from."""
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
    last_action: ActionArray
    """[T+1, E, ...]: the action that led to x_t; 0 where first."""
    action: ActionArray
    """[T, E, ...]: chosen at x_t."""
    behaviour_logits: FloatArray
    """float32 [T, E, A]: the distribution that action[t] was drawn from."""
    policy_version: IntArray
    """int64 [T, E]."""
    valid: BoolArray
    """bool [T, E]: False where action[t] went nowhere (end rows, lost rows)."""
    core_state: Nest
    """float32 [E, ...] per leaf: the recurrent state before row 0, before any zeroing."""
