"""Stand-ins for engines and policies, whose every row can be worked out by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from asyncagent.envs.base import EpisodeTracker
from asyncagent.structs import (
    ArraySpec,
    Discrete,
    EnvSpec,
    EnvStep,
    IntArray,
    Loss,
    Nest,
    PolicyStep,
)


class CounterGroup:
    """Environments whose observation is their own row counter, which never restarts.

    Environment e plays episodes of the lengths ``lengths[e]`` in turn (steps from first row to
    end row), the last length again and again.  The reward that led to row n of environment e is
    ``n + 100 * e``; the k-th end of environment e is a truncation where ``(e, k)`` is in
    ``truncations``.  Where ``(e, n)`` is in ``lost``, environment e is lost on the way to row n;
    the first row after that which is not lost opens an episode.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        truncations: Sequence[tuple[int, int]] = (),
        num_actions: int = 3,
        lost: Sequence[tuple[int, int]] = (),
        level_name: str = "counter",
    ) -> None:
        self.level_name = level_name
        self.num_envs = len(lengths)
        self.spec = EnvSpec(ArraySpec((1,), "float32"), Discrete(num_actions), 1)
        self.actions: list[IntArray] = []
        self.closed = False
        self._lengths = [list(of_env) for of_env in lengths]
        self._truncations = set(truncations)
        self._losses = set(lost)
        self._lost = np.zeros(self.num_envs, np.bool_)
        self._row = np.zeros(self.num_envs, np.int64)
        self._in_episode = np.zeros(self.num_envs, np.int64)
        self._ends = np.zeros(self.num_envs, np.int64)
        self._ended = np.zeros(self.num_envs, np.bool_)
        self._tracker = EpisodeTracker(self.num_envs, level_name)

    async def reset(self) -> EnvStep:
        await asyncio.sleep(0)
        zeros = np.zeros(self.num_envs, np.bool_)
        return EnvStep(
            self._row.astype(np.float32)[:, None],
            np.zeros(self.num_envs, np.float32),
            zeros,
            zeros.copy(),
            ~zeros,
            zeros.copy(),
        )

    async def step(self, action: IntArray) -> EnvStep:
        await asyncio.sleep(0)
        self.actions.append(action.copy())
        self._row += 1
        lost = np.array([(e, int(self._row[e])) in self._losses for e in range(self.num_envs)])
        new = lost & ~self._lost
        first = (self._ended | self._lost) & ~lost
        self._lost = lost
        terminated = np.zeros(self.num_envs, np.bool_)
        truncated = np.zeros(self.num_envs, np.bool_)
        for e in range(self.num_envs):
            if first[e] or lost[e]:
                self._in_episode[e] = 0
                continue
            self._in_episode[e] += 1
            of_env = self._lengths[e]
            if self._in_episode[e] == of_env[min(int(self._ends[e]), len(of_env) - 1)]:
                cut = (e, int(self._ends[e])) in self._truncations
                (truncated if cut else terminated)[e] = True
                self._ends[e] += 1
        points = self._row + 100 * np.arange(self.num_envs)
        reward = np.where(first | lost, 0, points).astype(np.float32)
        self._ended = terminated | truncated
        self._tracker.forget(lost)
        episodes = self._tracker.update(reward, first | lost, self._ended, truncated)
        observation = self._row.astype(np.float32)[:, None]
        losses = tuple(Loss(self.level_name, 0, int(e), "lost") for e in np.flatnonzero(new))
        return EnvStep(observation, reward, terminated, truncated, first, lost, episodes, losses)

    def progress(self) -> None:
        pass

    async def close(self) -> None:
        self.closed = True


class CountingPolicy:
    """Chooses action ``observation % num_actions`` and counts rows since ``first`` as its state.

    Its logits at row n are ``n`` for every action; its version rises by one per call.
    """

    def __init__(self, num_actions: int = 3) -> None:
        self.num_actions = num_actions
        self.calls = 0

    def initial_state(self, num_envs: int) -> Nest:
        return (np.zeros((num_envs, 1), np.float32),)

    async def __call__(
        self,
        observation: np.ndarray,
        reward: np.ndarray,
        last_action: np.ndarray,
        first: np.ndarray,
        core_state: Nest,
    ) -> PolicyStep:
        await asyncio.sleep(0)
        counter = observation[:, 0].astype(np.int64)
        (state,) = core_state
        state = np.where(first[:, None], 0, state) + 1
        logits = np.repeat(observation, self.num_actions, axis=1).astype(np.float32)
        version = np.full(len(counter), self.calls, np.int64)
        self.calls += 1
        return PolicyStep(counter % self.num_actions, logits, (state.astype(np.float32),), version)
