"""Atari emulators behind one blocking interface: envpool's and ale-py's.

Both step the Arcade Learning Environment on C++ threads and preprocess alike: each action is held
for ``action_repeats`` frames, the last two frames are max-pooled, turned to grayscale, shrunk to
84x84 by area interpolation and stacked four deep.  From the same start, the same actions give the
same bytes, rewards, lives and ends; episodes, lives and time limits are for the caller (see
``atari.py``), because there the two libraries differ.  What remains of the differences:

- No-ops after a restart: envpool plays 1 to ``max_noops`` (one where it is 0), ale-py 0 to
  ``max_noops``, each number equally likely.
- The newest frame of a finished game: ale-py's may stem from before the game's last frames.
- Thirteen games whose screen is not 210 lines high, none of the usual 57: envpool cuts it off at
  line 210, ale-py shrinks all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from asyncagent.envs.base import import_engine, import_envpool
from asyncagent.structs import BoolArray, FloatArray, IntArray

STACK = 4
SIZE = 84


class Frames(NamedTuple):
    """One step of E emulators."""

    observation: npt.NDArray[np.uint8]
    """uint8 [E, 4, 84, 84], oldest frame first; never written to again."""
    reward: FloatArray
    """float32 [E], unclipped sum over the repeats."""
    game_over: BoolArray
    """bool [E]."""
    lives: npt.NDArray[np.int32]
    """int32 [E]; 0 throughout in games that count none."""


class Emulators(Protocol):
    """E emulators of one game; blocking, all calls from one thread."""

    num_envs: int
    num_actions: int

    def restart(self, which: IntArray) -> None:
        """New games, with no-ops played, in the emulators ``which``; all of them the first time."""
        ...

    def step(self, action: IntArray) -> Frames:
        """Hold ``action`` (int64 [E]) for one step; a finished game must be restarted before."""
        ...

    def close(self) -> None:
        """Free the emulators."""
        ...


class EnvpoolEmulators:
    """Emulators of envpool (the extra ``atari``)."""

    def __init__(
        self, game: str, seeds: Sequence[int], *, action_repeats: int, sticky: float,
        max_noops: int, full_action_space: bool, num_threads: int,
    ) -> None:  # fmt: skip
        """One emulator of ``game`` (e.g. ``space_invaders``) per seed; UsageError if missing.

        Args:
          sticky: probability, per frame, that the emulator repeats the action before.
          full_action_space: every action of the joystick instead of those the game reacts to.
        """
        envpool = import_envpool("atari")
        task = "".join(word.capitalize() for word in game.split("_")) + "-v5"
        self._pool: Any = envpool.make_gymnasium(
            task,
            num_envs=len(seeds),
            env_seed=list(seeds),
            num_threads=min(num_threads, len(seeds)),
            frame_skip=action_repeats,
            repeat_action_probability=sticky,
            noop_max=max(1, max_noops),
            full_action_space=full_action_space,
            use_fire_reset=False,
            episodic_life=False,
            reward_clip=False,
            max_episode_steps=2**30,
        )
        self.num_envs = len(seeds)
        self.num_actions = int(self._pool.action_space.n)
        self._in_order = np.arange(self.num_envs)

    def restart(self, which: IntArray) -> None:
        """See ``Emulators``."""
        self._pool.reset(env_id=which)

    def step(self, action: IntArray) -> Frames:
        """See ``Emulators``."""
        observation, reward, _, _, info = self._pool.step(action)
        fields = (observation, reward, info["terminated"] != 0, info["lives"])
        order = info["env_id"]
        if (order != self._in_order).any():
            places = np.argsort(order)
            fields = tuple(field[places] for field in fields)
        return Frames(*fields)

    def close(self) -> None:
        """See ``Emulators``."""
        self._pool = None


class AleEmulators:
    """Emulators of ale-py's vector environment (the extra ``ale``)."""

    def __init__(
        self, game: str, seeds: Sequence[int], *, action_repeats: int, sticky: float,
        max_noops: int, full_action_space: bool, num_threads: int,
    ) -> None:  # fmt: skip
        """As ``EnvpoolEmulators``."""
        vector_env = import_engine("ale_py.vector_env", "ale")
        self._env: Any = vector_env.AtariVectorEnv(
            game,
            len(seeds),
            num_threads=min(num_threads, len(seeds)),
            frameskip=action_repeats,
            repeat_action_probability=sticky,
            noop_max=max_noops + 1,
            full_action_space=full_action_space,
            use_fire_reset=False,
            episodic_life=False,
            reward_clipping=False,
            max_num_frames_per_episode=2**30,
        )
        self.num_envs = len(seeds)
        self.num_actions = int(self._env.single_action_space.n)
        self._seeds: npt.NDArray[np.int64] | None = np.array(seeds, np.int64)
        # Steps since the restart, up to the depth of the stack: ale-py starts with black frames.
        self._age = np.zeros(self.num_envs, np.int64)

    def restart(self, which: IntArray) -> None:
        """See ``Emulators``."""
        mask = np.zeros(self.num_envs, np.bool_)
        mask[which] = True
        if self._seeds is not None:
            # The generators are seeded once; -1 and None leave them alone.
            self._env.reset(seed=self._seeds)
            self._seeds = None
        else:
            self._env.reset(options={"reset_mask": mask})
        self._age[which] = 0

    def step(self, action: IntArray) -> Frames:
        """See ``Emulators``."""
        observation, reward, game_over, _, info = self._env.step(action)
        self._age += 1
        for env in np.flatnonzero(self._age < STACK - 1):
            # Repeat the game's first frame backwards in time, as envpool does.
            oldest = STACK - 1 - self._age[env]
            observation[env, :oldest] = observation[env, oldest]
        return Frames(observation, reward.astype(np.float32), game_over, info["lives"])

    def close(self) -> None:
        """See ``Emulators``."""
        self._env = None
